"""One decoding step: a forward of the rows that need one of its kind, and their commit.

The step is a tensor program over a `DecodeState`: no tensor is read by the host, and its shapes
follow from three numbers that the host picks, `StepShape`. Whatever the host picks is right: a row
that needs something else, does not fit, or is one too many is left as it is, for a later step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsb_kernels.commit import unmask_and_slide
from dsb_kernels.place import PlacedRows, place_rows
from dsb_kernels.rows import UnmaskSpec
from dsb_runtime.config import DecodingConfig
from dsb_runtime.engine.cache import Place, WindowCache
from dsb_runtime.engine.forward import Backbone, Scored
from dsb_runtime.engine.sampling import propose
from dsb_runtime.engine.state import KINDS, DecodeState
from dsb_runtime.families import DiffusionInfo


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
        full_every=config.full_every,
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

    def place(self, shape: StepShape) -> tuple[PlacedRows, Place]:
        """The rows that take part, and where they stand in the canvas."""
        state, shift, first = self.state, self.info.family.shift, 0
        if shape.kind == "response":  # the row before it predicts its first token, if shifted
            first = self.spec.prompt_length - int(shift)
        placed = place_rows(
            state.canvas, state.window, state.leftpad, kind=KINDS[shape.kind], rows=shape.rows,
            width=shape.width, held=shape.held, first=first, shift=shift,
            prompt_length=self.spec.prompt_length,
        )  # fmt: skip
        batch, length = state.canvas.shape
        place = Place(
            rows=placed.rows if shape.rows < batch else None,
            start=placed.start,
            length=placed.length,
            seqlens=placed.seqlens,
            width=shape.width,
            canvas_length=length,
            leftpad=placed.leftpad if self.padded else None,
            full=shape.kind == "refresh",
        )
        return placed, place

    def __call__(self, shape: StepShape) -> None:
        """Run one step and update the state in place."""
        state, phase = self.state, self.backbone.phase
        with phase("place"):
            placed, place = self.place(shape)
        if self.cache is not None:
            self.cache.put(place)
        scored = Scored(placed.keep, placed.leftpad, placed.kept)
        hidden = self.backbone(placed.ids, place, scored, self.cache)
        with phase("score"):
            token, confidence = propose(
                hidden, self.lm_head, placed.eligible, self.config, self.info,
                *((state.seed, placed.noise_ids) if self.config.temperature > 0 else ()),
            )  # fmt: skip
        with phase("unmask"):
            room = shape.rows, shape.held
            unmask_and_slide(
                state.canvas, token.view(room), confidence.view(room), state.window, placed.active,
                state.leftpad, self.spec, place.rows,
            )  # fmt: skip
