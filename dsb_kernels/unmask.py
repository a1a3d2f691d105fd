"""unmask_and_slide: from confidences to the next decoding state (arXiv 2602.05992).

One step of the schedule for every row of a batch: pick which candidates to commit, write their
tokens into the canvas, slide the window, and say what the row needs next (a refresh, a window
step, or nothing). `L` = canvas length, `P` = where the response starts, `K` = candidates per row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsb_kernels.dispatch import (
    check_choice,
    check_tensor,
    register_op,
    takes_definition,
    use_triton,
)
from dsb_kernels.unmask_kernel import compile_cases as compile_cases
from dsb_kernels.unmask_kernel import launch
from dsb_kernels.window_state import UnmaskSpec, WindowState

SCHEDULES = ("dsb", "naive")
CACHES = ("dsb", "dual", "none")
REFRESH_COMMITS = ("select", "first")
INT_FIELDS = ("start", "end", "prefix", "committed", "since_refresh", "step")
BOOL_FIELDS = ("refresh", "done", "failed")


# --- selection rules: how many of the sorted candidates are committed -------------------------
# Each takes confidences sorted descending (B, K) float64 with -inf past the last candidate, their
# ranks 1..K, the number of candidates (B,), the rule's value, and the tokens due by the quota (B,).


def count_threshold(c: Tensor, rank: Tensor, m: Tensor, value: float, due: Tensor) -> Tensor:
    """Every confidence of at least `value`."""
    return (c >= value).sum(-1)


def count_quota(c: Tensor, rank: Tensor, m: Tensor, value: float, due: Tensor) -> Tensor:
    """A number fixed up front."""
    return due


def count_factor(c: Tensor, rank: Tensor, m: Tensor, value: float, due: Tensor) -> Tensor:
    """The ranks before the first c_(j) < 1 - value / (j + 1); all if none or the last fails."""
    bound = torch.where(rank == 1, -1.0, 1.0 - value / (rank + 1).double())
    fails = (c < bound) & (rank <= m[:, None])
    first = torch.where(fails, rank, c.shape[-1] + 1).amin(-1)
    return torch.where(first >= m, m, first - 1)


def count_frechet(c: Tensor, rank: Tensor, m: Tensor, value: float, due: Tensor) -> Tensor:
    """The ranks with sum_{j<=n} c_(j) - (n - 1) - (1 - c_(n)) > value (arXiv 2606.02955)."""
    bound = c.cumsum(-1) - (rank - 1) - (1.0 - c)
    return ((bound > value) & (rank <= m[:, None])).sum(-1)


RULES: dict[str, Callable[[Tensor, Tensor, Tensor, float, Tensor], Tensor]] = {
    "threshold": count_threshold,
    "quota": count_quota,
    "factor": count_factor,
    "frechet": count_frechet,
}


# --- definition -------------------------------------------------------------------------------


def quota_due(state: WindowState, spec: UnmaskSpec, length: int) -> Tensor:
    """Tokens to commit in this step so that the plan is met: m masks in k steps, the first m mod k
    steps taking one more. What a window could not supply earlier is carried over. (B,) int64."""
    step, committed = state.step.long(), state.committed.long()
    if spec.schedule == "naive":
        start = state.start.long()
        masks = (length - start).clamp(max=spec.block_length)
        committed = committed - (start - spec.prompt_length)
    else:
        masks = torch.full_like(committed, length - spec.prompt_length)
    steps = max(spec.steps, 1)
    planned = (step + 1) * (masks // steps) + torch.minimum(step + 1, masks % steps)
    return torch.where(step + 1 >= steps, masks, planned) - committed


def select(confidence: Tensor, valid: Tensor, due: Tensor, spec: UnmaskSpec) -> Tensor:
    """Which candidates the rule commits: (B, K) bool. Ties go to the lower position."""
    c = torch.where(valid, confidence.double(), -torch.inf)
    c, order = c.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(1, c.shape[-1] + 1, device=c.device)
    m = valid.sum(-1)
    count = RULES[spec.rule](c, rank, m, spec.rule_value, due).clamp(min=1).minimum(m)
    chosen = rank <= count[:, None]
    return torch.zeros_like(chosen).scatter(1, order, chosen) & valid


def window_of(first_masked: Tensor, committed: Tensor, length: int, spec: UnmaskSpec) -> tuple:
    """Active block [s, e) of each row, given its first masked position and commits so far."""
    prompt, size = spec.prompt_length, spec.block_length
    if spec.schedule == "naive":
        start = prompt + (first_masked - prompt) // size * size
        start = torch.where(first_masked >= length, length, start)
        return start, (start + size).clamp(max=length)
    end = (prompt + size + committed).clamp(max=length)
    if spec.max_block_length is not None:
        end = end.minimum(first_masked + spec.max_block_length)
    return first_masked, end


def candidates(masked: Tensor, end: Tensor, width: int) -> Tensor:
    """The first `width` masked positions before `end`, ascending, -1 beyond: (B, width) int32."""
    length = masked.shape[1]
    index = torch.arange(length, device=masked.device)
    key = torch.where(masked & (index < end[:, None]), index, length)
    key = key.topk(width, dim=-1, largest=False, sorted=True).values
    return torch.where(key < length, key, -1).int()


def unmask_and_slide_definition(
    canvas: Tensor,
    token: Tensor,
    confidence: Tensor,
    state: WindowState,
    active: Tensor,
    leftpad: Tensor,
    spec: UnmaskSpec,
) -> Tensor:
    length, prompt = canvas.shape[1], spec.prompt_length
    index = torch.arange(length, device=canvas.device)
    response = index >= prompt

    # Select among the candidates and commit them.
    at = state.position.long().clamp(min=0)
    is_masked = canvas.gather(1, at) == spec.mask_id
    valid = (state.position >= 0) & is_masked & (state.position < state.end[:, None])
    valid = valid & (active & ~state.done)[:, None]
    nan = (valid & confidence.isnan()).any(-1)
    valid = valid & ~nan[:, None]
    commit = select(confidence, valid, quota_due(state, spec, length), spec)
    if spec.refresh_commit == "first":
        first = valid & (valid.cumsum(-1) == 1)
        commit = torch.where(state.refresh[:, None], first, commit)
    # A padded candidate aliases index 0, so scatter by addition of (token - mask), zero elsewhere.
    delta = torch.where(commit, token - spec.mask_id, 0)
    canvas.scatter_add_(1, at, delta)

    # Slide the window of the rows that took part.
    moved = active & ~state.done & ~nan
    new = commit.sum(-1)
    committed = state.committed + new
    masked = (canvas == spec.mask_id) & response
    first_masked = torch.where(masked, index, length).amin(-1)
    start, end = window_of(first_masked, committed, length, spec)
    since = torch.where(state.refresh, 0, state.since_refresh) + new
    step = torch.where(
        (start != state.start) & (spec.schedule == "naive"), 0, state.step.long() + 1
    )
    distance = start - state.start
    if spec.cache == "none":
        refresh, prefix = torch.ones_like(state.refresh), torch.zeros_like(start)
    else:
        refresh = since >= spec.block_length
        if spec.cache == "dsb":
            prefix = distance.clamp(min=spec.prefix_window)
        else:  # dual: recompute from where the block stood at its refresh
            prefix = torch.where(state.refresh, 0, state.prefix) + distance
            prefix = prefix.masked_fill(refresh, 0).clamp(min=spec.min_prefix)
        prefix = prefix.minimum(start - leftpad)

    # A row is done when no mask is left, or at an EOS with no mask to its left.
    done = first_masked >= length
    if spec.stop_at_eos:
        eos = torch.zeros_like(masked)
        for eos_id in spec.eos_ids:
            eos |= canvas == eos_id
        eos &= response & (index < first_masked[:, None])
        eos_at = torch.where(eos, index, length).amin(-1)
        stopped = moved & (eos_at < length)
        fill = canvas.gather(1, eos_at.clamp(max=length - 1)[:, None])
        canvas.copy_(torch.where(stopped[:, None] & (index > eos_at[:, None]), fill, canvas))
        done = done | stopped
    position = candidates(masked & ~done[:, None], end, state.position.shape[1])

    for name, value in (
        ("start", start), ("end", end), ("prefix", prefix), ("committed", committed),
        ("since_refresh", since), ("step", step), ("refresh", refresh), ("done", done),
    ):  # fmt: skip
        old = getattr(state, name)
        old.copy_(torch.where(moved, value.to(old.dtype), old))
    state.position.copy_(torch.where(moved[:, None], position, state.position))
    state.failed.logical_or_(nan)
    return commit


def initial_state(canvas: Tensor, leftpad: Tensor, spec: UnmaskSpec) -> WindowState:
    """The state before the first step: everything masked, the first step is a refresh."""
    rows, length = canvas.shape
    zeros = torch.zeros(rows, dtype=torch.int32, device=canvas.device)
    masked = (canvas == spec.mask_id) & (
        torch.arange(length, device=canvas.device) >= spec.prompt_length
    )
    start, end = window_of(zeros.long() + spec.prompt_length, zeros.long(), length, spec)
    width = min(spec.block_length, length - spec.prompt_length)
    return WindowState(
        start=start.int(),
        end=end.int(),
        prefix=zeros.clone(),
        committed=zeros.clone(),
        since_refresh=zeros.clone(),
        step=zeros.clone(),
        refresh=zeros == 0,
        done=zeros != 0,
        failed=zeros != 0,
        position=candidates(masked, end, width),
    )


# --- op ---------------------------------------------------------------------------------------


@register_op(
    "unmask_and_slide",
    mutates_args=(
        "canvas", "start", "end", "prefix", "committed", "since_refresh", "step",
        "refresh", "done", "failed", "position",
    ),
)  # fmt: skip
def _unmask_and_slide_op(
    canvas: Tensor,
    token: Tensor,
    confidence: Tensor,
    start: Tensor,
    end: Tensor,
    prefix: Tensor,
    committed: Tensor,
    since_refresh: Tensor,
    step: Tensor,
    refresh: Tensor,
    done: Tensor,
    failed: Tensor,
    position: Tensor,
    active: Tensor,
    leftpad: Tensor,
    prompt_length: int,
    block_length: int,
    max_block_length: int | None,
    schedule: str,
    cache: str,
    prefix_window: int,
    min_prefix: int,
    rule: str,
    rule_value: float,
    steps: int,
    refresh_commit: str,
    mask_id: int,
    eos_ids: list[int],
    stop_at_eos: bool,
) -> Tensor:
    state = WindowState(
        start, end, prefix, committed, since_refresh, step, refresh, done, failed, position
    )
    spec = UnmaskSpec(
        prompt_length, block_length, max_block_length, schedule, cache, prefix_window, min_prefix,
        rule, rule_value, steps, refresh_commit, mask_id, tuple(eos_ids), stop_at_eos,
    )  # fmt: skip
    step_of = launch if use_triton(canvas, confidence) else unmask_and_slide_definition
    return step_of(canvas, token, confidence, state, active, leftpad, spec)


def unmask_and_slide(
    canvas: Tensor,
    token: Tensor,
    confidence: Tensor,
    state: WindowState,
    active: Tensor,
    leftpad: Tensor,
    spec: UnmaskSpec,
) -> Tensor:
    """Commit the selected candidates of every active row and slide its window, in place.

    Args:
        canvas: (B, L) int64, prompt and response; committed tokens are written into it.
        token: (B, K) int64, proposed token of each candidate (`state.position`).
        confidence: (B, K) float32, its confidence; ignored where there is no candidate.
        state: per-row window state, updated in place.
        active: (B,) bool, rows that take part; done rows never do.
        leftpad: (B,) int32, padding positions before the row's prompt.
        spec: schedule, cache policy, rule and ids.

    Returns:
        (B, K) bool, the candidates that were committed.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, shape, device or stride (canvas may
            have any row stride, the rest is contiguous), or a spec that is not defined.
    """
    op = "unmask_and_slide"
    check_tensor(op, "canvas", canvas, dtype=torch.int64, shape=("B", "L"), unit_stride=True)
    B, L = canvas.shape
    check_tensor(op, "state.position", state.position, dtype=torch.int32, shape=(B, "K"),
                 device=canvas.device, contiguous=True)  # fmt: skip
    per_row, candidates_shape = (B,), tuple(state.position.shape)
    for name, tensor, dtype, shape in (
        ("token", token, torch.int64, candidates_shape),
        ("confidence", confidence, torch.float32, candidates_shape),
        *((f"state.{n}", getattr(state, n), torch.int32, per_row) for n in INT_FIELDS),
        *((f"state.{n}", getattr(state, n), torch.bool, per_row) for n in BOOL_FIELDS),
        ("active", active, torch.bool, per_row),
        ("leftpad", leftpad, torch.int32, per_row),
    ):
        check_tensor(
            op, name, tensor, dtype=dtype, shape=shape, device=canvas.device, contiguous=True
        )
    check_choice(op, "schedule", spec.schedule, SCHEDULES)
    check_choice(op, "cache", spec.cache, CACHES)
    check_choice(op, "rule", spec.rule, tuple(RULES))
    check_choice(op, "refresh_commit", spec.refresh_commit, REFRESH_COMMITS)
    if candidates_shape[1] < 1:
        raise ValueError(f"{op}: state.position has no candidates: accepted is K >= 1")
    if not 0 <= spec.prompt_length <= L:
        raise ValueError(f"{op}: prompt_length={spec.prompt_length}: accepted are 0 to {L}")
    if spec.block_length < 1:
        raise ValueError(f"{op}: block_length={spec.block_length}: accepted is at least 1")
    if spec.rule == "quota" and spec.steps < 1:
        raise ValueError(f"{op}: steps={spec.steps}: the quota rule accepts at least 1")
    if takes_definition(canvas, confidence):
        return unmask_and_slide_definition(canvas, token, confidence, state, active, leftpad, spec)
    return _unmask_and_slide_op(
        canvas, token, confidence, state.start, state.end, state.prefix, state.committed,
        state.since_refresh, state.step, state.refresh, state.done, state.failed, state.position,
        active, leftpad, spec.prompt_length, spec.block_length, spec.max_block_length,
        spec.schedule, spec.cache, spec.prefix_window, spec.min_prefix, spec.rule,
        spec.rule_value, spec.steps, spec.refresh_commit, spec.mask_id, list(spec.eos_ids),
        spec.stop_at_eos,
    )  # fmt: skip
