"""The Triton kernels of window_attention: attention over splits of the keys, and their combine.

They restate the definition in `dsb_kernels.attention` without sharing code with it, whose
shape letters they use.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dsb_kernels._configs import (
    Config,
    architecture_of,
    configuration,
)
from dsb_kernels._op import jit, launch_options, tl, triton, wrap_triton

MAX_SPLITS, DEFAULT_MAX_SPLITS = 128, 32
COMBINE_ROWS = 8
FRUGAL_POSITIONS = 4096  # where partial results should stay within a tenth of K and V


def tile_of(rows: int, D: int, dtype: torch.dtype, architecture: str) -> Config:
    """The tile for `rows` query rows of a KV head."""
    kind = "float32" if dtype == torch.float32 else "128" if D <= 128 else "256"
    return configuration(f"window_attention {kind}", rows, architecture)


def choose_splits(programs: int, sm_count: int, rows: int) -> int:
    """The fewest splits within 85% of the best share of busy SMs (FlashAttention-3's rule).

    Partial results are `rows` (query rows of a KV head) x splits / positions of the bytes of K and
    V. Where fewer splits keep them within a tenth, the SMs may be busy to 65% of the best share.
    """
    share = []
    for splits in range(1, DEFAULT_MAX_SPLITS + 1):
        waves = programs * splits / sm_count
        share.append(waves / math.ceil(waves))
    splits = next(i for i, s in enumerate(share, 1) if s >= 0.85 * max(share))
    frugal = min(splits, max(1, FRUGAL_POSITIONS // (10 * rows)))
    return frugal if share[frugal - 1] >= 0.65 * max(share) else splits


@functools.cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors; the interpreter stands in for an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@jit
def _attention_kernel(
    q_ptr, kw_ptr, vw_ptr, kc_ptr, vc_ptr, out_ptr, lse_ptr,
    window_start_ptr, window_length_ptr, seqlens_ptr, leftpad_ptr, batch_idx_ptr,
    num_blocks_ptr, indices_ptr,
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
    2^(score * scale - top), top the largest score * scale so far, scale in units of log2.
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

    # The visit list: the cached positions before the window, those after it, then the window's own
    # rows (counted from its start), each in blocks from its first position on, so that a block is
    # cut off at its end alone. Or listed blocks of the cache, then the window's rows.
    before_end = tl.minimum(window_start, seqlen)
    after, after_end = tl.maximum(window_end, leftpad), seqlen
    own, own_end = tl.maximum(leftpad - window_start, 0), window_length
    if indices_ptr is not None:
        indices_ptr += b * stride_ib + kv_head * stride_ih
        n_before = tl.load(num_blocks_ptr + b * stride_nb + kv_head * stride_nh)
        n_before *= KV_BLOCK // BLOCK_N
        n_cached = n_before
    else:
        if WINDOW_IN_CACHE:
            # What is stored goes on through the window: one range, the window in its midst.
            through = window_start <= seqlen
            before_end = tl.where(through, tl.maximum(window_end, seqlen), before_end)
            after_end = tl.where(through, after, after_end)
            own_end = tl.where(through, own, own_end)
        n_before = tl.cdiv(tl.maximum(before_end - leftpad, 0), BLOCK_N)
        n_cached = n_before + tl.cdiv(tl.maximum(after_end - after, 0), BLOCK_N)
    n_blocks = n_cached + tl.cdiv(tl.maximum(own_end - own, 0), BLOCK_N)
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
    # The largest score is found before it is scaled: scale > 0. A scale of 0 makes scores equal,
    # and so does a tiny one, which leaves -inf what it is.
    q = tl.where(scale < 0, -q, q)
    scale = tl.maximum(tl.abs(scale), 1e-37)

    cache_b = b
    if batch_idx_ptr is not None:
        cache_b = tl.load(batch_idx_ptr + b).to(tl.int64)
    kc_ptr += cache_b * stride_kcb + kv_head * stride_kch
    vc_ptr += cache_b * stride_vcb + kv_head * stride_vch
    if not WINDOW_IN_CACHE:
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
            stop = seqlen
        else:
            in_before = j < n_before
            n0 = tl.where(in_before, leftpad + j * BLOCK_N, after + (j - n_before) * BLOCK_N)
            stop = tl.where(in_before, before_end, after_end)
        n0 = tl.where(fresh, own + (j - n_cached) * BLOCK_N, n0)
        stop = tl.where(fresh, own_end, stop)
        offset = tl.arange(0, BLOCK_N)
        seen = offset < stop - n0
        if indices_ptr is not None:  # what is cached, but for padding and the window
            seen &= offset >= tl.where(fresh, 0, leftpad - n0)
            hole = (offset - tl.where(fresh, W, window_start - n0)).to(tl.uint32)
            seen &= hole >= tl.where(fresh, 0, window_length).to(tl.uint32)
        if WINDOW_IN_CACHE:
            first_row = n0 + tl.where(fresh, window_start, 0)
            k_ptr = kc_ptr + first_row.to(tl.int64) * stride_kcn
            v_ptr = vc_ptr + first_row.to(tl.int64) * stride_vcn
            stride_kn, stride_vn = stride_kcn, stride_vcn
        else:
            stride_kn = tl.where(fresh, stride_kwn, stride_kcn)
            stride_vn = tl.where(fresh, stride_vwn, stride_vcn)
            k_ptr = tl.where(fresh, kw_ptr, kc_ptr) + n0.to(tl.int64) * stride_kn
            v_ptr = tl.where(fresh, vw_ptr, vc_ptr) + n0.to(tl.int64) * stride_vn
        mask = seen[:, None]
        if HEAD_DIM != BLOCK_D:
            mask = mask & (d < HEAD_DIM)[None, :]
        # Unsigned 32 bits: all these offsets stay in registers from block to block.
        k_offset = (offset[:, None] * stride_kn + d[None, :]).to(tl.uint32).to(tl.uint64)
        v_offset = (offset[:, None] * stride_vn + d[None, :]).to(tl.uint32).to(tl.uint64)
        k = tl.load(k_ptr + k_offset, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        # Nothing seen yet: -inf - -inf would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores * scale - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(p, 1)
        v = tl.load(v_ptr + v_offset, mask=mask, other=0.0)
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
        at = tl.cast(split, tl.int64) * H * W * HEAD_DIM
        part = tl.load(partial_ptrs + at, mask=valid[:, None] & mask, other=0)
        acc += part.to(tl.float32) * weight[:, None]
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    out_ptrs = out_ptr + b * stride_ob + head[:, None] * stride_oh + window_row[:, None] * stride_ow
    tl.store(out_ptrs + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & mask)
    if RETURN_LSE:
        tl.store(lse_ptr + b * H * W + row, top + tl.log(total), mask=inside)


def launch(
    q: Tensor,
    k_window: Tensor | None,
    v_window: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    window_start: Tensor,
    window_length: Tensor,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor | None,
    cache_batch_idx: Tensor | None,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_block_size: int,
    softmax_scale: float,
    num_splits: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """As `window_attention`; without `return_lse` the second tensor is empty."""
    B, H, W, D = q.shape
    H_kv, C = k_cache.shape[1:3]
    out = torch.empty_like(q)
    lse = q.new_empty((B, H, W) if return_lse else 0, dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    config = tile_of(H // H_kv * W, D, q.dtype, architecture_of(q.device))
    blocks = dict(config.blocks, BLOCK_D=max(64, triton.next_power_of_2(D)))
    if kv_indices is not None:
        blocks["BLOCK_N"] = min(blocks["BLOCK_N"], kv_block_size)
    tiles = triton.cdiv(H // H_kv * W, blocks["BLOCK_M"])
    if num_splits is None:
        num_splits = choose_splits(B * H_kv * tiles, sm_count(q.device), H // H_kv * W)
    target, target_lse = out, lse
    if num_splits > 1:
        # Each is normalised: rounded like a result, weighted in float32.
        target = q.new_empty(B, num_splits, H, W, D)
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
        window_start, window_length, cache_seqlens, cache_leftpad, cache_batch_idx,
        kv_num_blocks, kv_indices,
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
