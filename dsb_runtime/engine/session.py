"""A session: a batch that is being decoded, and which step it needs next."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsb_kernels.commit import block_of, next_prefix, tokens_due
from dsb_kernels.rows import Column, Row, StepKind, UnmaskSpec
from dsb_runtime.engine.graphs import Capture, refresh_class, row_class, width_class
from dsb_runtime.engine.step import DecodeState, Step, StepShape


@dataclass
class Session:
    """The state of a batch of one shape and the steps over it."""

    step: Step
    capture: Capture | None
    replays: dict[StepShape, Callable[[], None]] = field(default_factory=dict)

    @property
    def captured(self) -> bool:
        """Whether steps are captured, for which capacities are rounded up."""
        return self.capture is not None

    @property
    def state(self) -> DecodeState:
        return self.step.state


def width_of(session: Session, row: Row, kind: StepKind) -> int:
    """How many positions of a row a step of this kind computes."""
    if kind == StepKind.REFRESH:
        return row.context
    if kind == StepKind.RESPONSE:
        first = max(row.response_start - int(session.step.info.family.shift), row.leftpad)
        return row.response_end - first
    end = min(row.end + session.step.config.suffix_window, session.state.canvas.shape[1])
    return end - row.start + row.prefix


def capacity_for(
    session: Session,
    kind: StepKind,
    rows: Sequence[Row],
    drafts: Sequence[Row] = (),
    width: int | None = None,
) -> StepShape:
    """The capacity of a step of this kind for these rows and draft states. `width` is how many
    positions of a row it computes; None means as many as they need now."""
    every = (*rows, *drafts)
    if width is None:
        width = max(width_of(session, row, kind) for row in every)
    if not session.captured:
        most = max(row.num_candidates for row in every)
        return StepShape(kind, len(rows), width, most, len(drafts))
    batch, length = session.state.canvas.shape
    classes = width_class if kind == StepKind.WINDOW else refresh_class
    width = classes(width, length)
    num_rows = row_class(len(rows), batch)
    # Every row may have a draft, so that steps with fewer drafts need no captures of their own.
    num_drafts = num_rows if kind == session.step.draft_kind else 0
    return StepShape(kind, num_rows, width, session.state.position.shape[1], num_drafts)


def next_step(session: Session, table: list[Row], drafts: Sequence[Row] = ()) -> StepShape | None:
    """The step that the rows need now, or None if every row is done. Refreshes come first, so that
    the rows that were refreshed then share window steps with the others. `drafts` is the table of
    the draft states."""
    for kind in (StepKind.REFRESH, StepKind.RESPONSE, StepKind.WINDOW):
        rows = [row for row in table if row.next_kind == kind]
        if rows:
            beside = [row for row in drafts if row.next_kind == kind]
            return capacity_for(session, kind, rows, beside)
    return None


def next_commits(
    spec: UnmaskSpec, rows: dict[Column, Tensor], recent: int
) -> tuple[Tensor, Tensor]:
    """The fewest and the most tokens that each row is expected to commit in its next step, (B,)
    each. Where the rule does not say that, recent steps have committed `recent` at most."""
    fewest, most = torch.ones_like(rows[Column.START]), torch.full_like(rows[Column.START], recent)
    if spec.rule == "quota":
        fewest = most = tokens_due(rows, spec).clamp(min=1)
    if spec.refresh_commit == "first":
        refreshes = rows[Column.NEXT_KIND] != StepKind.WINDOW
        fewest, most = (x.masked_fill(refreshes, 1) for x in (fewest, most))
    return fewest, most


def next_widths(
    session: Session, rows: dict[Column, Tensor], fewest: Tensor, most: Tensor
) -> tuple[int, int]:
    """The least and the most positions that the widest window of these rows can have after they
    have committed `fewest` to `most` tokens (B,).

    The definitions of `unmask_and_slide` say where a window stands, once it is known how many
    tokens were committed and which mask is the first. A window is widest where the block stays or
    moves as far as it can, and narrowest where it moves by the prefix that a window has anyhow.
    """
    spec, length = session.step.spec, session.state.canvas.shape[1]
    # The block moves up to the first mask: past all tokens that stand in it, if they come first.
    masks = (rows[Column.NUM_CANDIDATES] - most).clamp(min=0)
    furthest = rows[Column.END] - rows[Column.START] - masks
    no_refresh = torch.zeros_like(furthest, dtype=torch.bool)
    widths = []
    moves = (torch.zeros_like(furthest), furthest.clamp(max=spec.prefix_window), furthest)
    for move, new in itertools.product(moves, (fewest, most)):
        first_masked, unmasked = rows[Column.START] + move, rows[Column.UNMASKED] + new
        slid = rows | {Column.START: first_masked, Column.UNMASKED: unmasked}
        start, end = block_of(slid, spec)
        end = (end + session.step.config.suffix_window).clamp(max=length)
        widths.append(end - start + next_prefix(rows, start, no_refresh, spec))
    narrowest, widest = torch.stack(widths).aminmax(dim=0)
    return int(narrowest.max()), int(widest.max())


def speculate(
    session: Session, table: list[Row], launched: StepShape, recent: int
) -> StepShape | None:
    """The step that almost certainly follows `launched`, or None if the host must wait.

    The guess is right unless a row stops at an EOS or commits more tokens than was expected. If it
    is not certain which width class the next window needs, there is none: a right guess saves 30 to
    80 us of the host's, and a step in vain costs milliseconds, as do a few steps of a wider class.

    Args:
        table: the row table that `launched` began with.
        recent: the most tokens that a recent step has committed in one row.
    """
    config, spec = session.step.config, session.step.spec
    taking_part = [row for row in table if row.next_kind != StepKind.NOTHING]
    if not session.captured or len(taking_part) > launched.num_rows:
        return None
    if any(row.next_kind != launched.kind for row in taking_part):
        return None
    values = torch.tensor([list(vars(row).values()) for row in taking_part])
    rows = dict(zip(Column, values.unbind(1), strict=True))
    fewest, most = next_commits(spec, rows, recent)
    masks_left = rows[Column.RESPONSE_END] - rows[Column.RESPONSE_START] - rows[Column.UNMASKED]
    if bool((masks_left <= most).any()):
        return None  # a row may be done
    if config.cache == "none":
        return launched  # with cache="none" every step is a refresh
    is_window = launched.kind == StepKind.WINDOW
    since_refresh = rows[Column.SINCE_REFRESH] if is_window else torch.zeros_like(most)
    if bool((since_refresh + most >= config.block_length).any()):
        return None  # a refresh may be due
    # A draft state is one more step ahead.
    ahead = most if session.step.draft_kind is None else 2 * most
    narrow, wide = next_widths(session, rows, fewest, ahead)
    guess = capacity_for(session, StepKind.WINDOW, taking_part, width=wide)
    return guess if guess.width == width_class(narrow, session.state.canvas.shape[1]) else None
