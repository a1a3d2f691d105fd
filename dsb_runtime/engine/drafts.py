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

from dsb_kernels.commit import first_candidates, in_batch, masks_of, unmask_and_slide
from dsb_kernels.place import Layout, place_rows
from dsb_kernels.rows import Column, StepKind, UnmaskSpec
from dsb_runtime.config import DecodingConfig
from dsb_runtime.engine.draft_windows import DraftWindows, beside
from dsb_runtime.engine.step import DecodeState, Proposals, Step, StepShape


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
    return DraftState(
        canvas=state.canvas.clone(),
        table=table,
        position=state.position.clone(),
        commit=state.commit.clone(),
        confidence=state.confidence.clone(),
        last_token=state.canvas.new_zeros(B, L + 1),
        last_confidence=state.confidence.new_full((B, L + 1), -torch.inf),
        counts=state.table.new_zeros(B, 2),
    )


# A confidence rises as the masks around it are filled, so that the guess looks for less than the
# rule's threshold. Of 0.8 to 1 times it, 0.95 takes the fewest forwards without a cache; with DSB
# Cache 1 takes up to 1% fewer (benchmarks/drafts_guess.json).
LOWERED = 0.95


def guess_spec(spec: UnmaskSpec, config: DecodingConfig) -> UnmaskSpec:
    """The spec by which the guess selects."""
    if spec.rule != "threshold":
        return spec
    value = config.draft_threshold
    return replace(spec, rule_value=LOWERED * spec.rule_value if value is None else value)


# What a step changes in a state, beside what is recorded.
STATE = ("canvas", "table", "position", "commit", "confidence")


class DraftingStep(Step):
    """Runs steps with drafts beside them. The arguments are those of `Step`."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.drafts, self.guess_spec = new_drafts(self.state), guess_spec(self.spec, self.config)
        # With cache="none" every step is a refresh, and a draft is another canvas of the forward.
        uncached = self.config.cache == "none"
        self.draft_kind = StepKind.REFRESH if uncached else StepKind.WINDOW
        # The state after the step and before the one that its drafts were accepted for.
        self.between = self.state._replace(**{n: getattr(self.state, n).clone() for n in STATE})

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        return (*self.state, *self.drafts)

    def tables(self) -> Tensor:
        """The row tables after the step with its drafts, before these, and of the next drafts:
        (3, B, NUM_COLUMNS)."""
        return torch.stack([self.state.table, self.between.table, self.drafts.table])

    def __call__(self, shape: StepShape) -> None:
        """Run one step, and the next one for the rows whose drafts are accepted."""
        phase, state, drafts = self.backbone.phase, self.state, self.drafts
        with phase("place"):
            first = self.place(state, shape, shape.num_rows)
            second = self.place(drafts, shape, shape.num_drafts) if shape.num_drafts else None
        beside_it = None if second is None else second[0]
        windows = None
        if beside_it is not None and shape.kind == StepKind.WINDOW:
            windows = DraftWindows(beside_it, self.cache)
        proposed = self.propose(shape, first[0], beside_it, windows)
        with phase("unmask"):
            if second is not None:
                # Also what a draft that is dropped proposes helps the next guess.
                self.remember(*second, proposed[1])
            self.remember(*first, proposed[0])
            self.unmask(first[0], proposed[0])
            for name in STATE:
                getattr(self.between, name).copy_(getattr(state, name))
            if second is not None:
                layout = second[0]
                run = layout.active & (state.table[:, Column.TOOK_PART] == 1)[layout.rows]
                accepted = run & self.equal()[layout.rows]
                for column, count in enumerate((run, accepted)):
                    drafts.counts[:, column].index_add_(0, layout.rows, count.int())
                if windows is not None:
                    windows.keep(accepted)
                layout = layout._replace(active=accepted)
                self.remember(layout, second[1], proposed[1])
                self.unmask(layout, proposed[1])
            self.guess()

    def place(
        self, state: DecodeState | DraftState, shape: StepShape, num_rows: int
    ) -> tuple[Layout, Tensor]:
        """The layout of a step from this state, and the positions that it scores, (B, n)."""
        position, count = state.position, shape.num_candidates
        if shape.kind != StepKind.WINDOW:
            # Such a step computes masks beyond the block too. Their confidences help to guess what
            # is committed once the block has grown.
            row = dict(zip(Column, state.table.long().unbind(1), strict=True))
            masked, _ = masks_of(state.canvas, row, self.spec)
            count += self.spec.block_length
            num = min(position.shape[1] + self.spec.block_length, state.canvas.shape[1])
            position = first_candidates(masked, row[Column.RESPONSE_END], num)
            count = min(count, num)
        layout = place_rows(
            state.canvas, state.table, position, kind=shape.kind, num_rows=num_rows,
            width=shape.width, num_candidates=count, shift=self.info.family.shift,
            suffix_window=min(self.config.suffix_window, state.canvas.shape[1]),
        )  # fmt: skip
        return layout, position

    def propose(
        self, shape: StepShape, first: Layout, second: Layout | None, windows: DraftWindows | None
    ) -> list[Proposals]:
        """Run the forward of a step and of the drafts beside it. Returns the proposals of each."""
        both = first if second is None else beside(first, second)
        scored = self.backbone(
            both if windows is None else first, self.cache, full=shape.kind == StepKind.REFRESH,
            padded=self.padded, drafts=windows,
        )  # fmt: skip
        with self.backbone.phase("score"):
            proposed = self.score(scored, both)
        split = len(first.eligible)
        return [proposed.map(lambda x: x[:split]), proposed.map(lambda x: x[split:])]

    def unmask(self, layout: Layout, proposed: Proposals) -> None:
        """Commit candidates. What follows them among the proposals is left out."""
        num_rows, most = len(layout.rows), self.state.position.shape[1]
        super().unmask(layout, proposed.map(lambda x: x.view(num_rows, -1)[:, :most].contiguous()))

    def remember(self, layout: Layout, position: Tensor, proposed: Proposals) -> None:
        """Keep what is proposed for each of the positions (B, n) of the rows that take part."""
        drafts, num_rows = self.drafts, len(layout.rows)
        rows = layout.rows if num_rows < len(position) else None
        took_part = in_batch(layout.active, rows, position[:, 0])
        scored = took_part[:, None] & (position >= 0)
        # A row that takes part has no candidate behind the columns that are scored.
        scored[:, len(layout.eligible) // num_rows :] = False
        index = torch.where(scored, position, self.state.canvas.shape[1]).long()
        for last, x in (
            (drafts.last_token, proposed.token),
            (drafts.last_confidence, proposed.confidence),
        ):
            last.scatter_(1, index, in_batch(x.view(num_rows, -1), rows, position))

    def equal(self) -> Tensor:
        """Whether each row's state is its draft state, (B,) bool."""
        state, drafts = self.state, self.drafts
        same_table = (state.table == drafts.table).all(-1)
        return (state.canvas == drafts.canvas).all(-1) & same_table

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
