"""unmask_and_slide: from confidences to the next decoding state (arXiv 2602.05992).

One step of the schedule for every row of a batch: pick which candidates to commit, write their
tokens into the canvas, slide the window, and say what the row needs next (a refresh, a window
step, or nothing) and what the host wants to know of it. `L` = canvas length, `P` = where the
response starts, `K` = candidates of a row, `b` and `k` = rows and candidates that were scored.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from dsb_kernels._check import check_choice, check_tensor
from dsb_kernels._op import register_op, takes_definition, use_triton
from dsb_kernels.commit_kernel import launch
from dsb_kernels.rows import (
    BOOL_FIELDS,
    FLAGS,
    INT_FIELDS,
    NOTHING,
    REFRESH,
    RESPONSE,
    WINDOW,
    UnmaskSpec,
    WindowState,
)
from dsb_kernels.rules import RULES, select

SCHEDULES = ("dsb", "naive")
CACHES = ("dsb", "dual", "none")
REFRESH_COMMITS = ("select", "first")


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


def spread(scored: Tensor, rows: Tensor | None, whole: Tensor) -> Tensor:
    """What was scored, (b,) or (b, k), in its place in a tensor like `whole`, 0 elsewhere."""
    if rows is None and scored.shape == whole.shape:
        return scored
    whole = torch.zeros_like(whole, dtype=scored.dtype)
    part = whole if whole.ndim == 1 else whole[:, : scored.shape[1]]
    part[slice(None) if rows is None else rows.long()] = scored
    return whole


def needs_of(state: WindowState, spec: UnmaskSpec) -> Tensor:
    """(B,) int32: what each row needs next."""
    kind = torch.where(state.refresh, REFRESH, WINDOW)
    if spec.full_every > 1:
        kept = state.refresh & (state.refreshes % spec.full_every != 0)
        kind = torch.where(kept, RESPONSE, kind)
    return torch.where(state.done, NOTHING, kind).int()


def flags_of(state: WindowState, length: int, took_part: Tensor, spec: UnmaskSpec) -> Tensor:
    """(B, len(FLAGS)) int32."""
    columns = {
        **{name: getattr(state, name) for name in ("needs", "failed", "start", "end", "prefix")},
        "held": (state.position >= 0).sum(-1),
        "since": state.since_refresh,
        "left": length - spec.prompt_length - state.committed,
        "took_part": took_part,
        "new": state.commit.sum(-1),
    }
    return torch.stack([columns[name].int() for name in FLAGS], dim=1)


def unmask_and_slide_definition(
    canvas: Tensor,
    token: Tensor,
    confidence: Tensor,
    state: WindowState,
    active: Tensor,
    leftpad: Tensor,
    spec: UnmaskSpec,
    rows: Tensor | None = None,
) -> Tensor:
    length, prompt = canvas.shape[1], spec.prompt_length
    index = torch.arange(length, device=canvas.device)
    response = index >= prompt
    width = confidence.shape[1]
    token, confidence = (spread(x, rows, state.position) for x in (token, confidence))
    active = spread(active, rows, state.done) & ~state.done
    state.scored.copy_(torch.where(active[:, None], confidence, 0))

    # Select among the candidates and commit them.
    at = state.position.long().clamp(min=0)
    is_masked = canvas.gather(1, at) == spec.mask_id
    valid = (state.position >= 0) & is_masked & (state.position < state.end[:, None])
    valid[:, width:] = False
    valid = valid & active[:, None]
    nan = (valid & confidence.isnan()).any(-1)
    valid = valid & ~nan[:, None]
    due = quota_due(state, spec, length)
    commit = select(confidence, valid, due, spec.rule, spec.rule_value)
    if spec.refresh_commit == "first":
        first = valid & (valid.cumsum(-1) == 1)
        commit = torch.where(state.refresh[:, None], first, commit)
    # A padded candidate aliases index 0, so scatter by addition of (token - mask), zero elsewhere.
    delta = torch.where(commit, token - spec.mask_id, 0)
    canvas.scatter_add_(1, at, delta)

    # Slide the window of the rows that took part.
    moved = active & ~nan
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
        ("since_refresh", since), ("step", step), ("refreshes", state.refreshes + state.refresh),
        ("forwards", state.forwards + 1), ("refresh", refresh), ("done", done),
    ):  # fmt: skip
        old = getattr(state, name)
        old.copy_(torch.where(moved, value.to(old.dtype), old))
    state.position.copy_(torch.where(moved[:, None], position, state.position))
    state.failed.logical_or_(nan)
    state.commit.copy_(commit)
    state.needs.copy_(needs_of(state, spec))
    state.flags.copy_(flags_of(state, length, active, spec))
    return state.commit


def initial_state(canvas: Tensor, leftpad: Tensor, spec: UnmaskSpec) -> WindowState:
    """The state before the first step: everything masked, the first step is a refresh."""
    rows, length = canvas.shape
    zeros = torch.zeros(rows, dtype=torch.int32, device=canvas.device)
    masked = (canvas == spec.mask_id) & (
        torch.arange(length, device=canvas.device) >= spec.prompt_length
    )
    start, end = window_of(zeros.long() + spec.prompt_length, zeros.long(), length, spec)
    position = candidates(masked, end, min(spec.block_length, length - spec.prompt_length))
    state = WindowState(
        **{name: zeros.clone() for name in INT_FIELDS},
        refresh=zeros == 0,
        done=zeros != 0,
        failed=zeros != 0,
        position=position,
        commit=position < -1,
        scored=torch.zeros_like(position, dtype=torch.float32),
        flags=zeros.new_zeros(rows, len(FLAGS)),
    )
    state.start.copy_(start)
    state.end.copy_(end)
    state.needs.fill_(REFRESH)
    state.flags.copy_(flags_of(state, length, state.done, spec))
    return state


# --- op ---------------------------------------------------------------------------------------


@register_op("unmask_and_slide", mutates_args=("canvas", *(f.name for f in fields(WindowState))))
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
    refreshes: Tensor,
    forwards: Tensor,
    needs: Tensor,
    refresh: Tensor,
    done: Tensor,
    failed: Tensor,
    position: Tensor,
    commit: Tensor,
    scored: Tensor,
    flags: Tensor,
    active: Tensor,
    leftpad: Tensor,
    rows: Tensor | None,
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
    full_every: int,
) -> None:
    state = WindowState(
        start, end, prefix, committed, since_refresh, step, refreshes, forwards, needs, refresh,
        done, failed, position, commit, scored, flags,
    )  # fmt: skip
    spec = UnmaskSpec(
        prompt_length, block_length, max_block_length, schedule, cache, prefix_window, min_prefix,
        rule, rule_value, steps, refresh_commit, mask_id, tuple(eos_ids), stop_at_eos, full_every,
    )  # fmt: skip
    step_of = launch if use_triton(canvas, confidence) else unmask_and_slide_definition
    step_of(canvas, token, confidence, state, active, leftpad, spec, rows)


def unmask_and_slide(
    canvas: Tensor,
    token: Tensor,
    confidence: Tensor,
    state: WindowState,
    active: Tensor,
    leftpad: Tensor,
    spec: UnmaskSpec,
    rows: Tensor | None = None,
) -> Tensor:
    """Commit the selected candidates of every active row and slide its window, in place.

    Args:
        canvas: (B, L) int64, prompt and response; committed tokens are written into it.
        token: (b, k) int64, proposed token of the first k <= K candidates (`state.position`) of
            the b rows that were scored; candidates beyond are not committed.
        confidence: (b, k) float32, its confidence; ignored where there is no candidate.
        state: per-row window state, updated in place.
        active: (b,) bool, rows that take part; done rows never do.
        leftpad: (B,) int32, padding positions before the row's prompt.
        spec: schedule, cache policy, rule and ids.
        rows: (b,) int32, the batch row of each row that was scored, no row twice (not checked);
            None: b = B, each in its place.

    Returns:
        `state.commit`, (B, K) bool, the candidates that were committed.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, shape, device or stride (canvas may
            have any row stride, the rest is contiguous), or a spec that is not defined.
    """
    op = "unmask_and_slide"
    check_tensor(op, "canvas", canvas, dtype=torch.int64, shape=("B", "L"), unit_stride=True)
    B, L = canvas.shape
    same = {"device": canvas.device, "contiguous": True}
    shape = (B, "K")
    check_tensor(op, "state.position", state.position, dtype=torch.int32, shape=shape, **same)
    K = state.position.shape[1]
    if rows is not None:
        check_tensor(op, "rows", rows, dtype=torch.int32, shape=("b",), **same)
    b = B if rows is None else len(rows)
    check_tensor(op, "token", token, dtype=torch.int64, shape=(b, "k"), **same)
    for name, tensor, dtype, shape in (
        ("confidence", confidence, torch.float32, (b, token.shape[1])),
        ("active", active, torch.bool, (b,)),
        *((f"state.{n}", getattr(state, n), torch.int32, (B,)) for n in INT_FIELDS),
        *((f"state.{n}", getattr(state, n), torch.bool, (B,)) for n in BOOL_FIELDS),
        ("state.commit", state.commit, torch.bool, (B, K)),
        ("state.scored", state.scored, torch.float32, (B, K)),
        ("state.flags", state.flags, torch.int32, (B, len(FLAGS))),
        ("leftpad", leftpad, torch.int32, (B,)),
    ):
        check_tensor(op, name, tensor, dtype=dtype, shape=shape, **same)
    check_choice(op, "schedule", spec.schedule, SCHEDULES)
    check_choice(op, "cache", spec.cache, CACHES)
    check_choice(op, "rule", spec.rule, tuple(RULES))
    check_choice(op, "refresh_commit", spec.refresh_commit, REFRESH_COMMITS)
    if K < 1:
        raise ValueError(f"{op}: state.position has no candidates: accepted is K >= 1")
    if not 1 <= token.shape[1] <= K:
        raise ValueError(
            f"{op}: token has {token.shape[1]} candidates a row: accepted are 1 to state's {K}"
        )
    if not 0 <= spec.prompt_length <= L:
        raise ValueError(f"{op}: prompt_length={spec.prompt_length}: accepted are 0 to {L}")
    if spec.block_length < 1:
        raise ValueError(f"{op}: block_length={spec.block_length}: accepted is at least 1")
    if spec.full_every < 1:
        raise ValueError(f"{op}: full_every={spec.full_every}: accepted is at least 1")
    if spec.rule == "quota" and spec.steps < 1:
        raise ValueError(f"{op}: steps={spec.steps}: the quota rule accepts at least 1")
    if takes_definition(canvas, confidence):
        unmask_and_slide_definition(canvas, token, confidence, state, active, leftpad, spec, rows)
    else:
        tensors, settings = ([getattr(x, f.name) for f in fields(x)] for x in (state, spec))
        _unmask_and_slide_op(canvas, token, confidence, *tensors, active, leftpad, rows, *settings)
    return state.commit
