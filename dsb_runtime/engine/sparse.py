"""Sparse context: forwards that leave out the masks far behind the block, or behind an EOS.

`dsb_kernels.method` says which positions a forward sees (`Row.context` and `Row.seen`). A refresh
computes these alone: they are packed into its columns, each at its true position. K and V keep the
place of their position in the cache. Attention is told which of them are visible, and which KV
blocks have any that are.

Shapes: B batch rows, L canvas positions; a step has b rows of W tokens and k candidates each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsb_kernels._op import use_triton
from dsb_kernels.block_lists import BlockLists, blocks_visible
from dsb_kernels.commit import first_eos_of
from dsb_kernels.place import Layout
from dsb_kernels.rows import Column, UnmaskSpec


class Context(NamedTuple):
    """What the rows of a step see, and where a refresh's columns stand."""

    visible: Tensor  # (b, L) bool, which positions queries see
    position: Tensor | None  # (b, W) int32, the position of each column; None for a window


def blocks_seen(
    context: Context | None, start: Tensor, length: Tensor
) -> BlockLists | tuple[None, None]:
    """The lists of KV blocks that the queries of windows visit: all but those in which they see
    nothing outside their window. They change no result. None, None if there are no lists.

    The definition gets none, since it reads every key anyway: with them, a step of one row took 8%
    longer on a CPU (the embedded model, 4 layers), and a step of 20 rows 3%.

    Args:
        start, length: (b,) int32, the queries' windows.
    """
    if context is None or not use_triton(context.visible):
        return None, None
    return blocks_visible(context.visible, start, length)


def beyond_eos(canvas: Tensor, table: Tensor, spec: UnmaskSpec) -> Tensor:
    """Which positions are masks behind the first EOS of the response, with `eos_bound`, (B, L)."""
    if not spec.eos_bound:
        return torch.zeros_like(canvas, dtype=torch.bool)
    row = dict(zip(Column, table.long().unbind(1), strict=True))
    first = first_eos_of(canvas, row, row[Column.RESPONSE_END], spec)
    index = torch.arange(canvas.shape[1], device=canvas.device)
    return (canvas == spec.mask_id) & (index > first[:, None])


def seen_by_refresh(
    canvas: Tensor, table: Tensor, spec: UnmaskSpec, context_masks: int | None
) -> Tensor:
    """Which positions a refresh would compute and attend to now, (B, L) bool: every token, the
    masks of the block, the next `context_masks` masks and the very last position.

    Args:
        canvas: (B, L) int64. table: (B, NUM_COLUMNS) int32, the row table.
    """
    L = canvas.shape[1]
    index = torch.arange(L, device=canvas.device)
    exists = index >= table[:, Column.LEFTPAD, None]
    masked = exists & (canvas == spec.mask_id)
    seen = exists & ~beyond_eos(canvas, table, spec)
    if context_masks is None:
        return seen
    after = seen & masked & (index >= table[:, Column.END, None])
    far = after & (after.cumsum(-1) > context_masks) & (index < L - 1)
    return seen & ~far


def pack(
    layout: Layout, seen: Tensor, canvas: Tensor, position: Tensor, shift: bool
) -> tuple[Layout, Tensor]:
    """Place the tokens of a refresh that computes the positions `seen` (B, L) alone.

    Args:
        layout: of `place_rows`; only its tokens and its source_index change.
        canvas: (B, L) int64. position: (B, K) int32, the candidates.
        shift: whether a token is predicted from the position before it.

    Returns:
        The layout, and the position of each column, (b, W) int32: the row's positions that are
        seen, then others.
    """
    rows, (b, W) = layout.rows.long(), layout.input_ids.shape
    seen = seen[rows]
    order = seen.int().argsort(dim=-1, descending=True, stable=True)[:, :W]
    k = len(layout.source_index) // b
    source = torch.maximum(position[rows, :k] - int(shift), layout.leftpad[:, None]).long()
    column = (seen.cumsum(-1) - 1).gather(1, source).clamp(0, W - 1)
    first = W * torch.arange(b, device=rows.device)
    layout = layout._replace(
        input_ids=canvas[rows].gather(1, order), source_index=(column + first[:, None]).flatten()
    )
    return layout, order.int().contiguous()


def in_window(layout: Layout, length: int) -> Tensor:
    """Which of `length` positions each row's window has, (b, L) bool."""
    index = torch.arange(length, device=layout.start.device)
    end = layout.start + layout.length
    return (index >= layout.start[:, None]) & (index < end[:, None])
