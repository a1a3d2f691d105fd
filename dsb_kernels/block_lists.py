"""Lists of KV blocks for window_attention, in FlexAttention's layout.

A KV block is `block_size` consecutive positions of the cache. A list names the KV blocks that a row
(or a KV head of a row) visits outside its window. `kv_num_blocks`, (B,) or (B, H_kv) int32, says
how many they are, and `kv_indices`, (B, N) or (B, H_kv, N) int32 with
N = ceil(capacity / block_size), names them in its first entries.

Lists are ascending and are made from device tensors alone: the host reads nothing, and every shape
is known beforehand. Whatever a list names, window_attention itself skips positions of the padding,
positions at or after `cache_seqlens`, and positions of the window.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsb_kernels._check import FLOATS, check_tensor

BlockLists = tuple[Tensor, Tensor]


def lists_of(visited: Tensor) -> BlockLists:
    """List the KV blocks for which `visited` (..., N) bool is True, in ascending order."""
    order = visited.int().argsort(dim=-1, descending=True, stable=True)
    return visited.sum(-1, dtype=torch.int32), order.int()


def _blocks(capacity: int, block_size: int, like: Tensor) -> Tensor:
    """The first position of each KV block, (N,) int32."""
    for name, value in (("capacity", capacity), ("block_size", block_size)):
        if value < 1:
            raise ValueError(f"block lists: {name}={value}: accepted is at least 1")
    return torch.arange(0, capacity, block_size, dtype=torch.int32, device=like.device)


def _check_rows(**tensors: Tensor | None) -> None:
    """Check arguments that have one number for each row, (B,) int32. The first is never None."""
    first: Any = next(iter(tensors.values()))
    check = functools.partial(check_tensor, "block lists", dtype=torch.int32)
    for name, tensor in tensors.items():
        if tensor is first:
            check(name, tensor, shape=("B",))
        elif tensor is not None:
            check(name, tensor, shape=first.shape, device=first.device)


def blocks_all(cache_seqlens: Tensor, capacity: int, block_size: int = 64) -> BlockLists:
    """List every KV block that has a stored position.

    Args:
        cache_seqlens: (B,) int32, one past the last stored position.
        capacity: how many positions the cache has.
        block_size: how many positions a KV block has.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value.
    """
    _check_rows(cache_seqlens=cache_seqlens)
    return lists_of(_blocks(capacity, block_size, cache_seqlens) < cache_seqlens[:, None])


def blocks_left_padding(
    cache_seqlens: Tensor, cache_leftpad: Tensor, capacity: int, block_size: int = 64
) -> BlockLists:
    """List every KV block that has a stored position which is not left padding.

    Args:
        cache_leftpad: (B,) int32, the first position after the left padding.
        cache_seqlens, capacity, block_size: as in `blocks_all`, which raises the same errors.
    """
    _check_rows(cache_seqlens=cache_seqlens, cache_leftpad=cache_leftpad)
    first = _blocks(capacity, block_size, cache_seqlens)
    stored = first < cache_seqlens[:, None]
    return lists_of(stored & (first + block_size > cache_leftpad[:, None]))


def blocks_near_window(
    window_start: Tensor,
    window_length: Tensor,
    cache_seqlens: Tensor,
    capacity: int,
    num_after: int,
    block_size: int = 64,
    cache_leftpad: Tensor | None = None,
) -> BlockLists:
    """List all KV blocks before the window and `num_after` after it, so that queries skip masks
    that are far to the right.

    The KV block in which the window ends is listed too, since it may have positions after the
    window. `num_after` counts the KV blocks after that one.

    Args:
        window_start, window_length: (B,) int32, the window in the canvas.
        num_after: how many KV blocks after the window, at least 0.
        cache_leftpad: (B,) int32, the first position after the left padding; None means zeros.
        cache_seqlens, capacity, block_size: as in `blocks_all`, which raises the same errors.
    """
    _check_rows(
        window_start=window_start, window_length=window_length, cache_seqlens=cache_seqlens,
        cache_leftpad=cache_leftpad,
    )  # fmt: skip
    if num_after < 0:
        raise ValueError(f"block lists: num_after={num_after}: accepted is at least 0")
    first = _blocks(capacity, block_size, cache_seqlens)
    end = (window_start + window_length)[:, None]
    # A KV block that begins before the window's end is before the window or overlaps it.
    after = (end + block_size - 1) // block_size * block_size
    visited = (first < cache_seqlens[:, None]) & (first < after + num_after * block_size)
    if cache_leftpad is not None:
        visited &= first + block_size > cache_leftpad[:, None]
    return lists_of(visited)


def blocks_visible(
    kv_visible: Tensor, window_start: Tensor, window_length: Tensor, block_size: int = 64
) -> BlockLists:
    """List every KV block that has a visible position outside the window. With these lists queries
    see what they see with `kv_visible` alone, and skip the KV blocks that hold nothing for them.

    Args:
        kv_visible: (B, C) bool, which positions of the cache queries see.
        window_start, window_length: (B,) int32, the window in the canvas.
        block_size: as in `blocks_all`, which raises the same errors.
    """
    _check_rows(window_start=window_start, window_length=window_length)
    check_tensor(
        "block lists", "kv_visible", kv_visible, dtype=torch.bool, shape=(len(window_start), "C"),
        device=window_start.device,
    )  # fmt: skip
    C, position = kv_visible.shape[1], torch.arange(kv_visible.shape[1], device=kv_visible.device)
    N = len(_blocks(C, block_size, kv_visible))
    start, end = window_start[:, None], (window_start + window_length)[:, None]
    outside = kv_visible & ((position < start) | (position >= end))
    return lists_of(pad(outside, (0, N * block_size - C)).unflatten(1, (N, block_size)).any(-1))


def blocks_top_k(
    scores: Tensor, k: int, cache_seqlens: Tensor | None = None, block_size: int = 64
) -> BlockLists:
    """List the `k` KV blocks of the highest scores. Of equal scores, the lower KV block wins.

    Args:
        scores: (B, N) or (B, H_kv, N) floating point. A KV block of score -inf or NaN is never
            listed.
        k: how many KV blocks a list has, at least 0. A list is shorter if fewer may be listed.
        cache_seqlens: (B,) int32 or None. A KV block that begins there or later is never listed.
        block_size: how many positions a KV block has.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value.
    """
    check_tensor("block lists", "scores", scores, dtype=(*FLOATS, torch.float64), shape=("...",))
    if scores.ndim not in (2, 3):
        shape = tuple(scores.shape)
        raise ValueError(f"block lists: scores has shape {shape}: accepted is (B, N), (B, H_kv, N)")
    if k < 0:
        raise ValueError(f"block lists: k={k}: accepted is at least 0")
    allowed = scores > -torch.inf  # NaN is not
    if cache_seqlens is not None:
        check_tensor(
            "block lists", "cache_seqlens", cache_seqlens, dtype=torch.int32,
            shape=scores.shape[:1], device=scores.device,
        )  # fmt: skip
        first = _blocks(scores.shape[-1] * block_size, block_size, scores)
        end = cache_seqlens.view(-1, *(1,) * (scores.ndim - 1))
        allowed = allowed & (first < end)
    order = torch.where(allowed, scores, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    best = torch.zeros_like(allowed).scatter(-1, order[..., :k], True)
    return lists_of(best & allowed)
