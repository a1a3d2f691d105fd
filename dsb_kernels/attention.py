"""window_attention: the queries of a window attend to the cache and to the window itself.

This is the attention of a window step of a diffusion language model (DSB Cache, arXiv 2602.05992).
It is bidirectional: a query sees stored positions before and after its own. Lists of KV blocks, in
FlexAttention's layout, make it sparse. The kernel splits the keys as FlashDecoding does.

Shapes: B batch rows, H query heads, H_kv KV heads, W positions of a window (its columns), C
positions of the cache, D elements of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dsb_kernels._check import check_between, check_stride, check_tensor, check_window
from dsb_kernels._configs import largest_block
from dsb_kernels._op import op
from dsb_kernels.attention_kernel import MAX_SPLITS, launch

TILE_KEYS = largest_block("window_attention", "BLOCK_N")  # that a program loads at once

# --- definition -------------------------------------------------------------------------------


BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(x: Tensor) -> Tensor:
    """A view of floating-point numbers as integers of the same width."""
    return x.view(BITS[x.dtype.itemsize])


def bit_mask(condition: Tensor, x: Tensor) -> Tensor:
    """Integers as wide as the numbers of `x`, with all bits 1 where the condition is True, else 0.

    `bits & mask` selects as `torch.where` does. But a CPU computes `torch.where` one number at a
    time, and bitwise operations on many at once: 544 rows of 8 heads take 80 us instead of 230.
    """
    return -condition.to(BITS[x.dtype.itemsize])


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
    kv_visible: Tensor | None = None,
    softmax_scale: float | None = None,
    num_splits: int | None = None,
    next_weight: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of the window's queries to every stored position and to the window itself.

    A query in a column below window_length sees two sets of keys: those of the cached positions in
    [cache_leftpad, cache_seqlens) outside [window_start, window_start + window_length), and the
    window's own keys, at positions of this range from cache_leftpad on, and nothing else. If the
    window is the whole canvas, this is full attention without the padding.

    Args:
        q: (B, H, W, D) bfloat16, float16 or float32; D a multiple of 8 up to 256.
        k_window, v_window: (B, H_kv, W, D), H a multiple of H_kv; None where the cache has them.
        k_cache, v_cache: (B, H_kv, C, D), both with the same strides. With `cache_batch_idx` their
            first dimension may have any size from 1.
        window_start: (B,) int32, the canvas position of column 0, 0 to C - window_length.
        window_length: (B,) int32, how many columns the window uses, 0 to W.
        cache_seqlens: (B,) int32, one past the last stored position, 0 to C. None means C.
        cache_leftpad: (B,) int32, the first stored position. None means zeros.
        cache_batch_idx: (B,) int32, the batch row of the cache that each row of q reads, unless its
            length is 0. None means that row b reads batch row b.
        kv_num_blocks, kv_indices: (B,) and (B, N), or (B, H_kv) and (B, H_kv, N) int32, contiguous:
            the KV blocks that queries visit outside the window, none of them twice. If both are
            None, queries visit every KV block. `dsb_kernels.block_lists` makes such lists.
        kv_block_size: how many positions a listed KV block has, a power of two from 16.
        kv_visible: (B, C) bool, contiguous, which positions of the cache queries see, the window's
            own included. None means all. It needs k_window and v_window to be None.
        softmax_scale: the scores' factor. None means 1 / sqrt(D).
        num_splits: into how many splits the kernel divides the keys. None lets shapes, dtype and
            GPU decide, never C or the cache's content, so that results are reproducible.
        next_weight: (F, H * D) of q's dtype, the weight of the linear layer that comes next, or
            None. Half of it may be asked into a GPU's L2 cache; no result depends on it.
        return_lse: whether to return also the log-sum-exp (lse) of the scaled scores.

    Tensors that are not called contiguous may have any strides with the last dimension contiguous,
    but neighbouring keys (and values) may be at most 2**26 elements apart.

    Returns:
        out (B, H, W, D), a transposed view of (B, W, H, D), 0 from column window_length on, and
        where a query sees no key. The lse (B, H, W) float32, a natural logarithm, is -inf there.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device, stride or value.

    Example:
        Attend to the KV blocks before the window and to one KV block of 64 positions after it:

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
    answered = inside[:, None, :, None]  # (B, 1, W, 1), whether the query gets an answer
    bounds = (k_window, cache_seqlens, cache_leftpad, kv_indices, kv_visible)
    if any(bound is not None for bound in bounds):  # otherwise every key is visible
        visible = _visible_keys(
            k_cache.shape[2], None if k_window is None else inside, window_start, window_length,
            cache_seqlens, cache_leftpad, kv_num_blocks, kv_indices, kv_block_size,
        )  # fmt: skip
        visible = visible if kv_visible is None else visible & kv_visible[:, None]
        visible = visible.expand(-1, H_kv, -1)
        # Keys that are not visible may be uninitialised memory, and 0 * NaN is NaN: so the values
        # are replaced, not multiplied by zero.
        k, v = torch.where(visible[..., None], k, 0), torch.where(visible[..., None], v, 0)
        mask = visible.repeat_interleave(H // H_kv, 1)[:, :, None]  # (B, H, 1, keys)
        answered = answered & mask.any(-1, keepdim=True)
    grouped = bool(H_kv != H)  # while torch.compile traces, H_kv != H is a symbol and no bool
    out = scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=grouped)
    bits_of(out).bitwise_and_(bit_mask(answered, out))  # 0 where a query gets no answer
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    if not return_lse:
        return out, q.new_empty(0, dtype=torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    return out, torch.where(answered[..., 0], _lse(q, k, mask, scale), -torch.inf)


def _lse(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The log-sum-exp of each query's scores, (B, H, W) float32."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.float().logsumexp(-1)


def _visible_keys(
    C: int, fresh: Tensor | None, window_start: Tensor, window_length: Tensor,
    cache_seqlens: Tensor | None, cache_leftpad: Tensor | None,
    kv_num_blocks: Tensor | None, kv_indices: Tensor | None, kv_block_size: int,
) -> Tensor:  # fmt: skip
    """Which keys the queries of a row see, (B, 1 or H_kv, C) bool.

    If the window's keys follow the cached ones, the last dimension is C + W, and `fresh` (B, W)
    says which columns the window uses. If not, `fresh` is None.
    """
    position = torch.arange(C, device=window_start.device)
    start, end = (x[:, None, None] for x in (window_start, window_start + window_length))
    in_window = (position >= start) & (position < end)
    stored = torch.ones_like(in_window)
    if cache_seqlens is not None:
        stored = position < cache_seqlens[:, None, None]
    if kv_num_blocks is not None and kv_indices is not None:
        stored = stored & _listed_positions(kv_num_blocks, kv_indices, kv_block_size, C)
    if fresh is None:
        visible = stored | in_window
    else:
        own = fresh[:, None].expand(-1, stored.shape[1], -1)
        visible = torch.cat([stored & ~in_window, own], -1)
        own_position = start + torch.arange(fresh.shape[1], device=start.device)
        position = torch.cat([position.expand(len(start), 1, -1), own_position], -1)
    if cache_leftpad is not None:
        visible = visible & (position >= cache_leftpad[:, None, None])
    return visible


def _listed_positions(kv_num_blocks: Tensor, kv_indices: Tensor, size: int, C: int) -> Tensor:
    """Which cache positions the lists of KV blocks name: (B, 1 or H_kv, C) bool."""
    blocks = -(-C // size)
    entry = torch.arange(kv_indices.shape[-1], device=kv_indices.device)
    block = torch.where(entry < kv_num_blocks[..., None], kv_indices.long(), blocks)
    # A block per position, `listed[..., position // size]`, would be plainer, but Inductor of torch
    # 2.13 leaves the last positions unwritten where `size` does not divide C.
    position = block[..., None] * size + torch.arange(size, device=block.device)
    listed = block.new_zeros(*block.shape[:-1], (blocks + 1) * size)
    listed = listed.scatter(-1, position.flatten(-2), 1)[..., :C] > 0
    return listed if listed.ndim == 3 else listed[:, None]


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
        check_stride(name, "k_window", a.k_window, 2, TILE_KEYS)
        check_stride(name, "v_window", a.v_window, 2, TILE_KEYS)
    check_stride(name, "k_cache", a.k_cache, 2, TILE_KEYS)  # v_cache has the same strides
    _check_pair(name, "kv_num_blocks", a.kv_num_blocks, "kv_indices", a.kv_indices)
    if a.kv_num_blocks is not None:
        per_head = isinstance(a.kv_num_blocks, Tensor) and a.kv_num_blocks.ndim > 1
        lists = (B, H_kv) if per_head else (B,)
        for field, shape in (("kv_num_blocks", lists), ("kv_indices", (*lists, "N"))):
            check_tensor(
                name, field, getattr(a, field), dtype=torch.int32, shape=shape, device=a.q.device,
                contiguous=True,
            )  # fmt: skip
    if a.kv_visible is not None:
        check_tensor(name, "kv_visible", a.kv_visible, dtype=torch.bool,
                     shape=(B, a.k_cache.shape[2]), device=a.q.device, contiguous=True)  # fmt: skip
        if a.k_window is not None:
            raise ValueError(f"{name}: k_window with kv_visible: accepted is None")
    if a.next_weight is not None:
        like_q("next_weight", a.next_weight, shape=("F", a.q.shape[1] * D))
    size, scale = a.kv_block_size, a.softmax_scale
    if size < 16 or size & (size - 1):
        raise ValueError(f"{name}: kv_block_size={size}: accepted is a power of 2 from 16")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{name}: softmax_scale={scale}: accepted is a finite number")
    if a.num_splits is not None:
        check_between(name, "num_splits", a.num_splits, 1, MAX_SPLITS)


def _check_pair(op: str, name: str, value: object, other_name: str, other: object) -> None:
    """Raise ValueError if one of two arguments is None and the other is not."""
    if (value is None) != (other is None):
        missing, present = (name, other_name) if value is None else (other_name, name)
        raise ValueError(
            f"{op}: {missing}=None: {present} is not None, accepted are both or neither"
        )


def _finish(a: Any, result: tuple[Tensor, Tensor]) -> Any:
    return result if a.return_lse else result[0]


window_attention: Any = op(window_attention_reference, launch=launch, check=_check, finish=_finish)
