"""Drafts: two steps of a row in one forward, if what the first commits can be guessed.

Before a step, a guess says what it will commit: of the candidates that the last step left, those
whose confidence was high then. Sliding the window as if that were so gives the *draft state*. The
step's forward computes the row's window and, beside it, the window of the draft state, whose keys
and values stay apart from the cache. If the step then leads to exactly the draft state, what was
computed beside it is the forward of the following step: its keys and values go into the cache, and
its proposals are committed. If not, all of that is dropped. So every token is the token of the
steps one by one, and only the number of forwards falls.

The host reads nothing in between: whether a draft is accepted is a tensor.

Shapes: B batch rows, L canvas positions, K candidates of a row. A step has a capacity of b rows and
of d drafts, W positions and k candidates each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsb_kernels.commit import in_batch, unmask_and_slide
from dsb_kernels.place import Layout, place_rows
from dsb_kernels.rows import Column, StepKind, UnmaskSpec
from dsb_kernels.rules import RULES
from dsb_runtime.config import DecodingConfig
from dsb_runtime.engine.draft_windows import DraftWindows, beside
from dsb_runtime.engine.step import DecodeState, Proposed, Step, StepShape


class Drafts(NamedTuple):
    """How many drafts a decoding had, over all rows."""

    run: int  # how many were computed beside their row's window
    accepted: int  # how many of these were the forward of their row's next step


NO_DRAFTS = Drafts(0, 0)


class DraftState(NamedTuple):
    """What drafts keep between steps, as tensors of fixed shapes."""

    # The draft state. A row without a draft has NOTHING as its NEXT_KIND.
    canvas: Tensor  # (B, L) int64
    table: Tensor  # (B, NUM_COLUMNS) int32
    position: Tensor  # (B, K) int32
    commit: Tensor  # (B, K) bool
    confidence: Tensor  # (B, K) float32
    # What was last proposed for each position. Column L is written where nothing was, and read by
    # nobody.
    last_token: Tensor  # (B, L + 1) int64
    last_confidence: Tensor  # (B, L + 1) float32, -inf where no step has scored the position yet
    counts: Tensor  # (B, 2) int32, how many of each row's drafts were run and accepted


def new_drafts(state: DecodeState) -> DraftState:
    """What is kept before the first step, when there is no draft."""
    (B, L), table = state.canvas.shape, state.table.clone()
    table[:, Column.NEXT_KIND] = int(StepKind.NOTHING)
    last_confidence = state.confidence.new_full((B, L + 1), -torch.inf)
    return DraftState(
        *(x.clone() for x in (state.canvas, table, state.position, state.commit, state.confidence)),
        state.canvas.new_zeros(B, L + 1), last_confidence, state.table.new_zeros(B, 2),
    )  # fmt: skip


def guess_spec(spec: UnmaskSpec, config: DecodingConfig) -> UnmaskSpec:
    """The spec by which the guess selects."""
    if RULES[spec.rule].kind is int:  # a quota's count is known in advance
        return spec
    value = 0.85 if config.draft_threshold is None else config.draft_threshold
    return replace(spec, rule="threshold", rule_value=value, progress=0.0)


class DraftingStep(Step):
    """Runs steps with drafts beside them. The arguments are those of `Step`."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.drafts, self.guess_spec = new_drafts(self.state), guess_spec(self.spec, self.config)
        # With cache="none" every step is a refresh, and a draft is another canvas of the forward.
        uncached = self.config.cache == "none"
        self.draft_kind = StepKind.REFRESH if uncached else StepKind.WINDOW
        # The state after the step and before the one that its drafts were accepted for.
        names = ("canvas", "table", "position", "commit", "confidence")
        self.between = self.state._replace(**{n: getattr(self.state, n).clone() for n in names})

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        return (*self.state, *self.drafts)

    def tables(self) -> Tensor:
        """The row tables after the step with its drafts, before these, and of the next drafts:
        (3, B, NUM_COLUMNS)."""
        return torch.stack([self.state.table, self.between.table, self.drafts.table])

    def __call__(self, shape: StepShape) -> None:
        if shape.num_drafts == 0:
            super().__call__(shape)
            self.note_between()
        else:
            self.run_both(shape)
        with self.backbone.phase("unmask"):
            self.guess()

    def run_both(self, shape: StepShape) -> None:
        """Run one step, and the next one for the rows whose drafts are accepted."""
        phase, drafts = self.backbone.phase, self.drafts
        with phase("place"):
            layout = self.layout(shape)
            draft_layout = place_rows(
                drafts.canvas, drafts.table, drafts.position, kind=shape.kind,
                num_rows=shape.num_drafts, width=shape.width,
                num_candidates=shape.num_candidates, shift=self.info.family.shift,
            )  # fmt: skip
            both = beside(layout, draft_layout)
        windows = None
        if shape.kind == StepKind.REFRESH:
            scored = self.backbone(both, self.cache, full=True, padded=self.padded)
        else:
            windows = DraftWindows(draft_layout, self.cache)
            scored = self.backbone(
                layout, self.cache, full=False, padded=self.padded, drafts=windows
            )
        with phase("score"):
            proposed = self.score(scored, both.eligible, both.noise_ids)
            split = len(layout.eligible)
            first, second = (
                Proposed(*(x if x is None else x[part] for x in proposed))
                for part in (slice(split), slice(split, None))
            )
        with phase("unmask"):
            self.unmask(layout, first)
            self.note_between()
            rows = draft_layout.rows
            run = draft_layout.active & (self.state.table[:, Column.TOOK_PART] == 1)[rows]
            accepted = run & self.equal()[rows]
            for column, count in enumerate((run, accepted)):
                drafts.counts[:, column].index_add_(0, rows, count.int())
            if windows is not None:
                windows.keep(accepted)
            self.unmask(draft_layout._replace(active=accepted), second)

    def unmask(self, layout: Layout, proposed: Proposed) -> None:
        state, drafts, L = self.state, self.drafts, self.state.canvas.shape[1]
        num_rows = len(layout.rows)
        rows = layout.rows if num_rows < len(state.canvas) else None
        scored = in_batch(layout.active, rows, state.table[:, 0])[:, None] & (state.position >= 0)
        index = torch.where(scored, state.position, L).long()
        for last, x in ((drafts.last_token, proposed.token),
                        (drafts.last_confidence, proposed.confidence)):  # fmt: skip
            last.scatter_(1, index, in_batch(x.view(num_rows, -1), rows, state.position))
        super().unmask(layout, proposed)

    def equal(self) -> Tensor:
        """Whether each row's state is its draft state, (B,) bool."""
        state, drafts = self.state, self.drafts
        same_table = (state.table == drafts.table).all(-1)
        return (state.canvas == drafts.canvas).all(-1) & same_table

    def note_between(self) -> None:
        for name in ("canvas", "table", "position", "commit", "confidence"):
            getattr(self.between, name).copy_(getattr(self.state, name))

    def guess(self) -> None:
        """Make the draft state of every row whose next step may have a draft beside it."""
        state, drafts = self.state, self.drafts
        for name in ("canvas", "table", "position"):
            getattr(drafts, name).copy_(getattr(state, name))
        index = state.position.clamp(min=0).long()
        token, confidence = (
            x.gather(1, index) for x in (drafts.last_token, drafts.last_confidence)
        )
        known = (state.position >= 0) & (confidence > -torch.inf)
        active = (state.table[:, Column.NEXT_KIND] == self.draft_kind) & known.any(-1)
        unmask_and_slide(
            drafts.canvas, drafts.table, drafts.position, drafts.commit, drafts.confidence,
            token, confidence, active, None, self.guess_spec,
        )  # fmt: skip
        next_kind = drafts.table[:, Column.NEXT_KIND]
        has_draft = active & (next_kind == self.draft_kind)
        next_kind.copy_(torch.where(has_draft, next_kind, StepKind.NOTHING))
