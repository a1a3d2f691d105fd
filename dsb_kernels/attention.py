"""window_attention: window queries over cached and fresh keys, bidirectional, block-sparse.

The attention of a window step of a diffusion language model (DSB Cache, arXiv 2602.05992): the
queries of the window see every stored position, before and after them. The kernel splits the keys
as FlashDecoding does; block lists have FlexAttention's layout.

Shapes: B batch rows, H query heads, H_kv KV heads, W positions of a window (its columns), C
positions of the cache, D elements of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dsb_kernels._check import check_between, check_tensor, check_window
from dsb_kernels._op import op
from dsb_kernels.attention_kernel import MAX_SPLITS, launch
from dsb_kernels.rope_kv import select

# --- definition -------------------------------------------------------------------------------


def window_attention_reference(
    q: Tensor,
    k_window: Tensor | None,
    v_window: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    window_start: Tensor,
    window_length: Tensor,
    cache_seqlens: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    kv_num_blocks: Tensor | None = None,
    kv_indices: Tensor | None = None,
    kv_block_size: int = 64,
    softmax_scale: float | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of the window's queries to everything stored and to the window itself.

    A query in a column below window_length sees the cached positions in [leftpad, seqlens) outside
    [window_start, window_start + window_length), and the window's own keys that stand at leftpad or
    after it. Nothing else is read: the rest of the cache may hold anything. A window over the whole
    canvas is full attention without the padding.

    Args:
        q: (B, H, W, D) bfloat16, float16 or float32; D a multiple of 8 up to 256.
        k_window, v_window: (B, H_kv, W, D), H a multiple of H_kv; both None when the window's
            K and V have been written into the cache already, which is then read there too.
        k_cache, v_cache: (B, H_kv, C, D) of the same strides; with `cache_batch_idx` of any batch
            size from 1.
        window_start: (B,) int32, canvas position of column 0, 0 to C - window_length.
        window_length: (B,) int32, columns of the window in use, 0 to W.
        cache_seqlens: (B,) int32, end of what is stored, 0 to C; None where that is C.
        cache_leftpad: (B,) int32 or None (zeros), start of what is stored.
        cache_batch_idx: (B,) int32, the cache's batch row that each row of q reads, as in
            FlashAttention; None is row b itself. A row of length 0 reads nothing.
        kv_num_blocks, kv_indices: (B,) and (B, N), or (B, H_kv) and (B, H_kv, N) int32, contiguous:
            the KV blocks visited outside the window (no block twice); both None visits all.
            `dsb_kernels.block_lists` makes them.
        kv_block_size: positions of a listed block, a power of two from 16.
        softmax_scale: None is 1 / sqrt(D).
        num_splits: parts that the kernel splits the keys into; None derives it from B, H, W and the
            GPU, never from the cache or its contents, so that results are reproducible.
        return_lse: also return the log-sum-exp of the scaled scores.

    The other tensors may have any strides with the last dimension contiguous.

    Returns:
        out (B, H, W, D), a transposed view of (B, W, H, D), 0 in columns past window_length and
        where nothing is visible; with `return_lse` also lse (B, H, W) float32, natural logarithm,
        -inf there.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device, stride or value.

    Example:
        Attend to the blocks before the window and to one block of 64 positions after it:

            from dsb_kernels.block_lists import blocks_near_window

            num_blocks, indices = blocks_near_window(start, length, seqlens, capacity, num_after=1)
            out = window_attention(
                q, None, None, k_cache, v_cache, window_start=start, window_length=length,
                cache_seqlens=seqlens, kv_num_blocks=num_blocks, kv_indices=indices,
            )
    """
    H, H_kv = q.shape[1], k_cache.shape[1]
    if cache_batch_idx is not None:
        k_cache = k_cache.index_select(0, cache_batch_idx)
        v_cache = v_cache.index_select(0, cache_batch_idx)
    k, v, mask = k_cache, v_cache, None
    if k_window is not None and v_window is not None:
        k, v = torch.cat([k_cache, k_window], 2), torch.cat([v_cache, v_window], 2)
    column = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
    inside = column < window_length[:, None]
    answered = inside[:, None, :, None]  # (B, 1, W, 1), queries that get an answer
    bounds = (k_window, cache_seqlens, cache_leftpad, kv_indices)
    if any(bound is not None for bound in bounds):  # otherwise every key is visible
        listed = None
        if kv_num_blocks is not None and kv_indices is not None:
            listed = _listed_positions(kv_num_blocks, kv_indices, kv_block_size, k_cache.shape[2])
        visible = _visible_keys(
            k_cache.shape[2], None if k_window is None else inside, window_start, window_length,
            cache_seqlens, cache_leftpad, listed,
        ).expand(-1, H_kv, -1)  # fmt: skip
        # What is not visible may be uninitialised memory: select, do not multiply by zero.
        k, v = torch.where(visible[..., None], k, 0), torch.where(visible[..., None], v, 0)
        mask = visible.repeat_interleave(H // H_kv, 1)[:, :, None]  # (B, H, 1, keys)
        answered = answered & mask.any(-1, keepdim=True)
    grouped = bool(H_kv != H)  # a plain bool where the compiler's sizes are symbols
    out = scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=grouped)
    out = select(answered, out).transpose(1, 2).contiguous().transpose(1, 2)
    if not return_lse:
        return out, q.new_empty(0, dtype=torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    scores = q @ k.repeat_interleave(H // H_kv, 1).transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.float().logsumexp(-1)
    return out, torch.where(answered[..., 0], lse, -torch.inf)


def _visible_keys(
    C: int, fresh: Tensor | None, window_start: Tensor, window_length: Tensor,
    cache_seqlens: Tensor | None, cache_leftpad: Tensor | None, listed: Tensor | None,
) -> Tensor:  # fmt: skip
    """Which keys a row's queries see: (B, 1 or H_kv, C) bool, or C + W where the window's keys
    follow the cached ones. `fresh` (B, W) are the columns of those keys that are in use."""
    position = torch.arange(C, device=window_start.device)
    start, end = (x[:, None, None] for x in (window_start, window_start + window_length))
    in_window = (position >= start) & (position < end)
    visible = torch.ones_like(in_window)
    if cache_seqlens is not None:
        visible = position < cache_seqlens[:, None, None]
    if listed is not None:
        visible = visible & listed
    if fresh is None:
        visible = visible | in_window
    else:
        visible = visible & ~in_window
        visible = torch.cat([visible, fresh[:, None].expand(-1, visible.shape[1], -1)], -1)
        own_position = start + torch.arange(fresh.shape[1], device=start.device)
        position = torch.cat([position.expand(len(start), 1, -1), own_position], -1)
    if cache_leftpad is not None:
        visible = visible & (position >= cache_leftpad[:, None, None])
    return visible


def _listed_positions(kv_num_blocks: Tensor, kv_indices: Tensor, size: int, C: int) -> Tensor:
    """Which cache positions the block lists name: (B, 1 or H_kv, C) bool."""
    blocks = -(-C // size)
    entry = torch.arange(kv_indices.shape[-1], device=kv_indices.device)
    block = torch.where(entry < kv_num_blocks[..., None], kv_indices.long(), blocks)
    listed = block.new_zeros(*block.shape[:-1], blocks + 1).scatter(-1, block, 1) > 0
    positions = listed[..., :blocks].repeat_interleave(size, -1)[..., :C]
    return positions.view(len(positions), -1, C)


# --- op ---------------------------------------------------------------------------------------


def _check(a: Any) -> None:
    name = "window_attention"
    like_q = check_window(
        name, a, ("cache_seqlens", "cache_leftpad", "cache_batch_idx"), range(8, 257, 8),
        "a multiple of 8 up to 256",
    )  # fmt: skip
    (B, _, W, D), H_kv = a.q.shape, a.k_cache.shape[1]
    _check_pair(name, "k_window", a.k_window, "v_window", a.v_window)
    if a.k_window is not None:
        like_q("k_window", a.k_window, shape=(B, H_kv, W, D))
        like_q("v_window", a.v_window, shape=(B, H_kv, W, D))
    _check_pair(name, "kv_num_blocks", a.kv_num_blocks, "kv_indices", a.kv_indices)
    if a.kv_num_blocks is not None:
        lists = (B,) if a.kv_num_blocks.ndim == 1 else (B, H_kv)
        for field, shape in (("kv_num_blocks", lists), ("kv_indices", (*lists, "N"))):
            check_tensor(
                name, field, getattr(a, field), dtype=torch.int32, shape=shape, device=a.q.device,
                contiguous=True,
            )  # fmt: skip
    size, scale = a.kv_block_size, a.softmax_scale
    if size < 16 or size & (size - 1):
        raise ValueError(f"{name}: kv_block_size={size}: accepted is a power of 2 from 16")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{name}: softmax_scale={scale}: accepted is a finite number")
    if a.num_splits is not None:
        check_between(name, "num_splits", a.num_splits, 1, MAX_SPLITS)


def _check_pair(op: str, name: str, value: object, other_name: str, other: object) -> None:
    """Two arguments are both None or both not None, else a ValueError."""
    if (value is None) != (other is None):
        missing, present = (name, other_name) if value is None else (other_name, name)
        raise ValueError(
            f"{op}: {missing}=None: {present} is not None, accepted are both or neither"
        )


def _finish(a: Any, result: tuple[Tensor, Tensor]) -> Any:
    return result if a.return_lse else result[0]


window_attention: Any = op(window_attention_reference, launch=launch, check=_check, finish=_finish)
