"""The kernel of `unmask_and_slide`: one program for each row of the batch.

A program keeps its row's candidates in registers, BLOCK_K of them, and reads the response in pieces
of BLOCK_L positions. Where a row skips a loop, the loop's range is empty: the mask of a vector load
cannot hold a scalar condition under Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

from dsb_kernels._configs import Config, configuration
from dsb_kernels._launch import launch_options, wait_for_previous, wrap_triton
from dsb_kernels._op import constant, jit, tl, triton
from dsb_kernels.rows import NUM_COLUMNS, Column, StepKind, UnmaskSpec

WINDOW = constant(StepKind.WINDOW)
REFRESH = constant(StepKind.REFRESH)
RESPONSE = constant(StepKind.RESPONSE)
NOTHING = constant(StepKind.NOTHING)
COLUMNS = constant(NUM_COLUMNS)
NEXT_KIND = constant(Column.NEXT_KIND)
START = constant(Column.START)
END = constant(Column.END)
PREFIX = constant(Column.PREFIX)
NUM_CANDIDATES = constant(Column.NUM_CANDIDATES)
LEFTPAD = constant(Column.LEFTPAD)
UNMASKED = constant(Column.UNMASKED)
SINCE_REFRESH = constant(Column.SINCE_REFRESH)
STEP = constant(Column.STEP)
REFRESHES = constant(Column.REFRESHES)
FORWARDS = constant(Column.FORWARDS)
TOOK_PART = constant(Column.TOOK_PART)
NEW = constant(Column.NEW)
FAILED = constant(Column.FAILED)
RESPONSE_START = constant(Column.RESPONSE_START)
RESPONSE_END = constant(Column.RESPONSE_END)
PLANNED = constant(Column.PLANNED)


@jit
def _valid_candidates(position, k, num_scored, canvas_ptr, end, mask_id):
    """Whether candidates `k` at `position` may be committed: scored, masked, before `end`."""
    valid = (k < num_scored) & (position >= 0) & (position < end)
    return valid & (tl.load(canvas_ptr + position, mask=valid, other=0) == mask_id)


@jit
def _rank_candidates(
    c, k, num_scored, position_ptr, confidence_ptr, canvas_ptr, K, end, mask_id,
    RULE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Each candidate's rank, which is 1 for the largest confidence, and the sum of the confidences
    that rank before it (frechet and eb only). It is compared with BLOCK_J candidates at a time."""
    rank = tl.full((BLOCK_K,), 1, tl.int32)
    total_before = tl.zeros((BLOCK_K,), tl.float64)
    for base in range(0, K, BLOCK_J):
        j = base + tl.arange(0, BLOCK_J)
        position = tl.load(position_ptr + j, mask=j < K, other=-1)
        valid = _valid_candidates(position, j, num_scored, canvas_ptr, end, mask_id)
        cj = tl.load(confidence_ptr + j, mask=valid, other=float("-inf"))[None, :]
        precedes = (cj > c[:, None]) | ((cj == c[:, None]) & (j[None, :] < k[:, None]))
        precedes = precedes & valid[None, :]
        rank += tl.sum(precedes.to(tl.int32), 1)
        # In float64 the order of adding changes the last digits of a sum at most.
        if RULE == "frechet" or RULE == "eb":
            total_before += tl.sum(tl.where(precedes, cj.to(tl.float64), 0.0), 1)
    return rank, total_before


@jit
def _commit_count(
    c, rank, total, valid, m, K, due, block_size, RULE: tl.constexpr, RULE_VALUE: tl.constexpr,
    PROGRESS: tl.constexpr,
):  # fmt: skip
    """How many of the best-ranked candidates the rule commits. The caller raises that to 1; the
    ranks themselves end at m.

    `c` are the confidences in float64, -inf where not valid. `total` is, for each candidate, the
    sum of its confidence and of all that rank before it. A new rule is one more branch.
    """
    # Triton 3.6 rounds a literal to float32 before it meets a float64 tensor.
    value = tl.full(c.shape, RULE_VALUE, tl.float64)
    if RULE == "threshold":
        if PROGRESS > 0:
            share = m.to(tl.float64) / tl.maximum(block_size, 1).to(tl.float64)
            value *= 1.0 - tl.full(c.shape, PROGRESS, tl.float64) * (1.0 - share)
        count = tl.sum((c >= value).to(tl.int32), 0)
    elif RULE == "quota":
        count = due
    elif RULE == "factor":
        bound = tl.where(rank == 1, -1.0, 1.0 - value / (rank + 1).to(tl.float64))
        first = tl.min(tl.where(valid & (c < bound), rank, K + 1), 0)
        count = tl.where(first >= m, m, first - 1)
    elif RULE == "frechet":
        bound = total - (rank - 1).to(tl.float64) - (1.0 - c)
        count = tl.sum((valid & (bound > value)).to(tl.int32), 0)
    elif RULE == "entropy":
        count = tl.sum((c >= -value).to(tl.int32), 0)
    elif RULE == "eb":
        count = tl.sum((valid & (total - c >= -value)).to(tl.int32), 0)
    else:
        tl.static_assert(False, "no branch of _commit_count for this rule")
    return count


@jit
def _tokens_due(table_ptr, step, masks_left, steps, SCHEDULE: tl.constexpr):
    """How many tokens the step must commit to meet the plan of the quota, which includes those that
    earlier steps could not commit. The response has `masks_left` masks."""
    masks = tl.load(table_ptr + PLANNED)  # those that the plan covers
    if SCHEDULE == "naive":  # it covers a block
        masks_left = tl.load(table_ptr + NUM_CANDIDATES)
    planned = (step + 1) * (masks // steps) + tl.minimum(step + 1, masks % steps)
    return tl.where(step + 1 >= steps, masks, planned) - (masks - masks_left)


@jit
def _first_mask_and_eos(
    canvas_ptr, begin, stop, last, mask_id, EOS_IDS: tl.constexpr, BLOCK_L: tl.constexpr
):
    """The first mask and the first EOS of the response [begin, last) before `stop`; each is `last`
    where there is none."""
    first_masked = last
    first_eos = last
    for base in range(begin // BLOCK_L * BLOCK_L, stop, BLOCK_L):
        index = base + tl.arange(0, BLOCK_L)
        inside = (index >= begin) & (index < stop)
        piece = tl.load(canvas_ptr + index, mask=inside, other=-1)
        masked = inside & (piece == mask_id)
        first_masked = tl.minimum(first_masked, tl.min(tl.where(masked, index, last), 0))
        for i in tl.static_range(len(EOS_IDS)):
            eos = inside & (piece == EOS_IDS[i])
            first_eos = tl.minimum(first_eos, tl.min(tl.where(eos, index, last), 0))
    return first_masked, first_eos


@jit
def _slide(first_masked, old_start, unmasked, begin, last, size, max_size, SCHEDULE: tl.constexpr):
    """The new block [start, end), and whether the plan of a quota goes on."""
    if SCHEDULE == "naive":
        start = begin + (first_masked - begin) // size * size
        start = tl.where(first_masked >= last, last, start)
        end = tl.minimum(start + size, last)
        same_plan = start == old_start
    else:
        start = first_masked
        end = tl.minimum(tl.minimum(begin + size + unmasked, last), first_masked + max_size)
        same_plan = start == start
    return start, end, same_plan


@jit
def _plan(
    start, old_start, old_prefix, since_refresh, was_refresh, leftpad, size, prefix_window,
    min_prefix, CACHE: tl.constexpr,
):  # fmt: skip
    """Whether the next step is a refresh, and the prefix that it computes if it is not."""
    if CACHE == "none":
        refresh = since_refresh >= 0
        prefix = 0
    else:
        refresh = since_refresh >= size
        if CACHE == "dsb":
            prefix = tl.maximum(start - old_start, prefix_window)
        elif CACHE == "dual":  # the prefix begins where the block began when it was refreshed
            prefix = tl.where(was_refresh, 0, old_prefix) + start - old_start
            prefix = tl.maximum(tl.where(refresh, 0, prefix), min_prefix)
        else:
            tl.static_assert(False, "no branch of _plan for this cache policy")
        prefix = tl.minimum(prefix, start - leftpad)
    return refresh, prefix


@jit
def _list_candidates(
    position_ptr, canvas_ptr, first_masked, stop, num, mask_id,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Write the first `num` masked positions before `stop` in ascending order, then -1. Returns how
    many of these `num` are positions."""
    num_candidates = 0
    for base in range(first_masked // BLOCK_L * BLOCK_L, stop, BLOCK_L):
        index = base + tl.arange(0, BLOCK_L)
        inside = (index >= first_masked) & (index < stop)
        masked = inside & (tl.load(canvas_ptr + index, mask=inside, other=-1) == mask_id)
        slot = num_candidates + tl.cumsum(masked.to(tl.int32), 0) - 1
        tl.store(position_ptr + slot, index, mask=masked & (slot < num))
        num_candidates += tl.sum(masked.to(tl.int32), 0)
    k = tl.arange(0, BLOCK_K)
    tl.store(position_ptr + k, k * 0 - 1, mask=(k >= num_candidates) & (k < num))
    return tl.minimum(num_candidates, num)


@jit
def _fill_after_eos(canvas_ptr, first_eos, stopped, last, BLOCK_L: tl.constexpr):
    """If the row has `stopped`, write its first EOS over the rest of the response."""
    eos = tl.load(canvas_ptr + first_eos, mask=stopped, other=0)
    for base in range(tl.where(stopped, first_eos // BLOCK_L * BLOCK_L, last), last, BLOCK_L):
        index = base + tl.arange(0, BLOCK_L)
        tl.store(canvas_ptr + index, eos, mask=(index > first_eos) & (index < last))


@jit
def _scored_row(rows_ptr, b, num_rows, BLOCK_R: tl.constexpr):
    """Where batch row `b` stands among those that were scored, and whether it is one of them."""
    r, is_scored = b, 1
    if rows_ptr is not None:
        each = tl.arange(0, BLOCK_R)
        is_mine = tl.load(rows_ptr + each, mask=each < num_rows, other=-1) == b
        is_scored = tl.sum(is_mine.to(tl.int32), 0)
        r = tl.sum(tl.where(is_mine, each, 0), 0).to(tl.int64)
    return r, is_scored


@jit
def _store_counts(table_ptr, moved, failed, takes_part, new, unmasked, since_refresh, refreshes):
    """Store what the step has counted. TOOK_PART, NEW and FAILED describe the step, and so they
    change for a row that did not move as well."""
    tl.store(table_ptr + UNMASKED, unmasked, mask=moved)
    tl.store(table_ptr + SINCE_REFRESH, since_refresh, mask=moved)
    tl.store(table_ptr + REFRESHES, refreshes, mask=moved)
    tl.store(table_ptr + FORWARDS, tl.load(table_ptr + FORWARDS) + 1, mask=moved)
    tl.store(table_ptr + TOOK_PART, takes_part.to(tl.int32))
    tl.store(table_ptr + NEW, new)
    tl.store(table_ptr + FAILED, 1, mask=failed)


@jit
def _unmask_kernel(
    canvas_ptr, table_ptr, position_ptr, commit_ptr, candidate_confidence_ptr,
    token_ptr, confidence_ptr, active_ptr, rows_ptr,
    stride_cb, K, num_rows, num_scored, size, max_size, prefix_window, min_prefix, steps, mask_id,
    full_every,
    SCHEDULE: tl.constexpr, CACHE: tl.constexpr, RULE: tl.constexpr, RULE_VALUE: tl.constexpr,
    PROGRESS: tl.constexpr, REFRESH_FIRST: tl.constexpr, EOS_IDS: tl.constexpr,
    EOS_BOUND: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Program (batch row): select, commit, slide and plan. EOS_IDS is empty if no EOS stops."""
    wait_for_previous(PDL)
    b = tl.program_id(0).to(tl.int64)
    r, is_scored = _scored_row(rows_ptr, b, num_rows, BLOCK_R)
    canvas_ptr, table_ptr = canvas_ptr + b * stride_cb, table_ptr + b * COLUMNS
    position_ptr, confidence_ptr = position_ptr + b * K, confidence_ptr + r * num_scored
    old_kind, old_end = tl.load(table_ptr + NEXT_KIND), tl.load(table_ptr + END)
    was_refresh = old_kind != WINDOW
    active = tl.load(active_ptr + r, mask=is_scored != 0, other=0)
    takes_part = (active != 0) & (old_kind != NOTHING)

    # Select.
    k = tl.arange(0, BLOCK_K)
    scored = tl.where(takes_part, num_scored, 0)
    position = tl.load(position_ptr + k, mask=k < K, other=-1)
    c = tl.load(confidence_ptr + k, mask=k < scored, other=0.0)
    tl.store(candidate_confidence_ptr + b * K + k, c, mask=k < K)
    valid = _valid_candidates(position, k, scored, canvas_ptr, old_end, mask_id)
    c = tl.where(valid, c, float("-inf"))
    failed = tl.max((c != c).to(tl.int32), 0) > 0
    moved = takes_part & (failed == 0)
    scored = tl.where(moved, num_scored, 0)
    valid = valid & (k < scored)
    rank, total_before = _rank_candidates(
        c, k, scored, position_ptr, confidence_ptr, canvas_ptr, K, old_end, mask_id, RULE, BLOCK_K,
        BLOCK_J,
    )  # fmt: skip
    c = tl.where(valid, c, float("-inf")).to(tl.float64)
    begin, last = tl.load(table_ptr + RESPONSE_START), tl.load(table_ptr + RESPONSE_END)
    old_start, old_step = tl.load(table_ptr + START), tl.load(table_ptr + STEP)
    old_unmasked = tl.load(table_ptr + UNMASKED)
    due = 0
    if RULE == "quota":
        due = _tokens_due(table_ptr, old_step, last - begin - old_unmasked, steps, SCHEDULE)
    m = tl.sum(valid.to(tl.int32), 0)
    total = total_before + c
    count = _commit_count(
        c, rank, total, valid, m, K, due, old_end - old_start, RULE, RULE_VALUE, PROGRESS
    )
    commit = valid & (rank <= tl.maximum(count, 1))
    if REFRESH_FIRST:
        first = tl.min(tl.where(valid, k, K), 0)
        commit = tl.where(was_refresh, valid & (k == first), commit)

    # Commit. Columns of a row that did not move stay as they are.
    token = tl.load(token_ptr + r * num_scored + k, mask=commit, other=0)
    tl.debug_barrier()  # every thread has read the masks that are overwritten here
    tl.store(canvas_ptr + position, token, mask=commit)
    tl.store(commit_ptr + b * K + k, commit, mask=k < K)
    new = tl.sum(commit.to(tl.int32), 0)
    tl.debug_barrier()  # the canvas is read again, by other threads
    unmasked = old_unmasked + new
    since_refresh = tl.where(was_refresh, 0, tl.load(table_ptr + SINCE_REFRESH)) + new
    refreshes = tl.load(table_ptr + REFRESHES) + was_refresh.to(tl.int32)
    _store_counts(table_ptr, moved, failed, takes_part, new, unmasked, since_refresh, refreshes)

    # Slide.
    stop = tl.where(moved, last, 0)
    first_masked, first_eos = _first_mask_and_eos(
        canvas_ptr, begin, stop, last, mask_id, EOS_IDS, BLOCK_L
    )
    start, end, same_plan = _slide(
        first_masked, old_start, unmasked, begin, last, size, max_size, SCHEDULE
    )
    if EOS_BOUND:
        end = tl.minimum(end, first_eos + 1)
    step = tl.where(same_plan, old_step + 1, 0)
    tl.store(table_ptr + START, start, mask=moved)
    tl.store(table_ptr + END, end, mask=moved)
    tl.store(table_ptr + STEP, step, mask=moved)

    # Plan.
    refresh, prefix = _plan(
        start, old_start, tl.load(table_ptr + PREFIX), since_refresh, was_refresh,
        tl.load(table_ptr + LEFTPAD), size, prefix_window, min_prefix, CACHE,
    )  # fmt: skip
    stopped = moved & (first_eos < first_masked)
    done = (first_masked >= last) | stopped
    next_kind = tl.where(refreshes % full_every != 0, RESPONSE, REFRESH)
    next_kind = tl.where(done, NOTHING, tl.where(refresh, next_kind, WINDOW))
    tl.store(table_ptr + PREFIX, prefix, mask=moved)
    tl.store(table_ptr + NEXT_KIND, next_kind, mask=moved)
    stop = tl.where(moved & (done == 0), end, 0)
    num_candidates = _list_candidates(
        position_ptr, canvas_ptr, first_masked, stop, tl.where(moved, K, 0), mask_id, BLOCK_K,
        BLOCK_L,
    )  # fmt: skip
    tl.store(table_ptr + NUM_CANDIDATES, num_candidates, mask=moved)
    tl.store(table_ptr + PLANNED, num_candidates, mask=moved & (same_plan == 0))
    if len(EOS_IDS) > 0:
        _fill_after_eos(canvas_ptr, first_eos, stopped, last, BLOCK_L)


def launch(a: Any) -> None:
    """Launch the kernel on the arguments of `unmask_and_slide`."""
    (B, K), L, spec = a.position.shape, a.canvas.shape[1], a.spec
    if B == 0:
        return
    config = config_of(K)
    wrap_triton(_unmask_kernel)[(B,)](
        a.canvas, a.table, a.position, a.commit, a.candidate_confidence, a.token, a.confidence,
        a.active, a.rows, a.canvas.stride(0), K, *a.confidence.shape, spec.block_length,
        min(spec.max_block_length or L, L), spec.prefix_window, spec.min_prefix,
        max(spec.steps, 1), spec.mask_id, spec.full_every,
        **constants(K, len(a.confidence), spec),
        **launch_options(config.num_warps, config.num_stages),
    )  # fmt: skip


def config_of(K: int) -> Config:
    """The configuration for K candidates a row. Every batch and architecture takes the same."""
    return configuration("unmask_and_slide", K, "any")


def constants(K: int, num_rows: int, spec: UnmaskSpec) -> dict[str, object]:
    """The kernel's compile-time arguments for a step that has scored `num_rows` rows."""
    return {
        "SCHEDULE": spec.schedule,
        "CACHE": spec.cache,
        "RULE": spec.rule,
        "RULE_VALUE": float(spec.rule_value),  # a runtime float would be rounded to float32
        "PROGRESS": float(spec.progress),
        "REFRESH_FIRST": spec.refresh_commit == "first",
        "EOS_IDS": spec.eos_ids if spec.stop_at_eos else (),
        "EOS_BOUND": spec.eos_bound,
        "BLOCK_K": triton.next_power_of_2(K),
        "BLOCK_R": triton.next_power_of_2(max(num_rows, 1)),
        **config_of(K).blocks,
    }
