"""One decoding step: a forward for the rows that need a step of its kind, and their commit.

A step is a tensor program over a `DecodeState`: the host reads no tensor, and all shapes follow
from the capacity that the host chooses, the `StepShape`. Every capacity gives correct results: a
row that needs another kind of step, or that does not fit, stays as it is for a later step.

Shapes: B batch rows, L canvas positions, K candidates of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsb_kernels.commit import in_batch, initial_rows, unmask_and_slide
from dsb_kernels.place import Layout, place_rows, response_index
from dsb_kernels.rows import Column, StepKind, UnmaskSpec
from dsb_runtime.config import DecodingConfig
from dsb_runtime.engine.cache import KVCache
from dsb_runtime.engine.called import CalledModel
from dsb_runtime.engine.forward import Backbone
from dsb_runtime.engine.guidance import guided, with_unconditional
from dsb_runtime.engine.sampling import log_probability, propose
from dsb_runtime.engine.sparse import Context, beyond_eos, in_window, pack, seen_by_refresh
from dsb_runtime.families import DiffusionInfo

NOISE_OF_ROW_0 = (1 << 42) - 1  # the bits of a noise id that do not name its batch row


class DecodeState(NamedTuple):
    """The state of a batch, as tensors of fixed shapes. With the model and the K/V cache, it is all
    that a step depends on. The step updates it in place.

    Rows advance independently. A step moves the rows that need a step of its kind and leaves the
    others as they are, so that a step can be useless but never wrong.
    """

    canvas: Tensor  # (B, L) int64
    table: Tensor  # (B, NUM_COLUMNS) int32, the row table
    position: Tensor  # (B, K) int32, the candidates of the coming step, then -1
    commit: Tensor  # (B, K) bool, whether the last step committed each of its candidates
    confidence: Tensor  # (B, K) float32, the confidence of these candidates
    seed: Tensor  # () int64, the key of the noise, or (B,), for each row its own
    # What is recorded of each position, where a call asks for it; else both are (B, 0). Column L is
    # written by what was not committed, and read by nobody.
    step_map: Tensor  # (B, L + 1) int32, in which of its row's steps it was committed, or -1
    logprobs: Tensor  # (B, L + 1) float32, the log-probability of its token in that step, or 0
    given: Tensor  # (B, L) bool, where the call was given a token; (B, 0) without guidance
    # (B, L) bool, which K/V a window step attends to; (B, 0) where it attends to all
    stored: Tensor


def new_state(
    canvas: Tensor,
    leftpad: Tensor,
    spec: UnmaskSpec,
    config: DecodingConfig,
    record: bool = False,
) -> DecodeState:
    """The state before the first step, which is a refresh. Steps will write into `canvas`."""
    table, position = initial_rows(canvas, leftpad, spec)
    if config.sparse:
        seen = seen_by_refresh(canvas, table, spec, config.context_masks)
        table[:, Column.CONTEXT] = seen.sum(-1)
    nothing = canvas.new_zeros(len(canvas), 0, dtype=torch.bool)
    recorded = (len(canvas), canvas.shape[1] + 1 if record else 0)
    return DecodeState(
        canvas=canvas,
        table=table,
        position=position,
        commit=torch.zeros_like(position, dtype=torch.bool),
        confidence=torch.zeros_like(position, dtype=torch.float32),
        seed=torch.zeros((), dtype=torch.int64, device=canvas.device),
        step_map=torch.full(recorded, -1, dtype=torch.int32, device=canvas.device),
        logprobs=torch.zeros(recorded, dtype=torch.float32, device=canvas.device),
        given=canvas != spec.mask_id if config.cfg_scale > 0 else nothing,
        stored=torch.zeros_like(canvas, dtype=torch.bool) if config.sparse else nothing,
    )


class Proposals(NamedTuple):
    """The proposals of a step, row by row: (b * k,) each."""

    token: Tensor  # int64
    confidence: Tensor  # float32
    logprob: Tensor | None  # float32, of the token; None if the call does not record it

    def map(self, change: Callable[[Tensor], Tensor]) -> Proposals:
        """The same change of each tensor."""
        logprob = None if self.logprob is None else change(self.logprob)
        return Proposals(change(self.token), change(self.confidence), logprob)


@dataclass(frozen=True)
class StepShape:
    """The kind of a step and its capacity, which fix the shapes of all its tensors."""

    kind: StepKind
    num_rows: int  # how many rows fit
    width: int  # how many positions of each row fit
    num_candidates: int  # how many candidates of each row fit
    num_drafts: int = 0  # how many rows' drafts fit beside these rows (`engine.drafts`)


def spec_of(config: DecodingConfig, info: DiffusionInfo) -> UnmaskSpec:
    """The spec of a call, in which the family's defaults replace settings that are None."""
    family = info.family
    cached = config.cache != "none"
    refresh_commit = config.refresh_commit or (family.refresh_commit if cached else "select")
    prefix = family.prefix_window if config.prefix_window is None else config.prefix_window
    naive = config.schedule == "naive"
    return UnmaskSpec(
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
        full_every=config.full_every,
        progress=config.progress or 0.0,
        eos_bound=config.eos_bound,
    )


class Step:
    """Runs the steps of one call, with its settings, over the tensors of one state."""

    draft_kind: StepKind | None = None  # the kind of steps that may have drafts beside them

    def __init__(
        self,
        backbone: Backbone | CalledModel,
        info: DiffusionInfo,
        cache: KVCache,
        state: DecodeState,
        spec: UnmaskSpec,
        config: DecodingConfig,
        padded: bool,
        ban: Tensor | None,
    ) -> None:
        self.backbone, self.info, self.cache, self.ban = backbone, info, cache, ban
        self.state, self.spec, self.config, self.padded = state, spec, config, padded
        self.between = state  # the state after a step, before the drafts that it accepts

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The tensors that a new call sets to the state before its first step."""
        return self.state

    def tables(self) -> Tensor:
        """What the host reads after every step: the row table."""
        return self.state.table

    def layout(self, shape: StepShape) -> Layout:
        """The rows that take part, and where their windows stand."""
        state = self.state
        return place_rows(
            state.canvas, state.table, state.position, kind=shape.kind, num_rows=shape.num_rows,
            width=shape.width, num_candidates=shape.num_candidates,
            shift=self.info.family.shift,
            suffix_window=min(self.config.suffix_window, state.canvas.shape[1]),
        )  # fmt: skip

    def noise(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """The seed and the noise ids of the candidates. A row that has a seed of its own draws what
        the only row of a batch draws with that seed."""
        seed = self.state.seed
        if seed.ndim == 0:
            return seed, layout.noise_ids
        k = layout.noise_ids.shape[0] // len(layout.rows)
        own = seed.index_select(0, layout.rows)[:, None].expand(-1, k).flatten().contiguous()
        return own, layout.noise_ids & NOISE_OF_ROW_0

    @property
    def recorded(self) -> bool:
        """Whether the call asks for what was committed when, and with which probability."""
        return self.state.step_map.shape[1] > 0

    def record(self, position: Tensor, logprob: Tensor, rows: Tensor | None) -> None:
        """Keep what the step has committed. `position` (B, K) are its candidates, `logprob` (b, k)
        belongs to their tokens."""
        state, L = self.state, self.state.canvas.shape[1]
        index = torch.where(state.commit, position, L).long()
        step = (state.table[:, Column.FORWARDS] - 1)[:, None].expand_as(position)
        state.step_map.scatter_(1, index, step)
        state.logprobs.scatter_(1, index, in_batch(logprob, rows, position))

    def see(self, layout: Layout, shape: StepShape) -> tuple[Layout, Context]:
        """What the rows of a step see in a sparse context, and a refresh's layout, which has that
        alone. Keep it for the window steps that follow."""
        state, spec, rows = self.state, self.spec, layout.rows.long()
        before, position = state.stored[rows], None
        if shape.kind == StepKind.WINDOW:
            visible = before | in_window(layout, state.canvas.shape[1])
            visible &= ~beyond_eos(state.canvas, state.table, spec)[rows]
        else:
            seen = seen_by_refresh(state.canvas, state.table, spec, self.config.context_masks)
            layout, position = pack(
                layout, seen, state.canvas, state.position, self.info.family.shift
            )
            visible = seen[rows]
        state.stored[rows] = torch.where(layout.active[:, None], visible, before)
        return layout, Context(visible, position)

    def __call__(self, shape: StepShape) -> None:
        """Run one step and update the state in place."""
        state, phase = self.state, self.backbone.phase
        with phase("place"):
            layout, context = self.layout(shape), None
            if self.config.sparse:
                layout, context = self.see(layout, shape)
            placed = layout
            if self.config.cfg_scale > 0:
                placed, context = with_unconditional(
                    layout, context, state.given, self.spec.mask_id
                )
        scored = self.backbone(
            placed, self.cache, full=shape.kind == StepKind.REFRESH, padded=self.padded,
            context=context,
        )  # fmt: skip
        with phase("score"):
            proposed = self.score(scored, layout)
        with phase("unmask"):
            self.unmask(layout, proposed)
            if self.config.sparse:
                seen = seen_by_refresh(
                    state.canvas, state.table, self.spec, self.config.context_masks
                )
                state.table[:, Column.CONTEXT] = seen.sum(-1)

    def score(self, scored: Tensor, layout: Layout) -> Proposals:
        """Propose a token for each candidate of a layout. `scored` is what the forward returned."""
        config, lm_head, early = self.config, self.backbone.lm_head, None
        if config.cfg_scale > 0:
            scored, lm_head = guided(scored, lm_head, config.cfg_scale), None
        if config.min_new_tokens:
            early = response_index(layout.noise_ids) < config.min_new_tokens
        seed, noise_ids = self.noise(layout) if config.draws else (None, None)
        token, confidence = propose(
            scored, lm_head, layout.eligible, config, self.info, seed, noise_ids, self.ban, early
        )
        logprob = log_probability(scored, lm_head, token) if self.recorded else None
        return Proposals(token, confidence, logprob)

    def unmask(self, layout: Layout, proposed: Proposals) -> None:
        """Commit what the rule selects, and slide."""
        state, num_rows = self.state, len(layout.rows)
        token, confidence, logprob = proposed.map(lambda x: x.view(num_rows, -1))
        # If the capacity is the batch, the layout has all rows in the batch's order.
        rows = layout.rows if num_rows < len(state.canvas) else None
        if logprob is not None:
            position = state.position.clone()  # before the next step's candidates replace them
        unmask_and_slide(
            state.canvas, state.table, state.position, state.commit, state.confidence,
            token, confidence, layout.active, rows, self.spec,
        )  # fmt: skip
        if logprob is not None:
            self.record(position, logprob, rows)
