"""The Triton kernel of unmask_and_slide: one launch per step, one program per batch row.

It restates the definition in `dsb_kernels.commit` without sharing code with it. Sorting is by
counting: a candidate's rank is one more than the number of candidates before it in the order
(confidence descending, then position ascending).
"""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor

from dsb_kernels._configs import Config, configuration
from dsb_kernels._op import jit, launch_options, tl, triton, wrap_triton
from dsb_kernels.rows import NOTHING as _NOTHING
from dsb_kernels.rows import REFRESH as _REFRESH
from dsb_kernels.rows import RESPONSE as _RESPONSE
from dsb_kernels.rows import WINDOW as _WINDOW
from dsb_kernels.rows import UnmaskSpec, WindowState

# Kernels read constants of their module only as such.
WINDOW, REFRESH, RESPONSE, NOTHING = (
    tl.constexpr(value) if tl else value for value in (_WINDOW, _REFRESH, _RESPONSE, _NOTHING)
)


@jit
def _valid_candidates(at, k, scored, canvas_ptr, end, mask_id):
    """Whether candidates `k` at canvas `at` may be committed: scored, masked, before `end`."""
    held = (k < scored) & (at >= 0) & (at < end)
    return held & (tl.load(canvas_ptr + at, mask=held, other=0) == mask_id)


@jit
def _commit_count(
    c, rank, total_before, valid, m, K, due, RULE: tl.constexpr, RULE_VALUE: tl.constexpr
):
    """How many of the best-ranked candidates the rule commits, before the bounds 1 and m.

    c: confidences (float64), -inf where not valid; total_before: the sum of the confidences of
    rank at most one's own. A new rule is one more branch.
    """
    # Triton 3.6 rounds a literal to float32 before it meets a float64 tensor.
    value = tl.full(c.shape, RULE_VALUE, tl.float64)
    if RULE == "threshold":
        count = tl.sum((c >= value).to(tl.int32), 0)
    elif RULE == "quota":
        count = due
    elif RULE == "factor":
        bound = tl.where(rank == 1, -1.0, 1.0 - value / (rank + 1).to(tl.float64))
        first = tl.min(tl.where(valid & (c < bound), rank, K + 1), 0)
        count = tl.where(first >= m, m, first - 1)
    else:
        tl.static_assert(RULE == "frechet")
        bound = total_before - (rank - 1).to(tl.float64) - (1.0 - c)
        count = tl.sum((valid & (bound > value)).to(tl.int32), 0)
    return count


@jit
def _unmask_kernel(
    canvas_ptr, token_ptr, confidence_ptr,
    start_ptr, end_ptr, prefix_ptr, committed_ptr, since_ptr, step_ptr, refreshes_ptr,
    forwards_ptr, needs_ptr, refresh_ptr, done_ptr, failed_ptr, position_ptr,
    commit_ptr, scored_ptr, flags_ptr, active_ptr, leftpad_ptr, rows_ptr,
    stride_cb, L, K, rows, width, prompt, size, max_size, prefix_window, min_prefix, steps,
    mask_id, full_every,
    SCHEDULE: tl.constexpr, CACHE: tl.constexpr, RULE: tl.constexpr, RULE_VALUE: tl.constexpr,
    BOUNDED: tl.constexpr, REFRESH_FIRST: tl.constexpr, EOS_IDS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: one row of the batch, whether it was scored or not. Candidates are held in
    registers, BLOCK_K of them; the response is read in pieces of BLOCK_L. EOS_IDS is empty where
    a row does not stop at an EOS."""
    b = tl.program_id(0).to(tl.int64)
    # Where the row stands among those that were scored; nowhere: `listed` is 0.
    at_row = b
    listed = 1
    if rows_ptr is not None:
        r = tl.arange(0, BLOCK_R)
        here = tl.load(rows_ptr + r, mask=r < rows, other=-1) == b
        listed = tl.sum(here.to(tl.int32), 0)
        at_row = tl.sum(tl.where(here, r, 0), 0).to(tl.int64)
    canvas_ptr += b * stride_cb
    position_ptr += b * K
    confidence_ptr += at_row * width
    old_start = tl.load(start_ptr + b)
    old_end = tl.load(end_ptr + b)
    old_step = tl.load(step_ptr + b)
    old_committed = tl.load(committed_ptr + b)
    old_refresh = tl.load(refresh_ptr + b) != 0
    active = tl.load(active_ptr + at_row, mask=listed != 0, other=0)
    takes_part = (active != 0) & (tl.load(done_ptr + b) == 0)

    # Select: rank every candidate against pieces of BLOCK_J candidates. What a row does not do is
    # an empty range: a scalar condition in a vector mask is more than Triton's interpreter takes.
    k = tl.arange(0, BLOCK_K)
    scored = tl.where(takes_part, width, 0)
    at = tl.load(position_ptr + k, mask=k < K, other=-1)
    c = tl.load(confidence_ptr + k, mask=k < scored, other=0.0)
    tl.store(scored_ptr + b * K + k, c, mask=k < K)
    valid = _valid_candidates(at, k, scored, canvas_ptr, old_end, mask_id)
    c = tl.where(valid, c, float("-inf"))
    failed = tl.max((c != c).to(tl.int32), 0) > 0
    moved = takes_part & (failed == 0)
    scored = tl.where(moved, width, 0)
    valid = valid & (k < scored)
    m = tl.sum(valid.to(tl.int32), 0)
    rank = tl.full((BLOCK_K,), 1, tl.int32)
    total_before = tl.zeros((BLOCK_K,), tl.float64)
    for base in range(0, K, BLOCK_J):
        j = base + tl.arange(0, BLOCK_J)
        at_j = tl.load(position_ptr + j, mask=j < K, other=-1)
        other = _valid_candidates(at_j, j, scored, canvas_ptr, old_end, mask_id)
        cj = tl.load(confidence_ptr + j, mask=other, other=float("-inf"))[None, :]
        precedes = (cj > c[:, None]) | ((cj == c[:, None]) & (j[None, :] < k[:, None]))
        precedes = precedes & other[None, :]
        rank += tl.sum(precedes.to(tl.int32), 1)
        if RULE == "frechet":  # float64, so that the order of adding does not matter
            total_before += tl.sum(tl.where(precedes, cj.to(tl.float64), 0.0), 1)
    c = tl.where(valid, c, float("-inf")).to(tl.float64)

    due = 0
    if RULE == "quota":
        if SCHEDULE == "naive":
            masks = tl.minimum(tl.maximum(L - old_start, 0), size)
            so_far = old_committed - (old_start - prompt)
        else:
            masks = L - prompt
            so_far = old_committed
        planned = (old_step + 1) * (masks // steps) + tl.minimum(old_step + 1, masks % steps)
        due = tl.where(old_step + 1 >= steps, masks, planned) - so_far
    count = _commit_count(c, rank, total_before + c, valid, m, K, due, RULE, RULE_VALUE)
    commit = valid & (rank <= tl.maximum(count, 1))
    if REFRESH_FIRST:
        first = tl.min(tl.where(valid, k, K), 0)
        commit = tl.where(old_refresh, valid & (k == first), commit)
    token = tl.load(token_ptr + at_row * width + k, mask=commit, other=0)
    tl.debug_barrier()  # every thread has read the masks that are overwritten here
    tl.store(canvas_ptr + at, token, mask=commit)
    tl.store(commit_ptr + b * K + k, commit, mask=k < K)
    new = tl.sum(commit.to(tl.int32), 0)
    tl.debug_barrier()  # the canvas is read again, by other threads

    # The first mask and the first EOS of the response.
    first_masked = L
    first_eos = L
    stop = tl.where(moved, L, 0)
    for base in range(prompt // BLOCK_L * BLOCK_L, stop, BLOCK_L):
        index = base + tl.arange(0, BLOCK_L)
        inside = (index >= prompt) & (index < stop)
        piece = tl.load(canvas_ptr + index, mask=inside, other=-1)
        masked = inside & (piece == mask_id)
        first_masked = tl.minimum(first_masked, tl.min(tl.where(masked, index, L), 0))
        for i in tl.static_range(len(EOS_IDS)):
            eos = inside & (piece == EOS_IDS[i])
            first_eos = tl.minimum(first_eos, tl.min(tl.where(eos, index, L), 0))
    stopped = moved & (first_eos < first_masked)
    done = (first_masked >= L) | stopped

    # Slide.
    committed = old_committed + new
    if SCHEDULE == "naive":
        start = tl.where(first_masked >= L, L, prompt + (first_masked - prompt) // size * size)
        end = tl.minimum(start + size, L)
        step = tl.where(start != old_start, 0, old_step + 1)
    else:
        start = first_masked
        end = tl.minimum(prompt + size + committed, L)
        if BOUNDED:
            end = tl.minimum(end, first_masked + max_size)
        step = old_step + 1
    since = tl.where(old_refresh, 0, tl.load(since_ptr + b)) + new
    if CACHE == "none":
        refresh = moved
        prefix = 0
    else:
        refresh = since >= size
        if CACHE == "dsb":
            prefix = tl.maximum(start - old_start, prefix_window)
        else:
            # Dual: recompute from where the block stood at its refresh.
            prefix = tl.where(old_refresh, 0, tl.load(prefix_ptr + b)) + start - old_start
            prefix = tl.maximum(tl.where(refresh, 0, prefix), min_prefix)
        prefix = tl.minimum(prefix, start - tl.load(leftpad_ptr + b))
    tl.store(start_ptr + b, start, mask=moved)
    tl.store(end_ptr + b, end, mask=moved)
    tl.store(prefix_ptr + b, prefix, mask=moved)
    tl.store(committed_ptr + b, committed, mask=moved)
    tl.store(since_ptr + b, since, mask=moved)
    tl.store(step_ptr + b, step, mask=moved)
    refreshes = tl.load(refreshes_ptr + b) + old_refresh.to(tl.int32)
    tl.store(refreshes_ptr + b, refreshes, mask=moved)
    tl.store(forwards_ptr + b, tl.load(forwards_ptr + b) + 1, mask=moved)
    tl.store(refresh_ptr + b, refresh, mask=moved)
    tl.store(done_ptr + b, done, mask=moved)
    tl.store(failed_ptr + b, failed, mask=failed)
    kind = tl.where(refreshes % full_every != 0, RESPONSE, REFRESH)
    needs = tl.where(done, NOTHING, tl.where(refresh, kind, WINDOW))
    tl.store(needs_ptr + b, needs, mask=moved)

    # The next candidates, in order: the masked positions before the window's end.
    held = 0
    stop = tl.where(moved & (done == 0), end, 0)
    for base in range(first_masked // BLOCK_L * BLOCK_L, stop, BLOCK_L):
        index = base + tl.arange(0, BLOCK_L)
        inside = (index >= prompt) & (index < stop)
        masked = inside & (tl.load(canvas_ptr + index, mask=inside, other=-1) == mask_id)
        slot = held + tl.cumsum(masked.to(tl.int32), 0) - 1
        tl.store(position_ptr + slot, index, mask=masked & (slot < K))
        held += tl.sum(masked.to(tl.int32), 0)
    tl.store(position_ptr + k, k * 0 - 1, mask=(k >= held) & (k < tl.where(moved, K, 0)))

    # What the host wants to know, in the order of FLAGS. A row that did not move is as it was.
    flags_ptr += b * 10
    tl.store(flags_ptr, needs, mask=moved)
    tl.store(flags_ptr + 1, 1, mask=failed)
    tl.store(flags_ptr + 2, start, mask=moved)
    tl.store(flags_ptr + 3, end, mask=moved)
    tl.store(flags_ptr + 4, prefix, mask=moved)
    tl.store(flags_ptr + 5, tl.minimum(held, K), mask=moved)
    tl.store(flags_ptr + 6, since, mask=moved)
    tl.store(flags_ptr + 7, L - prompt - committed, mask=moved)
    tl.store(flags_ptr + 8, takes_part.to(tl.int32))
    tl.store(flags_ptr + 9, new)

    # After an EOS with no mask to its left comes nothing but that EOS.
    if len(EOS_IDS) > 0:
        fill = tl.load(canvas_ptr + first_eos, mask=stopped, other=0)
        for base in range(tl.where(stopped, first_eos // BLOCK_L * BLOCK_L, L), L, BLOCK_L):
            index = base + tl.arange(0, BLOCK_L)
            tl.store(canvas_ptr + index, fill, mask=(index > first_eos) & (index < L))


def launch(
    canvas: Tensor,
    token: Tensor,
    confidence: Tensor,
    state: WindowState,
    active: Tensor,
    leftpad: Tensor,
    spec: UnmaskSpec,
    rows: Tensor | None,
) -> None:
    """As `unmask_and_slide_definition`."""
    B, K = state.position.shape
    if B == 0:
        return
    wrap_triton(_unmask_kernel)[(B,)](
        canvas, token, confidence, *(getattr(state, f.name) for f in fields(state)),
        active, leftpad, rows,
        canvas.stride(0), canvas.shape[1], K, *confidence.shape, spec.prompt_length,
        spec.block_length, spec.max_block_length or 0, spec.prefix_window, spec.min_prefix,
        max(spec.steps, 1), spec.mask_id, spec.full_every,
        **constants(
            K, len(confidence), spec.schedule, spec.max_block_length, spec.cache, spec.rule,
            spec.rule_value, spec.refresh_commit, spec.eos_ids if spec.stop_at_eos else (),
        ),
        **launch_options(config_of(K).num_warps, config_of(K).num_stages),
    )  # fmt: skip


def config_of(K: int) -> Config:
    """The configuration for K candidates a row: one for every batch and architecture."""
    return configuration("unmask_and_slide", K, "any")


def constants(
    K: int,
    rows: int,
    schedule: str,
    max_block_length: int | None,
    cache: str,
    rule: str,
    rule_value: float,
    refresh_commit: str,
    eos_ids: tuple[int, ...],
) -> dict[str, object]:
    """The kernel's compile-time arguments."""
    return {
        "SCHEDULE": schedule,
        "CACHE": cache,
        "RULE": rule,
        "RULE_VALUE": float(rule_value),  # a runtime float would be rounded to float32
        "BOUNDED": max_block_length is not None,
        "REFRESH_FIRST": refresh_commit == "first",
        "EOS_IDS": eos_ids,
        "BLOCK_K": triton.next_power_of_2(K),
        "BLOCK_R": triton.next_power_of_2(rows),
        **config_of(K).blocks,
    }
