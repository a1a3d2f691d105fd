"""place_rows: which rows take part in a step, where their windows stand, and what is in them.

The first launch of a step of DSB Cache (arXiv 2602.05992); `unmask_and_slide` is the last. `B` =
batch rows, `L` = canvas length, `K` = candidates of a row, `b`, `W` and `k` = the rows, positions
and candidates that the step has room for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsb_kernels._check import check_choice, check_tensor
from dsb_kernels._configs import configuration
from dsb_kernels._op import (
    jit,
    launch_options,
    register_op,
    takes_definition,
    tl,
    triton,
    use_triton,
    wrap_triton,
)
from dsb_kernels.rows import REFRESH, RESPONSE, WINDOW, WindowState

CONFIG = configuration("place_rows", 0, "any")  # one for every batch and architecture
_WINDOW = tl.constexpr(WINDOW) if tl else WINDOW


class PlacedRows(NamedTuple):
    """The rows of a step, those that take part first.

    A row that is there to fill the step has length 0, and nothing of it is eligible.
    """

    rows: Tensor  # (b,) int32, batch row
    start: Tensor  # (b,) int32, canvas position of the window's row 0
    length: Tensor  # (b,) int32, rows of the window, 0 to W
    seqlens: Tensor  # (b,) int32, L
    leftpad: Tensor  # (b,) int32, positions before the prompt
    kept: Tensor  # (b,) int32, k where the row takes part, else 0
    active: Tensor  # (b,) bool, whether it takes part
    ids: Tensor  # (b, W) int64, tokens of the window (past its length, of some position)
    keep: Tensor  # (b * k,) int64, rows that predict the candidates, of all b * W
    eligible: Tensor  # (b * k,) bool, whether there is such a candidate
    noise_ids: Tensor  # (b * k,) int64, what a candidate's noise is a function of


# --- definition -------------------------------------------------------------------------------


def place_rows_definition(
    canvas: Tensor,
    start: Tensor,
    end: Tensor,
    prefix: Tensor,
    position: Tensor,
    needs: Tensor,
    forwards: Tensor,
    leftpad: Tensor,
    kind: int,
    first: int,
    room: list[int],
    shift: int,
    prompt_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (b, W, k), (B, L) = room, canvas.shape
    low = start - prefix if kind == WINDOW else torch.full_like(start, first)
    length = (end if kind == WINDOW else L) - low
    active = (needs == kind) & (length <= W)
    if k < position.shape[1]:  # candidates are ascending, -1 beyond the last
        active = active & (position[:, k] < 0)
    rows = torch.arange(B, device=canvas.device)
    if b < B:  # those that take part come first
        rows = active.logical_not().int().argsort(stable=True)[:b]
        active, low, length, leftpad = active[rows], low[rows], length[rows], leftpad[rows]
        position, forwards = position[rows], forwards[rows]
    length = torch.where(active, length, 0)
    column = torch.arange(W, device=canvas.device)
    ids = canvas[rows[:, None], (low[:, None] + column).clamp(max=L - 1)]
    at = position[:, :k].long()
    eligible = active[:, None] & (at >= 0)
    # The row that predicts a position: its own, or the one before it (row 0 keeps its own).
    source = (at - shift).clamp(min=0)
    keep = (source - low[:, None]).clamp(0, W - 1) + torch.arange(b, device=at.device)[:, None] * W
    # Of the batch row, its steps so far and the place in the response: no other row, no padding,
    # and no step that the row did not take part in, changes its noise.
    place = (at - prompt_length).clamp(min=0)
    noise_ids = ((rows << 42) | (forwards.long() << 21))[:, None] | place
    columns = (rows, low, length, torch.full_like(low, L), leftpad, active * k)
    table = torch.stack([c.int() for c in columns])
    return table, active, ids, keep.flatten(), eligible.flatten(), noise_ids.flatten()


# --- kernel -----------------------------------------------------------------------------------


@jit
def _place_rows_kernel(
    canvas_ptr, start_ptr, end_ptr, prefix_ptr, position_ptr, needs_ptr, forwards_ptr, leftpad_ptr,
    table_ptr, active_ptr, ids_ptr, keep_ptr, eligible_ptr, noise_ids_ptr,
    stride_cb, B, L, K, rows, width, held, first, prompt,
    KIND: tl.constexpr, SHIFT: tl.constexpr, ALL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Program (r, piece): BLOCK_W tokens of the r-th row of the step; piece 0 the rest of it.

    Each program finds its row for itself, from all B rows at once: the r-th that takes part or,
    past those, the r-th of the others, both in the batch's order.
    """
    r = tl.program_id(0)
    i = tl.arange(0, BLOCK_B)
    inside = i < B
    if KIND == _WINDOW:
        low = tl.load(start_ptr + i, mask=inside, other=0)
        low -= tl.load(prefix_ptr + i, mask=inside, other=0)
        length = tl.load(end_ptr + i, mask=inside, other=0) - low
    else:
        low = tl.full((BLOCK_B,), first, tl.int32)
        length = L - low
    # A candidate past what the step has room for, where there may be one.
    past = tl.load(position_ptr + i * K + held, mask=i < tl.where(held < K, B, 0), other=-1)
    needs = tl.load(needs_ptr + i, mask=inside, other=-1)
    active = (needs == KIND) & (length <= width) & (past < 0)
    if ALL:
        here = i == r
    else:
        before = tl.cumsum(active.to(tl.int32), 0) - active.to(tl.int32)
        behind = tl.sum(active.to(tl.int32), 0) + i - before
        here = tl.where(active, before, behind) == r
    row = tl.sum(tl.where(here, i, 0), 0).to(tl.int64)
    takes_part = tl.sum((here & active).to(tl.int32), 0)
    low = tl.sum(tl.where(here, low, 0), 0)
    length = tl.sum(tl.where(here & active, length, 0), 0)

    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    index = tl.minimum(low + w, L - 1)
    token = tl.load(canvas_ptr + row * stride_cb + index, mask=w < width)
    tl.store(ids_ptr + r.to(tl.int64) * width + w, token, mask=w < width)

    if tl.program_id(1) == 0:
        tl.store(table_ptr + r, row)
        tl.store(table_ptr + rows + r, low)
        tl.store(table_ptr + 2 * rows + r, length)
        tl.store(table_ptr + 3 * rows + r, L)
        tl.store(table_ptr + 4 * rows + r, tl.load(leftpad_ptr + row))
        tl.store(table_ptr + 5 * rows + r, takes_part * held)
        tl.store(active_ptr + r, takes_part != 0)
        k = tl.arange(0, BLOCK_K)
        mask = k < held
        at = tl.load(position_ptr + row * K + k, mask=mask, other=-1)
        source = tl.maximum(at - SHIFT, 0)
        keep = tl.minimum(tl.maximum(source - low, 0), width - 1).to(tl.int64)
        tl.store(keep_ptr + r * held + k, keep + r.to(tl.int64) * width, mask=mask)
        eligible = (at >= 0) & (k < takes_part * held)
        tl.store(eligible_ptr + r * held + k, eligible, mask=mask)
        noise_id = (row << 42) | (tl.load(forwards_ptr + row).to(tl.int64) << 21)
        noise_id = noise_id | tl.maximum(at - prompt, 0).to(tl.int64)
        tl.store(noise_ids_ptr + r * held + k, noise_id, mask=mask)


# --- op ---------------------------------------------------------------------------------------


@register_op("place_rows")
def _place_rows_op(
    canvas: Tensor,
    start: Tensor,
    end: Tensor,
    prefix: Tensor,
    position: Tensor,
    needs: Tensor,
    forwards: Tensor,
    leftpad: Tensor,
    kind: int,
    first: int,
    room: list[int],
    shift: int,
    prompt_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not use_triton(canvas):
        return place_rows_definition(
            canvas, start, end, prefix, position, needs, forwards, leftpad, kind, first, room,
            shift, prompt_length,
        )  # fmt: skip
    (b, W, k), (B, L) = room, canvas.shape
    table = canvas.new_empty((6, b), dtype=torch.int32)
    active, eligible = (canvas.new_empty(n, dtype=torch.bool) for n in (b, b * k))
    ids, keep, noise_ids = (canvas.new_empty(shape) for shape in ((b, W), b * k, b * k))
    wrap_triton(_place_rows_kernel)[(b, triton.cdiv(W, CONFIG.blocks["BLOCK_W"]))](
        canvas, start, end, prefix, position, needs, forwards, leftpad,
        table, active, ids, keep, eligible, noise_ids,
        canvas.stride(0), B, L, position.shape[1], b, W, k, first, prompt_length,
        KIND=kind, SHIFT=shift, ALL=b == B, BLOCK_B=triton.next_power_of_2(B),
        BLOCK_K=triton.next_power_of_2(k), **CONFIG.blocks,
        **launch_options(CONFIG.num_warps, CONFIG.num_stages),
    )  # fmt: skip
    return table, active, ids, keep, eligible, noise_ids


def place_rows(
    canvas: Tensor,
    state: WindowState,
    leftpad: Tensor,
    *,
    kind: int,
    rows: int,
    width: int,
    held: int,
    first: int = 0,
    shift: bool = False,
    prompt_length: int = 0,
) -> PlacedRows:
    """Place the rows of a step: those of `state` that need a step of this kind and fit it.

    Args:
        canvas: (B, L) int64, prompt and response.
        state: per-row window state, which is not changed.
        leftpad: (B,) int32, padding positions before the row's prompt.
        kind: what the rows must need: WINDOW computes `[start - prefix, end)`, REFRESH and
            RESPONSE `[first, L)`.
        rows, width, held: b <= B rows, W <= L positions and k <= K candidates that there is room
            for. A row that needs more does not take part; nor do those past the b-th.
        first: where a step that is not of windows begins, 0 to L - 1.
        shift: position i is predicted by the row of position i - 1 (Dream).
        prompt_length: P, first response position.

    Returns:
        `PlacedRows`. With b = B every row is in its place; otherwise those that take part come
        first, both they and the others in the batch's order.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, shape, device or stride (canvas may
            have any row stride, the rest is contiguous), or a number out of its range.
    """
    op = "place_rows"
    check_tensor(op, "canvas", canvas, dtype=torch.int64, shape=("B", "L"), unit_stride=True)
    (B, L), same = canvas.shape, {"device": canvas.device, "contiguous": True}
    tensors = {f"state.{n}": getattr(state, n) for n in ("start", "end", "prefix")}
    tensors["state.position"] = state.position
    tensors |= {f"state.{n}": getattr(state, n) for n in ("needs", "forwards")}
    tensors["leftpad"] = leftpad
    for name, tensor in tensors.items():
        shape = (B, "K") if name == "state.position" else (B,)
        check_tensor(op, name, tensor, dtype=torch.int32, shape=shape, **same)
    check_choice(op, "kind", kind, (WINDOW, REFRESH, RESPONSE))
    K = state.position.shape[1]
    for name, value, low, high in (
        ("rows", rows, 1, B), ("width", width, 1, L), ("held", held, 1, K),
        ("first", first, 0, L - 1), ("prompt_length", prompt_length, 0, L),
    ):  # fmt: skip
        if not low <= value <= high:
            raise ValueError(f"{op}: {name}={value}: accepted are {low} to {high}")
    run = place_rows_definition if takes_definition(canvas) else _place_rows_op
    room = [rows, width, held]
    found = run(canvas, *tensors.values(), kind, first, room, int(shift), prompt_length)
    return PlacedRows(*found[0].unbind(), *found[1:])
