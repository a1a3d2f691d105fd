"""One decoding step: a forward of the rows that need one of its kind, and their commit.

The step is a tensor program over a `DecodeState`: no tensor is read by the host, and its shapes
follow from three numbers that the host picks, `StepShape`. Whatever the host picks is right: a row
that needs something else, does not fit, or is one too many is left as it is, for a later step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsb_kernels.unmask import unmask_and_slide
from dsb_kernels.window_state import UnmaskSpec
from dsb_runtime.cache import Place, WindowCache
from dsb_runtime.config import DecodingConfig
from dsb_runtime.forward import Backbone
from dsb_runtime.load import DiffusionInfo
from dsb_runtime.sampling import propose
from dsb_runtime.state import KINDS, NOTHING, REFRESH, RESPONSE, WINDOW, DecodeState, write_flags


@dataclass(frozen=True)
class StepShape:
    """What fixes the shapes of a step."""

    kind: str  # "window", "refresh" (every position), "response" (the prompt's K/V stay)
    rows: int  # batch rows that it has room for
    width: int  # positions of each
    held: int  # candidates of each


def spec_of(config: DecodingConfig, info: DiffusionInfo, prompt_length: int) -> UnmaskSpec:
    """The launch constants of a call, family defaults filled in."""
    family = info.family
    cached = config.cache != "none"
    refresh_commit = config.refresh_commit or (family.refresh_commit if cached else "select")
    prefix = family.prefix_window if config.prefix_window is None else config.prefix_window
    naive = config.schedule == "naive"
    return UnmaskSpec(
        prompt_length=prompt_length,
        block_length=config.block_length,
        max_block_length=config.max_block_length,
        schedule=config.schedule,
        cache=config.cache,
        prefix_window=prefix,
        min_prefix=int(family.shift and refresh_commit == "select"),
        rule=config.rule,
        rule_value=config.rule_value,
        steps=(config.steps or 0) // (config.num_blocks if naive else 1),
        refresh_commit=refresh_commit,
        mask_id=info.mask_id,
        eos_ids=info.eos_ids,
        stop_at_eos=config.stop_at_eos,
    )


class Step:
    """The step of one call's shapes and settings, over the tensors of one state."""

    def __init__(
        self,
        backbone: Backbone,
        lm_head: torch.nn.Linear,
        info: DiffusionInfo,
        cache: WindowCache | None,
        state: DecodeState,
        spec: UnmaskSpec,
        config: DecodingConfig,
        padded: bool,
    ) -> None:
        self.backbone, self.lm_head, self.info, self.cache = backbone, lm_head, info, cache
        self.state, self.spec, self.config, self.padded = state, spec, config, padded

    def due(self) -> Tensor:
        """(B,) int32: what each row needs next."""
        window, every = self.state.window, self.config.full_every
        kind = torch.where(window.refresh, REFRESH, WINDOW)
        if every > 1:
            kept = window.refresh & (self.state.refreshes % every != 0)
            kind = torch.where(kept, RESPONSE, kind)
        return torch.where(window.done, NOTHING, kind)

    def place(self, shape: StepShape) -> tuple[Place, Tensor]:
        """Where the rows that take part stand, and (b,) bool which of the b sequences do."""
        state, window, L = self.state, self.state.window, self.state.canvas.shape[1]
        active = state.needs == KINDS[shape.kind]
        if shape.kind == "window":
            start, end = window.start - window.prefix, window.end
        else:
            first = 0
            if shape.kind == "response":  # the row before it predicts its first token, if shifted
                first = self.spec.prompt_length - int(self.info.family.shift)
            start = torch.full_like(window.start, first)
            end = torch.full_like(start, L)
        held = (window.position >= 0).sum(-1)
        active = active & (end - start <= shape.width) & (held <= shape.held)
        rows = None
        if shape.rows < len(active):  # those that take part come first
            rows = active.logical_not().int().argsort(stable=True)[: shape.rows]
            active, start, end = active[rows], start[rows], end[rows]
        length = torch.where(active, end - start, 0).int()
        leftpad = None
        if self.padded:
            leftpad = state.leftpad if rows is None else state.leftpad[rows]
        full, seqlens = shape.kind == "refresh", torch.full_like(start, L)
        rows = None if rows is None else rows.int()
        return Place(rows, start, length, seqlens, shape.width, L, leftpad, full), active

    def __call__(self, shape: StepShape) -> None:
        """Run one step and update the state in place."""
        state, phase = self.state, self.backbone.phase
        place, active = self.place(shape)
        rows = place.rows if place.rows is None else place.rows.long()

        def take(x: Tensor) -> Tensor:
            return x if rows is None else x[rows]

        position = take(state.window.position)[:, : shape.held].long()
        # The row that predicts a position: its own, or the one before it (row 0 keeps its own).
        source = (position - int(self.info.family.shift)).clamp(min=0)
        keep = (source - place.start[:, None]).clamp(0, shape.width - 1)
        if self.cache is not None:
            self.cache.put(place)
        mask = None
        if self.padded:  # (b, 1, 1, L): keys that exist. Without padding there is nothing to mask.
            index = torch.arange(place.canvas_length, device=position.device)
            mask = (index >= place.leftpad[:, None])[:, None, None]
        ids = take(state.canvas)
        ids = ids if place.full else ids.gather(1, place.index())
        hidden = self.backbone(ids, place, keep, mask, self.cache)
        with phase("score"):
            token, confidence = self.score(hidden, position, active, rows)
        with phase("unmask"):
            self.commit(token, confidence, active, rows)

    def score(
        self, hidden: Tensor, position: Tensor, active: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens and confidences (b, K) for the candidates at canvas `position` (b, K)."""
        state = self.state
        eligible = (position >= 0) & active[:, None]
        noise_ids = None
        if self.config.temperature > 0:
            # Of the batch row, its steps so far and the place in the response: no other row, no
            # padding, and no step that the row did not take part in, changes its noise.
            row = torch.arange(len(state.needs), device=position.device)
            row, count = (row, state.forwards) if rows is None else (rows, state.forwards[rows])
            at = (position - self.spec.prompt_length).clamp(min=0)
            noise_ids = ((row << 42) | (count << 21))[:, None] | at
            noise_ids = noise_ids.flatten()
        token, confidence = propose(
            hidden.flatten(0, 1), self.lm_head, eligible.flatten(), self.config, self.info,
            state.seed, noise_ids,
        )  # fmt: skip
        return token.view_as(position), confidence.view_as(position)

    def commit(
        self, token: Tensor, confidence: Tensor, active: Tensor, rows: Tensor | None
    ) -> None:
        """Commit what the rule selects, slide the windows, and say what each row needs next."""
        state, held = self.state, token.shape[1]
        tokens = state.canvas.new_zeros(state.candidates.shape)
        state.confidence.zero_()
        where = slice(None) if rows is None else rows
        tokens[where, :held] = token
        state.confidence[where, :held] = confidence
        if rows is not None:
            active = torch.zeros_like(state.window.done).scatter(0, rows, active)
        state.candidates.copy_(state.window.position)
        refreshed = active & state.window.refresh
        commit = unmask_and_slide(
            state.canvas, tokens, state.confidence, state.window, active, state.leftpad, self.spec
        )
        state.commit.copy_(commit)
        state.refreshes.add_(refreshed)
        state.forwards.add_(active)
        state.needs.copy_(self.due())
        write_flags(state, active, self.spec)
