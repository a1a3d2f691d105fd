"""rope_write_kv: rotate the window's queries and keys and write K, V into the cache, in one launch.

Rotary embedding as in RoFormer (arXiv 2104.09864) in the two layouts in use: `is_neox` pairs
element i with i + D/2 (LLaMA, Qwen2), otherwise 2i with 2i + 1 (GPT-J). `H` = query heads,
`H_kv` = KV heads, `W` = window capacity (rows), `C` = cache capacity (positions), `D` = head dim.
`cache_batch_idx` is FlashAttention's: a batch may be some of the cache's rows, in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsb_kernels._check import check_tensor
from dsb_kernels._configs import configuration
from dsb_kernels._op import jit, launch_options, register_op, tl, triton, use_triton, wrap_triton

TILE = configuration("rope_write_kv", 0, "any")  # one for every window and architecture
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# --- definition -------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """Rotate pairs of `x` (..., D) by the angles whose cosine and sine are (..., D / 2)."""
    a, b = x.chunk(2, -1) if is_neox else (x[..., ::2], x[..., 1::2])
    first, second = a * cos - b * sin, b * cos + a * sin
    if is_neox:
        return torch.cat([first, second], -1).to(x.dtype)
    return torch.stack([first, second], -1).flatten(-2).to(x.dtype)


def rope_write_kv_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    window_start: Tensor,
    window_length: Tensor,
    position_offset: Tensor | None,
    cache_batch_idx: Tensor | None,
    is_neox: bool,
) -> Tensor:
    """In the wider of the precisions of `q` and `cos_sin_cache`; one rounding at the end."""
    W, C = q.shape[2], k_cache.shape[2]
    row = torch.arange(W, device=q.device)
    index = window_start[:, None].long() + row
    written = (row < window_length[:, None]) & (index < C)
    position = index if position_offset is None else index - position_offset[:, None]
    position = position.clamp(0, cos_sin_cache.shape[0] - 1)
    cos, sin = cos_sin_cache[position][:, None].chunk(2, -1)
    # An element that is not written stands for one that is (or, if none is, stores what the cache
    # holds): rows without a window may share a cache row with one that has a window.
    writes = written[:, :1]
    b = torch.arange(q.shape[0], device=q.device)[:, None]
    b = torch.where(writes, b, writes.int().argmax(0))
    w = torch.where(written, row, 0)
    cache_row = b if cache_batch_idx is None else cache_batch_idx.long()[b]
    at = cache_row, slice(None), index[b, w] % C
    for cache, x in ((k_cache, rotate(k, cos, sin, is_neox)), (v_cache, v)):
        cache[at] = torch.where(writes.any(), x[b, :, w], cache[at])
    return torch.where(written[:, None, :, None], rotate(q, cos, sin, is_neox), 0)


# --- kernel -----------------------------------------------------------------------------------


@jit
def _rotate_halves(x_ptr, out_ptr, cos, sin, load_mask, store_mask, HALF: tl.constexpr):
    """Rows of pairs (i, i + D / 2): each half is a contiguous load."""
    a = tl.load(x_ptr, mask=load_mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + HALF, mask=load_mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr, (a * cos - b * sin).to(dtype), mask=store_mask)
    tl.store(out_ptr + HALF, (b * cos + a * sin).to(dtype), mask=store_mask)


@jit
def _rotate_pairs(x_ptr, out_ptr, cos, sin, load_mask, store_mask):
    """Rows of pairs (2i, 2i + 1): one contiguous load, then taken apart in registers."""
    x = tl.load(x_ptr, mask=load_mask, other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    x = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (x.shape[0], x.shape[1]))
    tl.store(out_ptr, x.to(out_ptr.dtype.element_ty), mask=store_mask)


@jit
def _rope_write_kv_kernel(
    q_ptr, k_ptr, v_ptr, cos_sin_ptr, k_cache_ptr, v_cache_ptr, out_ptr,
    window_start_ptr, window_length_ptr, offset_ptr, batch_idx_ptr,
    stride_qb, stride_qh, stride_qw, stride_kb, stride_kh, stride_kw,
    stride_vb, stride_vh, stride_vw, stride_p,
    stride_kcb, stride_kch, stride_kcn, stride_vcb, stride_vch, stride_vcn,
    stride_ob, stride_oh, stride_ow, H, W, C, max_pos,
    HEAD_DIM: tl.constexpr, NEOX: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_W window rows of one head: a query head, or a key and its value head.

    Rows at or past the window's length (or the cache's end) are neither read nor written, but
    for the queries' result, which is 0 there.
    """
    head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    index = tl.load(window_start_ptr + b) + row
    written = (row < tl.minimum(tl.load(window_length_ptr + b), W)) & (index < C)
    position = index
    if offset_ptr is not None:
        position -= tl.load(offset_ptr + b)
    position = tl.minimum(tl.maximum(position, 0), max_pos - 1).to(tl.int64)
    row, index = row.to(tl.int64), index.to(tl.int64)

    HALF: tl.constexpr = HEAD_DIM // 2
    i = tl.arange(0, BLOCK_D // 2)
    half_mask = written[:, None] & (i < HALF)[None, :]
    cos_ptrs = cos_sin_ptr + position[:, None] * stride_p + i[None, :]
    cos = tl.load(cos_ptrs, mask=half_mask, other=0.0).to(tl.float32)
    sin = tl.load(cos_ptrs + HALF, mask=half_mask, other=0.0).to(tl.float32)
    d = tl.arange(0, BLOCK_D)
    full_mask = written[:, None] & (d < HEAD_DIM)[None, :]
    if head < H:
        q_ptrs = q_ptr + b * stride_qb + head * stride_qh + row[:, None] * stride_qw
        out_ptrs = out_ptr + b * stride_ob + head * stride_oh + row[:, None] * stride_ow
        inside = (row < W)[:, None]
        if NEOX:
            mask = inside & (i < HALF)[None, :]
            _rotate_halves(
                q_ptrs + i[None, :], out_ptrs + i[None, :], cos, sin, half_mask, mask, HALF
            )
        else:
            mask = inside & (d < HEAD_DIM)[None, :]
            _rotate_pairs(q_ptrs + d[None, :], out_ptrs + d[None, :], cos, sin, full_mask, mask)
    else:
        head -= H
        cache_b = b
        if batch_idx_ptr is not None:
            cache_b = tl.load(batch_idx_ptr + b).to(tl.int64)
        k_ptrs = k_ptr + b * stride_kb + head * stride_kh + row[:, None] * stride_kw
        v_ptrs = v_ptr + b * stride_vb + head * stride_vh + row[:, None] * stride_vw
        kc_ptrs = k_cache_ptr + cache_b * stride_kcb + head * stride_kch
        kc_ptrs += index[:, None] * stride_kcn
        vc_ptrs = v_cache_ptr + cache_b * stride_vcb + head * stride_vch
        vc_ptrs += index[:, None] * stride_vcn
        v = tl.load(v_ptrs + d[None, :], mask=full_mask)
        tl.store(vc_ptrs + d[None, :], v, mask=full_mask)
        if NEOX:
            _rotate_halves(
                k_ptrs + i[None, :], kc_ptrs + i[None, :], cos, sin, half_mask, half_mask, HALF
            )
        else:
            _rotate_pairs(k_ptrs + d[None, :], kc_ptrs + d[None, :], cos, sin, full_mask, full_mask)


# --- op ---------------------------------------------------------------------------------------


@register_op("rope_write_kv", mutates_args=("k_cache", "v_cache"))
def _rope_write_kv_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    window_start: Tensor,
    window_length: Tensor,
    position_offset: Tensor | None,
    cache_batch_idx: Tensor | None,
    is_neox: bool,
) -> Tensor:
    out = torch.empty_like(q)  # in the stride order of q
    if q.numel() == 0:
        return out
    if not use_triton(q, k, v, k_cache, v_cache):
        rotated = rope_write_kv_definition(
            q, k, v, cos_sin_cache, k_cache, v_cache,
            window_start, window_length, position_offset, cache_batch_idx, is_neox,
        )  # fmt: skip
        return out.copy_(rotated)  # strides as those of the kernel's result
    B, H, W, D = q.shape
    grid = (triton.cdiv(W, TILE.blocks["BLOCK_W"]), H + k.shape[1], B)
    wrap_triton(_rope_write_kv_kernel)[grid](
        q, k, v, cos_sin_cache, k_cache, v_cache, out,
        window_start, window_length, position_offset, cache_batch_idx,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], cos_sin_cache.stride(0),
        *k_cache.stride()[:3], *v_cache.stride()[:3], *out.stride()[:3],
        H, W, k_cache.shape[2], cos_sin_cache.shape[0],
        HEAD_DIM=D, NEOX=is_neox, BLOCK_D=triton.next_power_of_2(D), **TILE.blocks,
        **launch_options(TILE.num_warps, TILE.num_stages),
    )  # fmt: skip
    return out


def rope_write_kv(
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
    is_neox: bool = True,
) -> Tensor:
    """Rotate the window's Q and K; write K, V into the cache at `[start, start + length)`.

    Args:
        q: (B, H, W, D) float32, float16 or bfloat16; D even, H a multiple of H_kv.
        k, v: (B, H_kv, W, D), same dtype.
        cos_sin_cache: (max_pos, D), cosines of the D / 2 angles, then their sines; float32 or
            the dtype of `q`. The rotation is computed in float32 and rounded once.
        k_cache, v_cache: (B, H_kv, C, D), C >= W, written in place; the rest stays as it is. With
            `cache_batch_idx` their batch may be of any size from 1.
        window_start: (B,) int32, canvas index of row 0, >= 0.
        window_length: (B,) int32, rows of the window, 0 to W; rows past it are not written.
        position_offset: (B,) int32 or None (zeros); the rotary position of canvas index i is
            i - offset (left padding), held within [0, max_pos).
        cache_batch_idx: (B,) int32, the row of the caches that each row of q, k and v writes; None
            is row b itself. Rows with a window must differ (not checked); a row of length 0 writes
            nothing, and its index may be any row's.
        is_neox: pair element i with i + D / 2 (True) or 2i with 2i + 1 (False).

    Every tensor may have any strides with the last dimension contiguous.

    Returns:
        The rotated queries, (B, H, W, D), in the stride order of q; 0 in rows past the window's end
        or the cache's.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or stride.
    """
    op = "rope_write_kv"
    check_tensor(op, "q", q, dtype=DTYPES, shape=("B", "H", "W", "D"), unit_stride=True)
    B, H, W, D = q.shape
    same = {"dtype": q.dtype, "device": q.device, "unit_stride": True}
    batch = B if cache_batch_idx is None else "cache batch"
    check_tensor(op, "k_cache", k_cache, shape=(batch, "H_kv", "C", D), **same)
    batch, H_kv, C = k_cache.shape[:3]
    check_tensor(op, "v_cache", v_cache, shape=(batch, H_kv, C, D), **same)
    if batch == 0 < B:
        raise ValueError(f"{op}: k_cache has 0 batch rows: accepted is at least 1")
    for name, value in (("k", k), ("v", v)):
        check_tensor(op, name, value, shape=(B, H_kv, W, D), **same)
    check_tensor(
        op,
        "cos_sin_cache",
        cos_sin_cache,
        dtype=(torch.float32, q.dtype),
        shape=("max_pos", D),
        device=q.device,
        unit_stride=True,
    )
    if D % 2 or D == 0:
        raise ValueError(f"{op}: q has head dimension {D}: accepted is an even number")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"{op}: q has {H} heads: accepted is a multiple of k_cache's {H_kv}")
    if W > C:
        raise ValueError(
            f"{op}: q has {W} window rows: accepted is at most k_cache's {C} positions"
        )
    counts = {"dtype": torch.int32, "device": q.device, "contiguous": True}
    for name, value in (
        ("window_start", window_start),
        ("window_length", window_length),
        ("position_offset", position_offset),
        ("cache_batch_idx", cache_batch_idx),
    ):
        if value is not None:
            check_tensor(op, name, value, shape=(B,), **counts)
    return _rope_write_kv_op(
        q, k, v, cos_sin_cache, k_cache, v_cache,
        window_start, window_length, position_offset, cache_batch_idx, is_neox,
    )  # fmt: skip
