"""place_rows: which rows take part in a step, where their windows stand, which tokens these have.

This op begins a step of DSB Cache (arXiv 2602.05992); `unmask_and_slide` ends it.

Shapes: B batch rows, L canvas positions, K candidates of a row. The capacity of the step is b rows
of W positions and k candidates each.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsb_kernels._check import check_between, check_choice, check_tensor
from dsb_kernels._configs import configuration
from dsb_kernels._launch import wait_for_previous, wrap_triton
from dsb_kernels._op import constant, jit, op, tl, triton
from dsb_kernels.rows import NUM_COLUMNS, Column, StepKind

CONFIG = configuration("place_rows", 0, "any")  # every batch and architecture takes the same


class Layout(NamedTuple):
    """The rows of a step and where their windows stand.

    With b < B the rows that take part come first. A row that takes no part but fills the capacity
    has length 0, and none of its candidates is eligible.
    """

    rows: Tensor  # (b,) int32, the batch row
    start: Tensor  # (b,) int32, the canvas position of the window's first token
    length: Tensor  # (b,) int32, how many positions the window has, 0 to W
    leftpad: Tensor  # (b,) int32, how many padding positions stand before the prompt
    num_scored: Tensor  # (b,) int32, k (at most L - leftpad) where the row takes part, else 0
    active: Tensor  # (b,) bool, whether the row takes part
    input_ids: Tensor  # (b, W) int64, the window's tokens; past its length any token of the row
    source_index: Tensor  # (b * k,) int64, which of all b * W tokens predicts each candidate
    eligible: Tensor  # (b * k,) bool, whether the row takes part and has such a candidate
    noise_ids: Tensor  # (b * k,) int64, the id that selects the candidate's noise


# --- definition -------------------------------------------------------------------------------


def place_rows_reference(
    canvas: Tensor,
    table: Tensor,
    position: Tensor,
    *,
    kind: int,
    num_rows: int,
    width: int,
    num_candidates: int,
    shift: bool = False,
    suffix_window: int = 0,
) -> Layout:
    """Place the rows of a step: those that need a step of this kind and fit its capacity.

    Args:
        canvas: (B, L) int64, prompt and response, and what may follow it.
        table: (B, NUM_COLUMNS) int32, the row table (`dsb_kernels.rows.Column`).
        position: (B, K) int32, the canvas positions of each row's candidates in ascending order,
            then -1.
        kind: the `StepKind` that a row must need to take part. A WINDOW step computes
            `[start - prefix, min(end + suffix_window, L))`, a RESPONSE step the response, with the
            position before it if `shift` is set, and a REFRESH step as many positions after the
            padding as the column CONTEXT says. If these are not all, the caller says which they
            are.
        num_rows, width, num_candidates: the capacity of b <= B rows, W <= L positions and k <= K
            candidates of each. A row that needs more positions or candidates does not take part. If
            more than b rows could take part, the first b do.
        shift: whether position i is predicted by the token at position i - 1 (Dream).
        suffix_window: how many positions after the block a WINDOW step computes with it.

    Returns:
        A `Layout`. If b = B, it has the rows in the batch's order. If b < B, the rows that take
        part come first and others follow, each of the two in the batch's order.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape, device or stride (the canvas may
            have any stride between rows, the others are contiguous), or a number is out of range.
    """
    B, L = canvas.shape
    leftpad, response_start = table[:, Column.LEFTPAD], table[:, Column.RESPONSE_START]
    if kind == StepKind.WINDOW:
        start = table[:, Column.START] - table[:, Column.PREFIX]
        end = (table[:, Column.END] + suffix_window).clamp(max=L)
    elif kind == StepKind.RESPONSE:
        start = torch.maximum(response_start - int(shift), leftpad)
        end = table[:, Column.RESPONSE_END]
    else:
        start, end = leftpad.clone(), leftpad + table[:, Column.CONTEXT]
    length = end - start
    active = (table[:, Column.NEXT_KIND] == kind) & (length <= width)
    active &= table[:, Column.NUM_CANDIDATES] <= num_candidates

    rows = torch.arange(B, device=canvas.device)
    if num_rows < B:
        rows = active.logical_not().int().argsort(stable=True)[:num_rows]
        start, length, active = start[rows], length[rows], active[rows]
        table, position = table[rows], position[rows]
        leftpad, response_start = leftpad[rows], response_start[rows]
    length = torch.where(active, length, 0)
    index = (start[:, None] + torch.arange(width, device=canvas.device)).clamp(max=L - 1)
    input_ids = canvas[rows[:, None], index]

    position = position[:, :num_candidates].long()
    eligible = active[:, None] & (position >= 0)
    # A row's first position has no token before it: its own token predicts it if `shift` is set.
    source = torch.maximum(position - int(shift), leftpad[:, None])
    in_window = (source - start[:, None]).clamp(0, width - 1)
    source_index = in_window + width * torch.arange(num_rows, device=canvas.device)[:, None]
    # A noise id is made of the batch row, of the number of steps that the row took part in and of
    # the response position. So other rows, padding, and steps that skip the row change no noise.
    response_index = (position - response_start[:, None]).clamp(min=0)
    forwards = table[:, Column.FORWARDS].long()
    noise_ids = ((rows << 42) | (forwards << 21))[:, None] | response_index
    return Layout(
        rows=rows.int(),
        start=start,
        length=length,
        leftpad=leftpad.clone(),
        num_scored=torch.where(active, (L - leftpad).clamp(max=num_candidates), 0),
        active=active,
        input_ids=input_ids,
        source_index=source_index.flatten(),
        eligible=eligible.flatten(),
        noise_ids=noise_ids.flatten(),
    )


def response_index(noise_ids: Tensor) -> Tensor:
    """Where each candidate stands in its row's response, counted from 0, which is the last part of
    its noise id. Takes and returns (...) int64."""
    return noise_ids & ((1 << 21) - 1)


# --- kernel -----------------------------------------------------------------------------------


# torch 2.11 compiles no loop over an enum, so that the accepted kinds are listed here.
KINDS = [int(kind) for kind in StepKind if kind.name != "NOTHING"]
WINDOW = constant(StepKind.WINDOW)
RESPONSE = constant(StepKind.RESPONSE)
COLUMNS = constant(NUM_COLUMNS)
NEXT_KIND = constant(Column.NEXT_KIND)
START = constant(Column.START)
END = constant(Column.END)
PREFIX = constant(Column.PREFIX)
NUM_CANDIDATES = constant(Column.NUM_CANDIDATES)
LEFTPAD = constant(Column.LEFTPAD)
FORWARDS = constant(Column.FORWARDS)
RESPONSE_START = constant(Column.RESPONSE_START)
RESPONSE_END = constant(Column.RESPONSE_END)
CONTEXT = constant(Column.CONTEXT)


@jit
def _place_rows_kernel(
    canvas_ptr, table_ptr, position_ptr,
    rows_ptr, start_ptr, length_ptr, leftpad_ptr, num_scored_ptr, active_ptr,
    input_ids_ptr, source_index_ptr, eligible_ptr, noise_ids_ptr,
    stride_cb, B, L, K, width, capacity, suffix_window,
    KIND: tl.constexpr, SHIFT: tl.constexpr, ALL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Program (r, piece): write BLOCK_W tokens of the step's row r; piece 0 also writes the row's
    other fields of the layout.

    Each program finds its row among all B rows, sorted so that the rows that take part come first,
    in the batch's order, and then the others, in that order too. With ALL it is batch row r.
    `capacity` is k.
    """
    wait_for_previous(PDL)
    r = tl.program_id(0)
    b = tl.arange(0, BLOCK_B)
    inside = b < B
    row_ptrs = table_ptr + b * COLUMNS
    if KIND == WINDOW:
        start = tl.load(row_ptrs + START, mask=inside, other=0)
        start -= tl.load(row_ptrs + PREFIX, mask=inside, other=0)
        end = tl.load(row_ptrs + END, mask=inside, other=0) + suffix_window
        length = tl.minimum(end, L) - start
    elif KIND == RESPONSE:
        start = tl.load(row_ptrs + RESPONSE_START, mask=inside, other=0) - SHIFT
        start = tl.maximum(start, tl.load(row_ptrs + LEFTPAD, mask=inside, other=0))
        length = tl.load(row_ptrs + RESPONSE_END, mask=inside, other=0) - start
    else:
        start = tl.load(row_ptrs + LEFTPAD, mask=inside, other=0)
        length = tl.load(row_ptrs + CONTEXT, mask=inside, other=0)
    next_kind = tl.load(row_ptrs + NEXT_KIND, mask=inside, other=-1)
    num_candidates = tl.load(row_ptrs + NUM_CANDIDATES, mask=inside, other=0)
    active = (next_kind == KIND) & (length <= width) & (num_candidates <= capacity)
    if ALL:
        is_mine = b == r
    else:
        before = tl.cumsum(active.to(tl.int32), 0) - active.to(tl.int32)
        behind = tl.sum(active.to(tl.int32), 0) + b - before
        is_mine = tl.where(active, before, behind) == r
    row = tl.sum(tl.where(is_mine, b, 0), 0).to(tl.int64)
    takes_part = tl.sum((is_mine & active).to(tl.int32), 0)
    start = tl.sum(tl.where(is_mine, start, 0), 0)
    length = tl.sum(tl.where(is_mine & active, length, 0), 0)

    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    index = tl.minimum(start + w, L - 1)
    token = tl.load(canvas_ptr + row * stride_cb + index, mask=w < width)
    tl.store(input_ids_ptr + r.to(tl.int64) * width + w, token, mask=w < width)

    if tl.program_id(1) == 0:
        table_ptr += row * COLUMNS
        tl.store(rows_ptr + r, row)
        tl.store(start_ptr + r, start)
        tl.store(length_ptr + r, length)
        leftpad = tl.load(table_ptr + LEFTPAD)
        tl.store(leftpad_ptr + r, leftpad)
        tl.store(num_scored_ptr + r, takes_part * tl.minimum(capacity, L - leftpad))
        tl.store(active_ptr + r, takes_part != 0)
        k = tl.arange(0, BLOCK_K)
        mask = k < capacity
        position = tl.load(position_ptr + row * K + k, mask=mask, other=-1)
        source = tl.maximum(position - SHIFT, leftpad)
        source = tl.minimum(tl.maximum(source - start, 0), width - 1).to(tl.int64)
        out = r.to(tl.int64) * capacity + k
        tl.store(source_index_ptr + out, source + r.to(tl.int64) * width, mask=mask)
        eligible = (position >= 0) & (k < takes_part * capacity)
        tl.store(eligible_ptr + out, eligible, mask=mask)
        noise_id = (row << 42) | (tl.load(table_ptr + FORWARDS).to(tl.int64) << 21)
        response_index = position - tl.load(table_ptr + RESPONSE_START)
        noise_id = noise_id | tl.maximum(response_index, 0).to(tl.int64)
        tl.store(noise_ids_ptr + out, noise_id, mask=mask)


# --- op ---------------------------------------------------------------------------------------


def _launch(a: Any) -> tuple[Tensor, ...]:
    (B, L), b, k = a.canvas.shape, a.num_rows, a.num_candidates
    numbers = [a.table.new_empty(b) for _ in range(5)]
    active, eligible = (a.canvas.new_empty(n, dtype=torch.bool) for n in (b, b * k))
    input_ids, source_index, noise_ids = (
        a.canvas.new_empty(shape) for shape in ((b, a.width), b * k, b * k)
    )
    layout = (*numbers, active, input_ids, source_index, eligible, noise_ids)
    wrap_triton(_place_rows_kernel)[(b, triton.cdiv(a.width, CONFIG.blocks["BLOCK_W"]))](
        a.canvas, a.table, a.position, *layout,
        a.canvas.stride(0), B, L, a.position.shape[1], a.width, k,
        a.suffix_window,
        KIND=a.kind, SHIFT=int(a.shift), ALL=b == B, BLOCK_B=triton.next_power_of_2(B),
        BLOCK_K=triton.next_power_of_2(k), **CONFIG.options(),
    )  # fmt: skip
    return layout


def _check(a: Any) -> None:
    name = "place_rows"
    check_tensor(name, "canvas", a.canvas, dtype=torch.int64, shape=("B", "L"), unit_stride=True)
    B, L = a.canvas.shape
    integers = functools.partial(
        check_tensor, name, dtype=torch.int32, device=a.canvas.device, contiguous=True
    )
    integers("table", a.table, shape=(B, NUM_COLUMNS))
    integers("position", a.position, shape=(B, "K"))
    check_choice(name, "kind", a.kind, KINDS)
    check_between(name, "num_rows", a.num_rows, 1, B)
    check_between(name, "width", a.width, 1, L)
    check_between(name, "num_candidates", a.num_candidates, 1, a.position.shape[1])
    check_between(name, "suffix_window", a.suffix_window, 0, L)


place_rows = op(place_rows_reference, launch=_launch, check=_check)
