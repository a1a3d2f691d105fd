"""One decoding step: a forward for the rows that need a step of its kind, and their commit.

A step is a tensor program over a `DecodeState`: the host reads no tensor, and all shapes follow
from the capacity that the host chooses, the `StepShape`. Every capacity gives correct results: a
row that needs another kind of step, or that does not fit, stays as it is for a later step.

Shapes: B batch rows, L canvas positions, K candidates of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsb_kernels.commit import in_batch, initial_rows, unmask_and_slide
from dsb_kernels.place import Layout, place_rows
from dsb_kernels.rows import Column, StepKind, UnmaskSpec
from dsb_runtime.config import DecodingConfig
from dsb_runtime.engine.cache import KVCache
from dsb_runtime.engine.called import CalledModel
from dsb_runtime.engine.forward import Backbone
from dsb_runtime.engine.sampling import log_probability, propose
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


def new_state(
    canvas: Tensor, leftpad: Tensor, spec: UnmaskSpec, record: bool = False
) -> DecodeState:
    """The state before the first step, which is a refresh. Steps will write into `canvas`."""
    table, position = initial_rows(canvas, leftpad, spec)
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
    )


@dataclass(frozen=True)
class StepShape:
    """The kind of a step and its capacity, which fix the shapes of all its tensors."""

    kind: StepKind
    num_rows: int  # how many rows fit
    width: int  # how many positions of each row fit
    num_candidates: int  # how many candidates of each row fit


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
    )


class Step:
    """Runs the steps of one call, with its settings, over the tensors of one state."""

    def __init__(
        self,
        backbone: Backbone | CalledModel,
        info: DiffusionInfo,
        cache: KVCache,
        state: DecodeState,
        spec: UnmaskSpec,
        config: DecodingConfig,
        padded: bool,
    ) -> None:
        self.backbone, self.info, self.cache = backbone, info, cache
        self.state, self.spec, self.config, self.padded = state, spec, config, padded

    @property
    def response_width(self) -> int:
        """How many positions a response step computes at most. If tokens are predicted from the
        position before, the one before the response is computed too."""
        width = self.config.gen_length + int(self.info.family.shift)
        return min(width, self.state.canvas.shape[1])

    def layout(self, shape: StepShape) -> Layout:
        """The rows that take part, and where their windows stand."""
        state = self.state
        return place_rows(
            state.canvas, state.table, state.position, kind=shape.kind, num_rows=shape.num_rows,
            width=shape.width, num_candidates=shape.num_candidates,
            shift=self.info.family.shift,
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

    def __call__(self, shape: StepShape) -> None:
        """Run one step and update the state in place."""
        state, phase = self.state, self.backbone.phase
        with phase("place"):
            layout = self.layout(shape)
        scored = self.backbone(
            layout, self.cache, full=shape.kind == StepKind.REFRESH, padded=self.padded
        )
        with phase("score"):
            token, confidence = propose(
                scored, self.backbone.lm_head, layout.eligible, self.config, self.info,
                *(self.noise(layout) if self.config.draws else ()),
            )  # fmt: skip
            if self.recorded:
                position = state.position.clone()  # before the next step's candidates replace them
                logprob = log_probability(scored, self.backbone.lm_head, token)
        with phase("unmask"):
            capacity = shape.num_rows, shape.num_candidates
            # If the capacity is the batch, the layout has all rows in the batch's order.
            rows = layout.rows if shape.num_rows < len(state.canvas) else None
            unmask_and_slide(
                state.canvas, state.table, state.position, state.commit, state.confidence,
                token.view(capacity), confidence.view(capacity), layout.active, rows, self.spec,
            )  # fmt: skip
            if self.recorded:
                self.record(position, logprob.view(capacity), rows)
