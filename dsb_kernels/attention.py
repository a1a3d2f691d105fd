"""window_attention: window queries over cached and fresh keys, bidirectional, block-sparse.

The attention of a window step of a diffusion language model (DSB Cache, arXiv 2602.05992): the
queries of the window see every stored position, before and after them. The kernel splits the keys
as FlashDecoding does; block lists have FlexAttention's layout.

Shapes: B batch rows, H query heads, H_kv KV heads, W positions of a window (its columns), C
positions of the cache, D elements of a head.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dsb_kernels._check import FLOATS, check_between, check_tensor
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
        visible = _visible_keys(
            k_cache.shape[2], inside, window_start, window_length, *bounds, kv_num_blocks,
            kv_block_size,
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
    C: int,
    inside: Tensor,
    window_start: Tensor,
    window_length: Tensor,
    k_window: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_leftpad: Tensor | None,
    kv_indices: Tensor | None,
    kv_num_blocks: Tensor | None,
    kv_block_size: int,
) -> Tensor:
    """Which keys a row's queries see: (B, 1 or H_kv, C) bool, or C + W for a fresh window, whose
    keys follow the cached ones."""
    position = torch.arange(C, device=inside.device)
    start = window_start[:, None, None]
    in_window = (position >= start) & (position < start + window_length[:, None, None])
    stored = ~in_window
    own, own_position = in_window, position
    if k_window is not None:
        own, own_position = (
            inside[:, None],
            start + torch.arange(inside.shape[1], device=inside.device),
        )
    if cache_seqlens is not None:
        stored = stored & (position < cache_seqlens[:, None, None])
    if cache_leftpad is not None:
        stored = stored & (position >= cache_leftpad[:, None, None])
        own = own & (own_position >= cache_leftpad[:, None, None])
    if kv_indices is not None and kv_num_blocks is not None:
        stored = stored & _listed_positions(kv_num_blocks, kv_indices, kv_block_size, C)
    if k_window is None:
        return stored | own
    return torch.cat([stored, own.expand(-1, stored.shape[1], -1)], -1)


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
    check_tensor(name, "q", a.q, dtype=FLOATS, shape=("B", "H", "W", "D"), unit_stride=True)
    B, H, W, D = a.q.shape
    check = functools.partial(check_tensor, name, device=a.q.device)
    like_q = functools.partial(check, dtype=a.q.dtype, unit_stride=True)
    integers = functools.partial(check, dtype=torch.int32, contiguous=True)
    if D % 8 or not 8 <= D <= 256:
        raise ValueError(f"{name}: q has head dimension {D}: accepted is a multiple of 8 up to 256")
    batch = B if a.cache_batch_idx is None else "cache batch"
    like_q("k_cache", a.k_cache, shape=(batch, "H_kv", "C", D))
    batch, H_kv, C = a.k_cache.shape[:3]
    like_q("v_cache", a.v_cache, shape=(batch, H_kv, C, D))
    if a.k_cache.stride() != a.v_cache.stride():
        raise ValueError(
            f"{name}: v_cache has strides {a.v_cache.stride()}: accepted are k_cache's "
            f"{a.k_cache.stride()}"
        )
    if batch == 0 < B:
        raise ValueError(f"{name}: k_cache has 0 batch rows: accepted is at least 1")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"{name}: q has {H} heads: accepted is a multiple of k_cache's {H_kv}")
    if W > C:
        raise ValueError(f"{name}: q has {W} columns: accepted is at most k_cache's {C} positions")
    _check_pair(name, "k_window", a.k_window, "v_window", a.v_window)
    if a.k_window is not None:
        like_q("k_window", a.k_window, shape=(B, H_kv, W, D))
        like_q("v_window", a.v_window, shape=(B, H_kv, W, D))
    integers("window_start", a.window_start, shape=(B,))
    integers("window_length", a.window_length, shape=(B,))
    for argument in ("cache_seqlens", "cache_leftpad", "cache_batch_idx"):
        value = getattr(a, argument)
        if value is not None:
            integers(argument, value, shape=(B,))
    _check_pair(name, "kv_num_blocks", a.kv_num_blocks, "kv_indices", a.kv_indices)
    if a.kv_num_blocks is not None:
        lists = (B,) if a.kv_num_blocks.ndim == 1 else (B, H_kv)
        integers("kv_num_blocks", a.kv_num_blocks, shape=lists)
        integers("kv_indices", a.kv_indices, shape=(*lists, "N"))
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
