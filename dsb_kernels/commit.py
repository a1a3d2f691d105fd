"""unmask_and_slide: the last operation of a decoding step (DSB, arXiv 2602.05992).

For each batch row that takes part in the step:
    1. select   candidates by the rule (`dsb_kernels.rules`)
    2. commit   the tokens of the selected candidates
    3. slide    the block [start, end) to the first mask that remains
    4. plan     what the row needs next: a window step, a refresh, or nothing

`dsb_kernels.method` says the same for one row in plain Python: read that first. The kernel is in
`dsb_kernels.commit_kernel`.

Shapes: B batch rows, L canvas positions, K candidates of a row. The step has scored b of the rows
and the first k candidates of each.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsb_kernels._check import check_tensor
from dsb_kernels._op import op
from dsb_kernels.commit_kernel import launch
from dsb_kernels.rows import NUM_COLUMNS, Column, StepKind, UnmaskSpec
from dsb_kernels.rules import select

# --- definition -------------------------------------------------------------------------------


def in_batch(scored: Tensor, rows: Tensor | None, whole: Tensor) -> Tensor:
    """Put the values `scored`, (b,) or (b, k), at their batch rows. Returns a tensor of the shape
    of `whole`, (B,) or (B, K), which is 0 for everything that was not scored."""
    if rows is None and scored.shape == whole.shape:
        return scored
    values = torch.zeros_like(whole, dtype=scored.dtype)
    part = values if values.ndim == 1 else values[:, : scored.shape[1]]
    part[slice(None) if rows is None else rows.long()] = scored
    return values


def still_masked(canvas: Tensor, position: Tensor, end: Tensor, spec: UnmaskSpec) -> Tensor:
    """Whether each candidate is a mask before the block's end, (B, K) bool."""
    is_masked = canvas.gather(1, position.clamp(min=0).long()) == spec.mask_id
    return (position >= 0) & (position < end[:, None]) & is_masked


def masks_left(row: dict[Column, Tensor], spec: UnmaskSpec) -> Tensor:
    """How many of the masks that a plan covers are left: all, or with naive those of the block."""
    if spec.schedule == "naive":
        return row[Column.NUM_CANDIDATES]
    return row[Column.RESPONSE_END] - row[Column.RESPONSE_START] - row[Column.UNMASKED]


def tokens_due(row: dict[Column, Tensor], spec: UnmaskSpec) -> Tensor:
    """How many tokens each row must commit in this step to meet its plan, (B,) int64.

    The plan spreads m masks over k steps; each of the first m mod k steps takes one more than the
    others. If earlier steps had too few candidates to meet the plan, this step makes up for it.
    """
    masks, step, steps = row[Column.PLANNED], row[Column.STEP], max(spec.steps, 1)
    planned = (step + 1) * (masks // steps) + torch.minimum(step + 1, masks % steps)
    return torch.where(step + 1 >= steps, masks, planned) - (masks - masks_left(row, spec))


def masks_of(canvas: Tensor, row: dict[Column, Tensor], spec: UnmaskSpec) -> tuple[Tensor, Tensor]:
    """Which positions of the response are masked, (B, L) bool, and the first of them, which is the
    response's end where no mask remains, (B,)."""
    index = torch.arange(canvas.shape[1], device=canvas.device)
    masked = (canvas == spec.mask_id) & (index >= row[Column.RESPONSE_START][:, None])
    masked &= index < row[Column.RESPONSE_END][:, None]
    return masked, torch.where(masked, index, row[Column.RESPONSE_END][:, None]).amin(-1)


def rule_value(num_masks: Tensor, size: Tensor, spec: UnmaskSpec) -> float | Tensor:
    """The value of the rule. With `progress` (arXiv 2601.17917) the threshold falls with the share
    of the block that is masked: (B, 1), from (B,) masks in blocks of (B,) positions."""
    if spec.progress == 0.0:
        return spec.rule_value
    share = num_masks.double() / size.clamp(min=1)
    return (spec.rule_value * (1.0 - spec.progress * (1.0 - share)))[:, None]


def commit_tokens(canvas: Tensor, position: Tensor, token: Tensor, commit: Tensor) -> None:
    """Write the tokens of the candidates where `commit` is True into the canvas."""
    L = canvas.shape[1]
    index = torch.where(commit, position.long(), L)  # the canvas gets a column L, then loses it
    canvas.copy_(pad(canvas, (0, 1)).scatter(1, index, token)[:, :L])


def block_of(row: dict[Column, Tensor], spec: UnmaskSpec) -> tuple[Tensor, Tensor]:
    """The block [start, end) of each row. It follows from where the response stands, from the row's
    first masked position (the response's end where no mask remains), which is given as START, and
    from the number of response positions that are not masked."""
    begin, stop = row[Column.RESPONSE_START], row[Column.RESPONSE_END]
    first_masked, size = row[Column.START], spec.block_length
    if spec.schedule == "naive":
        start = begin + (first_masked - begin) // size * size
        start = torch.where(first_masked >= stop, stop, start)
        return start, (start + size).minimum(stop)
    end = (begin + size + row[Column.UNMASKED]).minimum(stop)
    if spec.max_block_length is not None:
        end = end.minimum(first_masked + spec.max_block_length)
    return first_masked, end


def next_prefix(
    old: dict[Column, Tensor], start: Tensor, refresh: Tensor, spec: UnmaskSpec
) -> Tensor:
    """How many positions before the block the next window step computes, (B,) int64.

    Args:
        old: the columns of the row table as the step began with them.
        start: (B,), where the block starts now.
        refresh: (B,) bool, whether the next step is a refresh.
    """
    if spec.cache == "none":
        return torch.zeros_like(start)
    distance = start - old[Column.START]
    if spec.cache == "dsb":
        prefix = distance.clamp(min=spec.prefix_window)
    elif spec.cache == "dual":  # the prefix begins where the block began at the last refresh
        was_refresh = old[Column.NEXT_KIND] != StepKind.WINDOW
        prefix = distance + old[Column.PREFIX].masked_fill(was_refresh, 0)
        prefix = prefix.masked_fill(refresh, 0).clamp(min=spec.min_prefix)
    else:
        raise NotImplementedError(f"cache={spec.cache!r}: next_prefix has no branch for it")
    return prefix.minimum(start - old[Column.LEFTPAD])


def kind_of(refresh: Tensor, refreshes: Tensor, done: Tensor, spec: UnmaskSpec) -> Tensor:
    """Which kind of step each row needs next, (B,) int64."""
    full = refreshes % spec.full_every == 0
    kind = torch.where(full, StepKind.REFRESH, StepKind.RESPONSE)
    kind = torch.where(refresh, kind, StepKind.WINDOW)
    return torch.where(done, StepKind.NOTHING, kind)


def first_candidates(masked: Tensor, end: Tensor, num: int) -> Tensor:
    """The first `num` masked positions before `end` in ascending order, then -1: (B, num) int32."""
    L = masked.shape[1]
    index = torch.arange(L, device=masked.device)
    key = torch.where(masked & (index < end[:, None]), index, L)
    key = key.topk(num, dim=-1, largest=False, sorted=True).values
    return torch.where(key < L, key, -1).int()


def first_eos_of(
    canvas: Tensor, row: dict[Column, Tensor], stop: Tensor, spec: UnmaskSpec
) -> Tensor:
    """The first EOS of each row's response before `stop` (B,), or L where there is none, (B,)."""
    L = canvas.shape[1]
    index = torch.arange(L, device=canvas.device)
    is_eos = torch.zeros_like(canvas, dtype=torch.bool)
    for eos_id in spec.eos_ids:
        is_eos |= canvas == eos_id
    is_eos &= (index >= row[Column.RESPONSE_START][:, None]) & (index < stop[:, None])
    return torch.where(is_eos, index, L).amin(-1)


def bounded(end: Tensor, canvas: Tensor, row: dict[Column, Tensor], spec: UnmaskSpec) -> Tensor:
    """Where the block ends (B,): with `eos_bound` behind the first EOS of the response at most."""
    if not spec.eos_bound:
        return end
    return end.minimum(first_eos_of(canvas, row, row[Column.RESPONSE_END], spec) + 1)


def fill_after_eos(
    canvas: Tensor, row: dict[Column, Tensor], first_masked: Tensor, moved: Tensor, spec: UnmaskSpec
) -> Tensor:
    """Find the rows that moved and whose response has its first EOS before its first mask. In these
    rows, write that EOS over the rest of the response. Returns whether each row is one of them,
    (B,) bool."""
    L, stop = canvas.shape[1], row[Column.RESPONSE_END]
    index = torch.arange(L, device=canvas.device)
    first_eos = first_eos_of(canvas, row, first_masked, spec)
    stopped = moved & (first_eos < L)
    eos = canvas.gather(1, first_eos.clamp(max=L - 1)[:, None])
    after = stopped[:, None] & (index > first_eos[:, None]) & (index < stop[:, None])
    canvas.copy_(torch.where(after, eos, canvas))
    return stopped


def unmask_and_slide_reference(
    canvas: Tensor,
    table: Tensor,
    position: Tensor,
    commit: Tensor,
    candidate_confidence: Tensor,
    token: Tensor,
    confidence: Tensor,
    active: Tensor,
    rows: Tensor | None,
    spec: UnmaskSpec,
) -> None:
    """Commit the selected candidates of every active row and slide its block, in place.

    Args:
        canvas: (B, L) int64, prompt and response, and what may follow it; committed tokens are
            written into it.
        table: (B, NUM_COLUMNS) int32, the row table (`dsb_kernels.rows.Column`), updated.
        position: (B, K) int32, the canvas positions of the candidates in ascending order, then -1.
            The op replaces them by those of the next step.
        commit: (B, K) bool. The op writes which of the candidates before the step it committed.
        candidate_confidence: (B, K) float32. The op writes the confidence of these candidates, and
            0 where none was scored.
        token: (b, k) int64, the proposed tokens of the first k <= K candidates of the b rows that
            were scored. The op never commits a later candidate.
        confidence: (b, k) float32, the confidence of these tokens, ignored where a row has no such
            candidate.
        active: (b,) bool, which of the scored rows take part. A row that is done never does.
        rows: (b,) int32, the batch row of each scored row, no row twice (not checked). None means
            all rows of the batch in their order.
        spec: the schedule, the cache policy, the rule and the ids.

    If a candidate's confidence is NaN, its row does not move: it commits nothing, keeps its block,
    and has 1 written into its FAILED column.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape, device or stride (the canvas may
            have any stride between rows, the others are contiguous), or the spec does not fit the
            canvas.
    """
    k = token.shape[1]
    old = dict(zip(Column, table.long().unbind(1), strict=True))
    was_refresh = old[Column.NEXT_KIND] != StepKind.WINDOW
    token, confidence = (in_batch(x, rows, position) for x in (token, confidence))
    is_done = old[Column.NEXT_KIND] == StepKind.NOTHING
    takes_part = in_batch(active, rows, was_refresh) & ~is_done
    candidate_confidence.copy_(confidence.where(takes_part[:, None], 0))

    # Select.
    valid = still_masked(canvas, position, old[Column.END], spec) & takes_part[:, None]
    valid[:, k:] = False
    failed = (valid & confidence.isnan()).any(-1)
    valid = valid & ~failed[:, None]
    due = tokens_due(old, spec)
    value = rule_value(valid.sum(-1), old[Column.END] - old[Column.START], spec)
    chosen = select(confidence, valid, due, spec.rule, value)
    if spec.refresh_commit == "first":
        first = valid & (valid.cumsum(-1) == 1)
        chosen = torch.where(was_refresh[:, None], first, chosen)

    # Commit.
    commit.copy_(chosen)
    commit_tokens(canvas, position, token, chosen)
    new = chosen.sum(-1)
    unmasked = old[Column.UNMASKED] + new
    since_refresh = old[Column.SINCE_REFRESH].masked_fill(was_refresh, 0) + new
    refreshes = old[Column.REFRESHES] + was_refresh

    # Slide.
    moved = takes_part & ~failed
    masked, first_masked = masks_of(canvas, old, spec)
    start, end = block_of(old | {Column.START: first_masked, Column.UNMASKED: unmasked}, spec)
    end = bounded(end, canvas, old, spec)
    same_plan = (start == old[Column.START]) | (spec.schedule != "naive")
    step = (old[Column.STEP] + 1).where(same_plan, 0)

    # Plan.
    refresh = (since_refresh >= spec.block_length) | (spec.cache == "none")
    prefix = next_prefix(old, start, refresh, spec)
    done = first_masked >= old[Column.RESPONSE_END]
    if spec.stop_at_eos:
        done = done | fill_after_eos(canvas, old, first_masked, moved, spec)
    next_kind = kind_of(refresh, refreshes, done, spec)
    next_position = first_candidates(masked & ~done[:, None], end, position.shape[1])
    position.copy_(torch.where(moved[:, None], next_position, position))
    num_candidates = (next_position >= 0).sum(-1)

    after = old | {
        Column.NEXT_KIND: next_kind, Column.START: start, Column.END: end, Column.PREFIX: prefix,
        Column.NUM_CANDIDATES: num_candidates, Column.UNMASKED: unmasked,
        Column.SINCE_REFRESH: since_refresh, Column.STEP: step, Column.REFRESHES: refreshes,
        Column.FORWARDS: old[Column.FORWARDS] + 1,
        Column.PLANNED: torch.where(same_plan, old[Column.PLANNED], num_candidates),
    }  # fmt: skip
    after_table = torch.stack([after[column] for column in Column], dim=1).int()
    table.copy_(torch.where(moved[:, None], after_table, table))
    # These three columns describe the step, and so they change for a row that did not move as well.
    table[:, Column.TOOK_PART] = takes_part.int()
    table[:, Column.NEW] = new.int()
    table[:, Column.FAILED] |= failed.int()


def initial_rows(canvas: Tensor, leftpad: Tensor, spec: UnmaskSpec) -> tuple[Tensor, Tensor]:
    """The row table and the candidates' positions before the first step, which is a refresh.

    The response of a row begins at its first mask and ends behind its last one. Tokens that are
    given between the two count as unmasked, as if they had been committed.

    Args:
        canvas: (B, L) int64, prompt and response, and what may follow it; every row has a mask.
        leftpad: (B,), how many padding positions stand before each prompt.

    Returns:
        `table`, (B, NUM_COLUMNS) int32, and `position`, (B, K) int32 with K the most candidates
        that a row may have.
    """
    B, L = canvas.shape
    index = torch.arange(L, device=canvas.device)
    zeros = torch.zeros(B, dtype=torch.int64, device=canvas.device)
    masked = (canvas == spec.mask_id) & (index >= leftpad[:, None])
    masks = masked.sum(-1)
    values = dict.fromkeys(Column, zeros) | {
        Column.NEXT_KIND: zeros + int(StepKind.REFRESH),
        Column.START: torch.where(masked, index, L).amin(-1),
        Column.LEFTPAD: leftpad,
        Column.RESPONSE_END: torch.where(masked, index, -1).amax(-1) + 1,
    }
    values[Column.RESPONSE_START] = values[Column.START]
    values[Column.UNMASKED] = values[Column.RESPONSE_END] - values[Column.START] - masks
    values[Column.START], end = block_of(values, spec)
    values[Column.END] = bounded(end, canvas, values, spec)
    values[Column.CONTEXT] = L - leftpad
    # The masks before the block's end are `block_length` at most, and as many more as there are
    # given tokens behind it.
    most = masks.minimum(spec.block_length + values[Column.UNMASKED])
    if spec.schedule == "naive" or spec.max_block_length is not None:
        most = most.clamp(max=spec.max_block_length or spec.block_length)
    position = first_candidates(masked, values[Column.END], int(most.max()))
    num_candidates = (position >= 0).sum(-1)
    values[Column.NUM_CANDIDATES] = num_candidates
    values[Column.PLANNED] = num_candidates if spec.schedule == "naive" else masks
    return torch.stack([values[column].int() for column in Column], dim=1), position


# --- op ---------------------------------------------------------------------------------------


def _check(a: Any) -> None:
    name = "unmask_and_slide"
    check_tensor(name, "canvas", a.canvas, dtype=torch.int64, shape=("B", "L"), unit_stride=True)
    B = len(a.canvas)
    check = functools.partial(check_tensor, name, device=a.canvas.device, contiguous=True)
    check("table", a.table, dtype=torch.int32, shape=(B, NUM_COLUMNS))
    check("position", a.position, dtype=torch.int32, shape=(B, "K"))
    K = a.position.shape[1]
    check("commit", a.commit, dtype=torch.bool, shape=(B, K))
    check("candidate_confidence", a.candidate_confidence, dtype=torch.float32, shape=(B, K))
    if a.rows is not None:
        check("rows", a.rows, dtype=torch.int32, shape=("b",))
    b = B if a.rows is None else len(a.rows)
    check("token", a.token, dtype=torch.int64, shape=(b, "k"))
    check("confidence", a.confidence, dtype=torch.float32, shape=a.token.shape)
    check("active", a.active, dtype=torch.bool, shape=(b,))
    if a.canvas.shape[1] < 1:
        raise ValueError(f"{name}: canvas has no positions: accepted is L >= 1")
    if K < 1:
        raise ValueError(f"{name}: position has no candidates: accepted is K >= 1")
    if not 1 <= a.token.shape[1] <= K:
        raise ValueError(
            f"{name}: token has {a.token.shape[1]} candidates a row: accepted are 1 to {K}"
        )


unmask_and_slide = op(
    unmask_and_slide_reference, launch=launch, check=_check,
    mutates_args=("canvas", "table", "position", "commit", "candidate_confidence"),
)  # fmt: skip
