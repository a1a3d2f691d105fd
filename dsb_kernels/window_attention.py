"""window_attention: window queries over cached and fresh keys, bidirectional, block-sparse.

The attention of a window step of a diffusion language model (DSB Cache, arXiv 2602.05992): the
rows of the window see every stored position, before and after them. Split-KV as in
FlashDecoding, block lists in FlexAttention's layout. `H` = query heads, `H_kv` = KV heads,
`G = H / H_kv`, `W` = window capacity (rows), `C` = cache capacity (positions), `D` = head dim.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dsb_kernels.dispatch import (
    check_tensor,
    jit,
    launch_options,
    register_op,
    tl,
    triton,
    use_triton,
    wrap_triton,
)
from dsb_kernels.tuning import Config

MAX_SPLITS, DEFAULT_MAX_SPLITS = 128, 32
COMBINE_ROWS = 8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# --- definition -------------------------------------------------------------------------------


def listed_positions(kv_num_blocks: Tensor, kv_indices: Tensor, size: int, C: int) -> Tensor:
    """Which cache positions the block lists name: (B, C) or (B, H_kv, C) bool."""
    entry = torch.arange(kv_indices.shape[-1], device=kv_indices.device)
    blocks = -(-C // size)
    target = torch.where(entry < kv_num_blocks[..., None], kv_indices.long(), blocks)
    named = target.new_zeros(*target.shape[:-1], blocks + 1).scatter(-1, target, 1) > 0
    return named[..., :blocks].repeat_interleave(size, -1)[..., :C]


def window_attention_definition(
    q: Tensor,
    k_window: Tensor | None,
    v_window: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    window_start: Tensor,
    window_length: Tensor,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor | None,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """In the precision of `q`; a query that sees nothing gives 0 and -inf."""
    B, W = q.shape[0], q.shape[2]
    H_kv, C = k_cache.shape[1], k_cache.shape[2]
    position, row = torch.arange(C, device=q.device), torch.arange(W, device=q.device)
    start, length = window_start[:, None].long(), window_length[:, None].long()
    inside = (position >= start) & (position < start + length)
    leftpad = 0 if cache_leftpad is None else cache_leftpad[:, None]
    stored = ((position >= leftpad) & (position < cache_seqlens[:, None]))[:, None]
    if kv_indices is not None:
        named = listed_positions(kv_num_blocks, kv_indices, kv_block_size, C)
        stored = stored & named.view(B, -1, C)
    if k_window is None:
        k, v, visible = k_cache, v_cache, stored | inside[:, None]
    else:
        k, v = torch.cat([k_cache, k_window], 2), torch.cat([v_cache, v_window], 2)
        fresh = (row < length)[:, None].expand(B, stored.shape[1], W)
        visible = torch.cat([stored & ~inside[:, None], fresh], -1)
    visible = visible.expand(B, H_kv, -1)[:, :, None, None]  # (B, H_kv, 1, 1, keys)
    # What is not visible may be uninitialised memory: select, do not multiply by zero.
    k = torch.where(visible[:, :, 0, 0, :, None], k, 0)[:, :, None]
    v = torch.where(visible[:, :, 0, 0, :, None], v, 0)[:, :, None]
    scores = q.unflatten(1, (H_kv, -1)) @ k.transpose(-1, -2) * softmax_scale
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1).masked_fill((lse == -torch.inf)[..., None], 0)
    valid = (row < length)[:, None]
    out = torch.where(valid[..., None], (weights @ v).flatten(1, 2), 0)
    return out, torch.where(valid, lse.flatten(1, 2), -torch.inf)


# --- kernel -----------------------------------------------------------------------------------


@jit
def _attention_kernel(
    q_ptr, kw_ptr, vw_ptr, kc_ptr, vc_ptr, out_ptr, lse_ptr,
    window_start_ptr, window_length_ptr, seqlens_ptr, leftpad_ptr, num_blocks_ptr, indices_ptr,
    stride_qb, stride_qh, stride_qw,
    stride_kwb, stride_kwh, stride_kwn, stride_vwb, stride_vwh, stride_vwn,
    stride_kcb, stride_kch, stride_kcn, stride_vcb, stride_vch, stride_vcn,
    stride_ob, stride_os, stride_oh, stride_ow,
    stride_nb, stride_nh, stride_ib, stride_ih,
    H_kv, W, C, softmax_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr,
    WINDOW_IN_CACHE: tl.constexpr, KV_BLOCK: tl.constexpr, RETURN_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one KV head against one split of its keys.

    Row r of a KV head's G * W rows is window row r // G of the group's head r % G, so that the
    rows in use are the first ones and all of a group's share the K/V that is loaded.
    Keys are visited in blocks of BLOCK_N, cached ones first, then the window's; a block reads one
    of the two. Invariant: acc and total are sums over the visited keys weighted with
    2^(score - top), scores in units of log2, top the largest score so far.
    """
    # Neighbouring programs share K/V: they run together and find it in the L2 cache.
    split = tl.program_id(1)
    b = (tl.program_id(2) // H_kv).to(tl.int64)
    kv_head = (tl.program_id(2) % H_kv).to(tl.int64)
    window_start = tl.load(window_start_ptr + b)
    window_length = tl.minimum(tl.load(window_length_ptr + b), W)
    seqlen = tl.minimum(tl.load(seqlens_ptr + b), C)
    leftpad = 0
    if leftpad_ptr is not None:
        leftpad = tl.load(leftpad_ptr + b)
    window_end = window_start + window_length

    # The visit list: n_cached blocks of the cache, then those of the window.
    if indices_ptr is not None:
        indices_ptr += b * stride_ib + kv_head * stride_ih
        n_cached = tl.load(num_blocks_ptr + b * stride_nb + kv_head * stride_nh)
        n_cached *= KV_BLOCK // BLOCK_N
        before, first, second = n_cached, 0, 0
    else:
        # Blocks that overlap [leftpad, window_start) and [window_end, seqlen), each once.
        first = leftpad // BLOCK_N
        before_end = tl.cdiv(tl.minimum(window_start, seqlen), BLOCK_N)
        before = tl.maximum(before_end - first, 0)
        second = tl.maximum(tl.maximum(window_end, leftpad) // BLOCK_N, first + before)
        n_cached = before + tl.maximum(tl.cdiv(seqlen, BLOCK_N) - second, 0)
    n_blocks = n_cached + tl.cdiv(window_length, BLOCK_N)
    per_split = tl.cdiv(n_blocks, NUM_SPLITS)
    low = split * per_split
    high = tl.minimum(low + per_split, n_blocks)

    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    window_row = (row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    valid = window_row < window_length
    if tl.program_id(0) * BLOCK_M >= window_length * GROUP:
        high = low  # a tile past the window's end visits nothing
    d = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + b * stride_qb + head[:, None] * stride_qh + window_row[:, None] * stride_qw
    if HEAD_DIM == BLOCK_D:
        q = tl.load(q_ptrs + d[None, :], mask=valid[:, None], other=0.0)
    else:
        q = tl.load(q_ptrs + d[None, :], mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    scale = tl.cast(softmax_scale, tl.float32) * 1.4426950408889634  # log2(e)

    kc_ptr += b * stride_kcb + kv_head * stride_kch
    vc_ptr += b * stride_vcb + kv_head * stride_vch
    if WINDOW_IN_CACHE:
        kw_ptr = kc_ptr + window_start.to(tl.int64) * stride_kcn
        vw_ptr = vc_ptr + window_start.to(tl.int64) * stride_vcn
    else:
        kw_ptr += b * stride_kwb + kv_head * stride_kwh
        vw_ptr += b * stride_vwb + kv_head * stride_vwh

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for j in range(low, high):
        fresh = j >= n_cached
        if indices_ptr is not None:
            part = KV_BLOCK // BLOCK_N
            n0 = tl.load(indices_ptr + j // part, mask=j < n_cached, other=0) * KV_BLOCK
            n0 += j % part * BLOCK_N
        else:
            n0 = tl.where(j < before, first + j, second + j - before) * BLOCK_N
        n0 = tl.where(fresh, (j - n_cached) * BLOCK_N, n0)
        n = n0 + tl.arange(0, BLOCK_N)
        # Fresh: [0, window_length). Cached: [leftpad, seqlen) without the window.
        seen = (n >= tl.where(fresh, 0, leftpad)) & (n < tl.where(fresh, window_length, seqlen))
        seen &= (n < tl.where(fresh, W, window_start)) | (n >= tl.where(fresh, 0, window_end))
        k_ptr = tl.where(fresh, kw_ptr, kc_ptr)
        v_ptr = tl.where(fresh, vw_ptr, vc_ptr)
        stride_kn = tl.where(fresh, stride_kwn, stride_kcn)
        stride_vn = tl.where(fresh, stride_vwn, stride_vcn)
        k_ptr += n0.to(tl.int64) * stride_kn
        v_ptr += n0.to(tl.int64) * stride_vn
        offset = tl.arange(0, BLOCK_N)[:, None]
        mask = seen[:, None]
        if HEAD_DIM != BLOCK_D:
            mask = mask & (d < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + (offset * stride_kn + d[None, :]), mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Nothing seen yet: -inf - -inf would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(p, 1)
        v = tl.load(v_ptr + (offset * stride_vn + d[None, :]), mask=mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        top = new_top

    # Nothing seen: acc is 0 and top is -inf, as the result should be.
    total = tl.where(total == 0.0, 1.0, total)
    acc = tl.where(valid[:, None], acc / total[:, None], 0.0)
    out_ptrs = out_ptr + b * stride_ob + split * stride_os + head[:, None] * stride_oh
    out_ptrs += window_row[:, None] * stride_ow + d[None, :]
    # Partial results of rows past the window are not read.
    stored = (window_row < W) if NUM_SPLITS == 1 else valid
    mask = stored[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if RETURN_LSE or NUM_SPLITS > 1:
        lse = (top + tl.log2(total)) * 0.6931471805599453  # ln(2)
        lse = tl.where(valid, lse, float("-inf"))
        lse_ptrs = lse_ptr + ((b * NUM_SPLITS + split) * H_kv * GROUP + head) * W + window_row
        tl.store(lse_ptrs, lse, mask=stored)


@jit
def _combine_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, window_length_ptr,
    stride_ob, stride_oh, stride_ow, H, W,
    HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, RETURN_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the splits of BLOCK_M of a batch row's H * W query rows, in a fixed order."""
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, window_row = (row // W).to(tl.int64), (row % W).to(tl.int64)
    inside = row < H * W
    valid = inside & (window_row < tl.load(window_length_ptr + b))
    d = tl.arange(0, BLOCK_D)
    mask = (d < HEAD_DIM)[None, :]
    partial_lse_ptrs = partial_lse_ptr + b * NUM_SPLITS * H * W + row
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for split in range(NUM_SPLITS):
        lse = tl.load(partial_lse_ptrs + split * H * W, mask=valid, other=float("-inf"))
        top = tl.maximum(top, lse)
    shift = tl.where(top == float("-inf"), 0.0, top)
    partial_ptrs = partial_ptr + (b * NUM_SPLITS * H * W + row)[:, None] * HEAD_DIM + d[None, :]
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for split in range(NUM_SPLITS):
        lse = tl.load(partial_lse_ptrs + split * H * W, mask=valid, other=float("-inf"))
        weight = tl.exp(lse - shift)
        total += weight
        part = tl.load(partial_ptrs + split * H * W * HEAD_DIM, mask=valid[:, None] & mask, other=0)
        acc += part * weight[:, None]
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    out_ptrs = out_ptr + b * stride_ob + head[:, None] * stride_oh + window_row[:, None] * stride_ow
    tl.store(out_ptrs + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & mask)
    if RETURN_LSE:
        tl.store(lse_ptr + b * H * W + row, top + tl.log(total), mask=inside)


# --- op ---------------------------------------------------------------------------------------


# Head dim up to -> query rows of a KV head (G * W) up to -> tile. 64 rows and up run on wgmma; K/V
# tiles of 64 positions, two ahead in flight, saturate memory with one program per SM.
TILES: dict[int, dict[int, Config]] = {
    128: {
        16: Config({"BLOCK_M": 16, "BLOCK_N": 64}, num_warps=4, num_stages=3),
        32: Config({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=4, num_stages=3),
        64: Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3),
        1 << 62: Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
    },
    256: {
        16: Config({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=4, num_stages=3),
        64: Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=3),
        1 << 62: Config({"BLOCK_M": 128, "BLOCK_N": 32}, num_warps=8, num_stages=2),
    },
}
FLOAT32_TILE = Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4)  # tests only: no tensor cores


def tile_of(rows: int, D: int, dtype: torch.dtype) -> Config:
    """The tile for `rows` query rows of a KV head."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    classes = TILES[128 if D <= 128 else 256]
    return next(config for limit, config in classes.items() if rows <= limit)


def choose_splits(programs: int, sm_count: int) -> int:
    """The fewest splits within 85% of the best share of busy SMs (FlashAttention-3's rule)."""
    share = []
    for splits in range(1, DEFAULT_MAX_SPLITS + 1):
        waves = programs * splits / sm_count
        share.append(waves / math.ceil(waves))
    return next(i for i, s in enumerate(share, 1) if s >= 0.85 * max(share))


@functools.cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors; the interpreter stands in for an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@register_op("window_attention")
def _window_attention_op(
    q: Tensor,
    k_window: Tensor | None,
    v_window: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    window_start: Tensor,
    window_length: Tensor,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor | None,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_block_size: int,
    softmax_scale: float,
    num_splits: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    if not use_triton(q, k_window, v_window, k_cache, v_cache):
        out, lse = window_attention_definition(
            q, k_window, v_window, k_cache, v_cache, window_start, window_length, cache_seqlens,
            cache_leftpad, kv_num_blocks, kv_indices, kv_block_size, softmax_scale,
        )  # fmt: skip
        lse = lse.float() if return_lse else q.new_empty(0, dtype=torch.float32)
        return torch.empty_like(q).copy_(out), lse  # strides as those of the kernel's result
    B, H, W, D = q.shape
    H_kv, C = k_cache.shape[1:3]
    out = torch.empty_like(q)
    lse = q.new_empty((B, H, W) if return_lse else 0, dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    config = tile_of(H // H_kv * W, D, q.dtype)
    blocks = dict(config.blocks, BLOCK_D=max(64, triton.next_power_of_2(D)))
    if kv_indices is not None:
        blocks["BLOCK_N"] = min(blocks["BLOCK_N"], kv_block_size)
    tiles = triton.cdiv(H // H_kv * W, blocks["BLOCK_M"])
    if num_splits is None:
        num_splits = choose_splits(B * H_kv * tiles, sm_count(q.device))
    target, target_lse = out, lse
    if num_splits > 1:
        target = q.new_empty(B, num_splits, H, W, D, dtype=torch.float32)
        target_lse = q.new_empty(B, num_splits, H, W, dtype=torch.float32)
    window = (k_cache, v_cache) if k_window is None else (k_window, v_window)
    lists = (0, 0, 0, 0)
    if kv_indices is not None:
        per_head = kv_indices.ndim == 3
        lists = (
            kv_num_blocks.stride(0), kv_num_blocks.stride(1) if per_head else 0,
            kv_indices.stride(0), kv_indices.stride(1) if per_head else 0,
        )  # fmt: skip
    wrap_triton(_attention_kernel)[(tiles, num_splits, B * H_kv)](
        q, *window, k_cache, v_cache, target, target_lse,
        window_start, window_length, cache_seqlens, cache_leftpad, kv_num_blocks, kv_indices,
        *q.stride()[:3], *window[0].stride()[:3], *window[1].stride()[:3],
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        target.stride(0), 0 if num_splits == 1 else target.stride(1), *target.stride()[-3:-1],
        *lists, H_kv, W, C, softmax_scale,
        GROUP=H // H_kv, HEAD_DIM=D, NUM_SPLITS=num_splits, WINDOW_IN_CACHE=k_window is None,
        KV_BLOCK=kv_block_size, RETURN_LSE=return_lse,
        **blocks, **launch_options(config.num_warps, config.num_stages),
    )  # fmt: skip
    if num_splits > 1:
        wrap_triton(_combine_kernel)[(triton.cdiv(H * W, COMBINE_ROWS), B)](
            target, target_lse, out, lse, window_length, *out.stride()[:3], H, W,
            HEAD_DIM=D, NUM_SPLITS=num_splits, RETURN_LSE=return_lse,
            BLOCK_M=COMBINE_ROWS, BLOCK_D=blocks["BLOCK_D"], **launch_options(4, 1),
        )  # fmt: skip
    return out, lse


def window_attention(
    q: Tensor,
    k_window: Tensor | None,
    v_window: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    window_start: Tensor,
    window_length: Tensor,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor | None = None,
    kv_num_blocks: Tensor | None = None,
    kv_indices: Tensor | None = None,
    kv_block_size: int = 64,
    softmax_scale: float | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the window's rows to everything stored and to the window itself.

    A query row w < window_length sees the cached positions in [leftpad, seqlens) outside
    [window_start, window_start + window_length), and the fresh rows below window_length. Nothing
    else is read: the rest of the cache may hold anything.

    Args:
        q: (B, H, W, D) bfloat16, float16 or float32; D a multiple of 8 up to 256.
        k_window, v_window: (B, H_kv, W, D), H a multiple of H_kv; both None when the window's
            rows have been written into the cache already, which is then read there too.
        k_cache, v_cache: (B, H_kv, C, D).
        window_start: (B,) int32, canvas index of row 0, 0 to C - window_length.
        window_length: (B,) int32, rows of the window, 0 to W.
        cache_seqlens: (B,) int32, end of what is stored, 0 to C.
        cache_leftpad: (B,) int32 or None (zeros), start of what is stored.
        kv_num_blocks, kv_indices: (B,) and (B, N), or (B, H_kv) and (B, H_kv, N) int32: the KV
            blocks visited outside the window (no block twice); both None visits all.
        kv_block_size: positions of a listed block, a power of two from 16.
        softmax_scale: None is 1 / sqrt(D).
        num_splits: parts that the keys are split into; None derives it from B, H, W and the GPU,
            never from the cache or its contents, so that results are reproducible.
        return_lse: also return the log-sum-exp of the scaled scores.

    Every tensor may have any strides with the last dimension contiguous.

    Returns:
        out (B, H, W, D), 0 in rows past window_length and where nothing is visible; with
        `return_lse` also lse (B, H, W) float32, natural logarithm, -inf in those rows.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device, stride or value.
    """
    op = "window_attention"
    rows = {"device": q.device, "dtype": q.dtype, "unit_stride": True}
    check_tensor(op, "q", q, dtype=DTYPES, shape=("B", "H", "W", "D"), unit_stride=True)
    B, H, W, D = q.shape
    if D % 8 or not 8 <= D <= 256:
        raise ValueError(f"{op}: q has head dimension {D}: accepted is a multiple of 8 up to 256")
    check_tensor(op, "k_cache", k_cache, shape=(B, "H_kv", "C", D), **rows)
    H_kv, C = k_cache.shape[1:3]
    check_tensor(op, "v_cache", v_cache, shape=(B, H_kv, C, D), **rows)
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"{op}: q has {H} heads: accepted is a multiple of k_cache's {H_kv}")
    if W > C:
        raise ValueError(f"{op}: q has {W} window rows: accepted is at most k_cache's {C}")
    _check_pair(op, "k_window", k_window, "v_window", v_window)
    if k_window is not None:
        check_tensor(op, "k_window", k_window, shape=(B, H_kv, W, D), **rows)
        check_tensor(op, "v_window", v_window, shape=(B, H_kv, W, D), **rows)
    counts = {"device": q.device, "dtype": torch.int32}
    check_tensor(op, "window_start", window_start, shape=(B,), **counts)
    check_tensor(op, "window_length", window_length, shape=(B,), **counts)
    check_tensor(op, "cache_seqlens", cache_seqlens, shape=(B,), **counts)
    if cache_leftpad is not None:
        check_tensor(op, "cache_leftpad", cache_leftpad, shape=(B,), **counts)
    _check_pair(op, "kv_num_blocks", kv_num_blocks, "kv_indices", kv_indices)
    if kv_num_blocks is not None:
        lists = (B,) if kv_num_blocks.ndim == 1 else (B, H_kv)
        check_tensor(op, "kv_num_blocks", kv_num_blocks, shape=lists, **counts)
        check_tensor(op, "kv_indices", kv_indices, shape=(*lists, "N"), **counts)
    if kv_block_size < 16 or kv_block_size & (kv_block_size - 1):
        raise ValueError(f"{op}: kv_block_size={kv_block_size}: accepted is a power of 2 from 16")
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(D)
    if not math.isfinite(softmax_scale):
        raise ValueError(f"{op}: softmax_scale={softmax_scale}: accepted is a finite number")
    if num_splits is not None and not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"{op}: num_splits={num_splits}: accepted are 1 to {MAX_SPLITS} or None")
    out, lse = _window_attention_op(
        q, k_window, v_window, k_cache, v_cache, window_start, window_length, cache_seqlens,
        cache_leftpad, kv_num_blocks, kv_indices, kv_block_size, softmax_scale, num_splits,
        return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_pair(op: str, name: str, value: object, other_name: str, other: object) -> None:
    """Both or neither are given."""
    if (value is None) != (other is None):
        missing, given = (name, other_name) if value is None else (other_name, name)
        raise ValueError(f"{op}: {missing}=None: {given} is given, accepted are both or neither")
