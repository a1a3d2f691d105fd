"""rope_write_kv: rotate the window's queries and keys, and write its K and V into the cache.

The rotary embedding is RoFormer's (arXiv 2104.09864) in the layout of LLaMA and Qwen2, which pairs
element i of a head with element i + D / 2.

Shapes: B batch rows, H query heads, H_kv KV heads, W positions of a window, C positions of the
cache, D elements of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsb_kernels._check import check_tensor, check_window
from dsb_kernels._configs import configuration
from dsb_kernels._launch import wait_for_previous, wrap_triton
from dsb_kernels._op import jit, op, tl, triton

EVEN = range(2, 1 << 31, 2)
TILE = configuration("rope_write_kv", 0, "any")  # every window and architecture takes the same

# --- definition -------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of x (..., D) by the angles of these cosines and sines,
    (..., D / 2). It computes in the wider of the two dtypes. If cosines and sines are float32, it
    rounds a number once, to x's dtype; if they have x's dtype, it rounds every operation."""
    first, second = x.chunk(2, -1)
    turned = x * torch.cat([cos, cos], -1)  # in the stride order of x
    turned_first, turned_second = turned.chunk(2, -1)
    turned_first -= second * sin
    turned_second += first * sin
    return turned.to(x.dtype)


def rope_write_kv_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    window_start: Tensor,
    window_length: Tensor,
    position_offset: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """Rotate the window's Q and K; write K, V into the cache at `[start, start + length)`.

    Args:
        q: (B, H, W, D) float32, float16 or bfloat16; D even, H a multiple of H_kv.
        k, v: (B, H_kv, W, D), same dtype.
        cos_sin_cache: (max_pos, D), max_pos >= 1, for each rotary position the cosines of the D / 2
            angles, then their sines; float32 or the dtype of `q`. The kernel computes in float32
            and rounds a number once. So does the definition if `cos_sin_cache` is float32;
            otherwise it computes in the dtype of `q`.
        k_cache, v_cache: (B, H_kv, C, D), both with the same strides, C >= W. The op writes the
            window's positions in place and no others. With `cache_batch_idx` the first dimension
            may have any size from 1.
        window_start: (B,) int32, the canvas position of the window's first column, >= 0.
        window_length: (B,) int32, how many columns the window uses, 0 to W. The op writes no later
            column.
        position_offset: (B,) int32, the left padding: the rotary position of canvas position i is
            i - position_offset, clamped to [0, max_pos - 1]. None means zeros.
        cache_batch_idx: (B,) int32, the batch row of the cache that each row of q, k and v writes.
            None means that row b writes batch row b. Rows that have a window must have different
            indices (not checked). A row of length 0 writes nothing, and its index may be any.
        position: (B, W) int32, contiguous, the canvas position of each column, >= 0, no position
            twice in a row (not checked). None means that the columns are neighbours from
            window_start on.

    The (B,) arguments are contiguous. The other tensors may have any strides with the last
    dimension contiguous.

    Returns:
        The rotated queries, (B, H, W, D), in the stride order of q. They are 0 in columns at or
        past window_length, and in columns past the end of the cache.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or stride.
    """
    (B, _, W, _), C = q.shape, k_cache.shape[2]
    angle = window_start[:, None] + torch.arange(W, dtype=torch.int32, device=q.device)
    angle = angle if position is None else position
    if position_offset is not None:
        angle = angle - position_offset[:, None]
    angle = angle.clamp(0, len(cos_sin_cache) - 1)
    cos_sin = cos_sin_cache.index_select(0, angle.flatten()).view(B, 1, W, q.shape[3])
    cos, sin = cos_sin.chunk(2, -1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    rows = range(B) if cache_batch_idx is None else cache_batch_idx.tolist()
    for b, (row, start, length) in enumerate(
        zip(rows, window_start.tolist(), window_length.tolist(), strict=True)
    ):
        n = max(0, min(length, W, C - start) if position is None else min(length, W))
        if n and position is not None:
            stored = position[b, :n] < C
            index = position[b, :n][stored].long()
            k_cache[row, :, index] = k[b, :, :n][:, stored]
            v_cache[row, :, index] = v[b, :, :n][:, stored]
            q[b, :, :n][:, ~stored] = 0
        elif n:
            k_cache[row, :, start : start + n] = k[b, :, :n]
            v_cache[row, :, start : start + n] = v[b, :, :n]
        q[b, :, n:] = 0
    return q


# --- kernel -----------------------------------------------------------------------------------


@jit
def _rotate_halves(x_ptr, out_ptr, cos, sin, load_mask, store_mask, HALF: tl.constexpr):
    """Rotate the pairs (i, i + D / 2) of some columns. Each half is one contiguous load."""
    a = tl.load(x_ptr, mask=load_mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + HALF, mask=load_mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr, (a * cos - b * sin).to(dtype), mask=store_mask)
    tl.store(out_ptr + HALF, (b * cos + a * sin).to(dtype), mask=store_mask)


@jit
def _rope_write_kv_kernel(
    q_ptr, k_ptr, v_ptr, cos_sin_ptr, k_cache_ptr, v_cache_ptr, out_ptr,
    window_start_ptr, window_length_ptr, offset_ptr, batch_idx_ptr, position_ptr,
    stride_qb, stride_qh, stride_qw, stride_kb, stride_kh, stride_kw,
    stride_vb, stride_vh, stride_vw, stride_p, stride_cb, stride_ch, stride_cn,
    stride_ob, stride_oh, stride_ow, H, W, C, max_pos,
    HEAD_DIM: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Program (tile, head, batch row): take BLOCK_W columns of a query head, or of a KV head.

    Columns at or past the window's length (or the cache's end) are neither read nor written, except
    that the rotated queries are 0 there.
    """
    wait_for_previous(PDL)
    head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    index = tl.load(window_start_ptr + b) + column
    if position_ptr is not None:
        index = tl.load(position_ptr + b * W + column, mask=column < W, other=0)
    written = (column < tl.minimum(tl.load(window_length_ptr + b), W)) & (index < C)
    position = index
    if offset_ptr is not None:
        position -= tl.load(offset_ptr + b)
    position = tl.minimum(tl.maximum(position, 0), max_pos - 1).to(tl.int64)
    column, index = column.to(tl.int64), index.to(tl.int64)

    HALF: tl.constexpr = HEAD_DIM // 2
    i = tl.arange(0, BLOCK_D // 2)
    half_mask = written[:, None] & (i < HALF)[None, :]
    cos_ptrs = cos_sin_ptr + position[:, None] * stride_p + i[None, :]
    cos = tl.load(cos_ptrs, mask=half_mask, other=0.0).to(tl.float32)
    sin = tl.load(cos_ptrs + HALF, mask=half_mask, other=0.0).to(tl.float32)
    if head < H:
        q_ptrs = q_ptr + b * stride_qb + head * stride_qh + column[:, None] * stride_qw
        out_ptrs = out_ptr + b * stride_ob + head * stride_oh + column[:, None] * stride_ow
        mask = (column < W)[:, None] & (i < HALF)[None, :]
        _rotate_halves(q_ptrs + i[None, :], out_ptrs + i[None, :], cos, sin, half_mask, mask, HALF)
    else:
        head -= H
        cache_row = b
        if batch_idx_ptr is not None:
            cache_row = tl.load(batch_idx_ptr + b).to(tl.int64)
        k_ptrs = k_ptr + b * stride_kb + head * stride_kh + column[:, None] * stride_kw
        v_ptrs = v_ptr + b * stride_vb + head * stride_vh + column[:, None] * stride_vw
        offset = cache_row * stride_cb + head * stride_ch + index[:, None] * stride_cn
        d = tl.arange(0, BLOCK_D)
        full_mask = written[:, None] & (d < HEAD_DIM)[None, :]
        v = tl.load(v_ptrs + d[None, :], mask=full_mask)
        tl.store(v_cache_ptr + offset + d[None, :], v, mask=full_mask)
        cache_ptrs = k_cache_ptr + offset + i[None, :]
        _rotate_halves(k_ptrs + i[None, :], cache_ptrs, cos, sin, half_mask, half_mask, HALF)


# --- op ---------------------------------------------------------------------------------------


def _launch(a: Any) -> Tensor:
    out = torch.empty_like(a.q)  # in the stride order of q
    if a.q.numel() == 0:
        return out
    B, H, W, D = a.q.shape
    grid = (triton.cdiv(W, TILE.blocks["BLOCK_W"]), H + a.k.shape[1], B)
    wrap_triton(_rope_write_kv_kernel)[grid](
        a.q, a.k, a.v, a.cos_sin_cache, a.k_cache, a.v_cache, out,
        a.window_start, a.window_length, a.position_offset, a.cache_batch_idx, a.position,
        *a.q.stride()[:3], *a.k.stride()[:3], *a.v.stride()[:3], a.cos_sin_cache.stride(0),
        *a.k_cache.stride()[:3], *out.stride()[:3], H, W, a.k_cache.shape[2], len(a.cos_sin_cache),
        HEAD_DIM=D, BLOCK_D=triton.next_power_of_2(D), **TILE.options(),
    )  # fmt: skip
    return out


def _check(a: Any) -> None:
    like_q = check_window(
        "rope_write_kv", a, ("position_offset", "cache_batch_idx"), EVEN, "an even number"
    )
    (B, _, W, D), H_kv = a.q.shape, a.k_cache.shape[1]
    like_q("k", a.k, shape=(B, H_kv, W, D))
    like_q("v", a.v, shape=(B, H_kv, W, D))
    if a.position is not None:
        check_tensor("rope_write_kv", "position", a.position, dtype=torch.int32, shape=(B, W),
                     device=a.q.device, contiguous=True)  # fmt: skip
    like_q("cos_sin_cache", a.cos_sin_cache, dtype=(torch.float32, a.q.dtype), shape=("max_pos", D))
    if len(a.cos_sin_cache) < 1:
        raise ValueError("rope_write_kv: cos_sin_cache has no positions: accepted is max_pos >= 1")


rope_write_kv = op(
    rope_write_kv_reference, launch=_launch, check=_check, mutates_args=("k_cache", "v_cache"),
    fake=lambda a: torch.empty_like(a.q),
)  # fmt: skip
