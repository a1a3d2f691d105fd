"""The Triton kernels of window_attention: attention over splits of the keys, and their combine.

They restate the definition in `dsb_kernels.attention`, whose shape letters they use, and share no
code with it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from dsb_kernels._configs import Config, architecture_of, configuration
from dsb_kernels._launch import (
    LINE_BYTES,
    PREFETCHED_LINES,
    launch_options,
    odd_lines,
    peek,
    prefetch_odd_kib,
    prefetch_rows,
    wait_for_previous,
    wrap_triton,
)
from dsb_kernels._op import jit, tl, triton

MAX_SPLITS, DEFAULT_MAX_SPLITS = 128, 32
COMBINE_QUERIES = 8  # how many queries a program of `_combine_kernel` takes


def tile_of(queries: int, D: int, dtype: torch.dtype, architecture: str) -> Config:
    """The configuration for `queries` queries of a KV head."""
    kind = "float32" if dtype == torch.float32 else "128" if D <= 128 else "256"
    return configuration(f"window_attention {kind}", queries, architecture)


def choose_splits(programs: int, sm_count: int) -> int:
    """How many splits the keys are divided into: by FlashAttention-3's rule, the fewest with which
    the share of busy SMs is at least 85% of the best one."""
    waves = [programs * splits / sm_count for splits in range(1, DEFAULT_MAX_SPLITS + 1)]
    share = [w / math.ceil(w) for w in waves]
    return next(i for i, s in enumerate(share, 1) if s >= 0.85 * max(share))


@functools.cache
def sm_count(device: torch.device) -> int:
    """How many streaming multiprocessors a GPU has. The interpreter takes the number of an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@jit
def _load_bounds(window_start_ptr, window_length_ptr, seqlens_ptr, leftpad_ptr, b, W, C):
    """A row's window start and window length, one past its last stored position, and its first
    stored position."""
    window_length = tl.minimum(tl.load(window_length_ptr), W)
    seqlen, leftpad = C, 0
    if seqlens_ptr is not None:
        seqlen = tl.minimum(tl.load(seqlens_ptr + b), C)
    if leftpad_ptr is not None:
        leftpad = tl.load(leftpad_ptr + b)
    return tl.load(window_start_ptr), window_length, seqlen, leftpad


@jit
def _visit_list(
    window_start, window_length, seqlen, leftpad, num_blocks_ptr, list_index,
    WINDOW_IN_CACHE: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The KV blocks that a row's queries visit. They lie in three ranges: the cached positions
    before the window, those after it, and the window's own columns, counted from its start. Each
    range is cut into KV blocks of BLOCK_N from its first position on, so that only its last one may
    be partly used. If there is a list, its KV blocks replace the first two ranges.

    Returns the ends of the three ranges, the starts of the last two, and how many KV blocks lie in
    the first range, in the first two and in all three.
    """
    window_end = window_start + window_length
    before_end = tl.minimum(window_start, seqlen)
    after, after_end = tl.maximum(window_end, leftpad), seqlen
    own, own_end = tl.maximum(leftpad - window_start, 0), window_length
    if num_blocks_ptr is not None:
        n_before = tl.load(num_blocks_ptr + list_index) * (KV_BLOCK // BLOCK_N)
        n_cached = n_before
    else:
        if WINDOW_IN_CACHE:
            # The window's keys lie in the cache: one range covers what is before, in and after it.
            through = window_start <= seqlen
            before_end = tl.where(through, tl.maximum(window_end, seqlen), before_end)
            after_end = tl.where(through, after, after_end)
            own_end = tl.where(through, own, own_end)
        n_before = tl.cdiv(tl.maximum(before_end - leftpad, 0), BLOCK_N)
        n_cached = n_before + tl.cdiv(tl.maximum(after_end - after, 0), BLOCK_N)
    n_blocks = n_cached + tl.cdiv(tl.maximum(own_end - own, 0), BLOCK_N)
    return before_end, after_end, own_end, after, own, n_before, n_cached, n_blocks


@jit
def _find_block(
    j, fresh, offset, before_end, after_end, own_end, after, own, n_before, n_cached,
    window_start, window_length, seqlen, leftpad, W, indices_ptr, list_start,
    KV_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where KV block `j` of those that `_visit_list` counts begins, and which of its keys, at
    `offset` from there, queries see. `fresh` says whether it lies in the window's own columns."""
    if indices_ptr is None:
        in_before = j < n_before
        n0 = tl.where(in_before, leftpad + j * BLOCK_N, after + (j - n_before) * BLOCK_N)
        stop = tl.where(in_before, before_end, after_end)
    else:
        part = KV_BLOCK // BLOCK_N
        entry = indices_ptr + list_start + j // part
        n0 = tl.load(entry, mask=j < n_cached, other=0) * KV_BLOCK + j % part * BLOCK_N
        stop = seqlen
    n0 = tl.where(fresh, own + (j - n_cached) * BLOCK_N, n0)
    seen = offset < tl.where(fresh, own_end, stop) - n0
    if indices_ptr is not None:  # a listed KV block may reach into the padding or the window
        seen &= offset >= tl.where(fresh, 0, leftpad - n0)
        # As an unsigned number, an offset before the hole exceeds every length, so one comparison
        # leaves out the window alone.
        hole = (offset - tl.where(fresh, W, window_start - n0)).to(tl.uint32)
        seen &= hole >= tl.where(fresh, 0, window_length).to(tl.uint32)
    return n0, seen


@jit
def _prefetch_keys(
    kc_ptr, vc_ptr, leftpad_ptr, b, split, stride_n, C,
    HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Ask the L2 cache for the first keys and values that a split visits if it shares all of the
    cache after the row's padding with the others."""
    if PDL:
        BITS: tl.constexpr = kc_ptr.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = BLOCK_D * BITS // (8 * LINE_BYTES)  # of a key
        padding = 0
        if leftpad_ptr is not None:  # clamped, since any number may stand there still
            padding = tl.maximum(tl.minimum(peek(leftpad_ptr + b), C), 0)
        share = tl.cdiv(C - padding, NUM_SPLITS * BLOCK_N) * BLOCK_N
        key = padding + split * share + tl.arange(0, PREFETCHED_LINES // (2 * LINES))
        prefetch_rows(kc_ptr, key, C, stride_n, 0, HEAD_DIM, PDL, 2)
        prefetch_rows(vc_ptr, key, C, stride_n, 0, HEAD_DIM, PDL, 2)


@jit
def _load_queries(q_ptrs, mask, softmax_scale):
    """The queries, and the positive factor of their scores, which includes log2(e)."""
    q = tl.load(q_ptrs, mask=mask, other=0.0)
    scale = tl.cast(softmax_scale, tl.float32) * 1.4426950408889634  # log2(e)
    # The largest score is found before scores are scaled, so that scale must be positive. In place
    # of 0, a tiny scale makes all scores equal as well, and keeps -inf (-inf * 0 would be NaN).
    q = tl.where(scale < 0, -q, q)
    return q, tl.maximum(tl.abs(scale), 1e-37)


@jit
def _online_softmax(q, k, seen, top, total, scale):
    """Extend the online softmax by one KV block. The weight of a key is 2^(score * scale - top),
    where `top` is the largest score * scale so far and `scale` includes log2(e).

    Returns the weights of the block's values, the factor by which earlier sums must be multiplied,
    the new `top`, and the new sum of weights.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(seen[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    # A query that has seen no key yet must not compute -inf - -inf, which is NaN.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores * scale - shift[:, None])
    decay = tl.exp2(top - shift)
    return p, decay, new_top, total * decay + tl.sum(p, 1)


@jit
def _store_split(
    out_ptr, lse_ptr, acc, top, total, first, column, head, window_length, W, H,
    HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write a split's normalised sums and their log-sum-exp. `first` is how many columns all
    splits before this one have, those of earlier rows included."""
    # For a query that saw no key, acc is 0 and top is -inf, which are the right results.
    total = tl.where(total == 0.0, 1.0, total)
    valid = column < window_length
    acc = tl.where(valid[:, None], acc / total[:, None], 0.0)
    d = tl.arange(0, BLOCK_D)
    out_ptrs = out_ptr + ((first + column) * H + head)[:, None] * HEAD_DIM + d[None, :]
    # Nothing reads the partial results of columns past the window.
    stored = (column < W) if NUM_SPLITS == 1 else valid
    mask = stored[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if lse_ptr is not None:
        lse = (top + tl.log2(total)) * 0.6931471805599453  # ln(2)
        lse = tl.where(valid, lse, float("-inf"))
        tl.store(lse_ptr + first * H + head * W + column, lse, mask=stored)


@jit
def _attention_kernel(
    q_ptr, kw_ptr, vw_ptr, kc_ptr, vc_ptr, out_ptr, lse_ptr,
    window_start_ptr, window_length_ptr, seqlens_ptr, leftpad_ptr, batch_idx_ptr,
    num_blocks_ptr, indices_ptr, visible_ptr, next_ptr, lists, list_size,
    stride_qb, stride_qh, stride_qw, stride_wb, stride_wh, stride_wn,
    stride_cb, stride_ch, stride_cn, stride_next, next_rows, W, C, softmax_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr,
    KV_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    NEXT_LINES: tl.constexpr, NEXT_ROW_LINES: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Program (tile and split, KV head, batch row): BLOCK_M queries of a KV head against one split
    of its keys. kw_ptr is None where the window's keys are in the cache. next_ptr is the weight of
    the next layer, which the kernel does not read (`prefetch_odd_kib`), or None.

    A KV head serves the GROUP query heads of its group. Of its GROUP * W queries, query i is column
    i // GROUP of the group's head i % GROUP. So the columns that the window uses come first, and
    the heads of a group share the K/V that is loaded. The results are (B, splits, W, H, D) and
    (B, splits, H, W).
    """
    # Tiles of one split are neighbouring programs: they run together, and the L2 cache serves the
    # K/V that they share.
    tiles = tl.cdiv(W * GROUP, BLOCK_M)
    first_query = tl.program_id(0) % tiles * BLOCK_M
    split = tl.program_id(0) // tiles
    kv_head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if batch_idx_ptr is None and indices_ptr is None:  # otherwise what is visited is not known yet
        cached = b * stride_cb + kv_head * stride_ch
        _prefetch_keys(
            kc_ptr + cached, vc_ptr + cached, leftpad_ptr, b, split, stride_cn, C, HEAD_DIM,
            NUM_SPLITS, BLOCK_N, BLOCK_D, PDL,
        )  # fmt: skip
    wait_for_previous(PDL)
    H = tl.num_programs(1) * GROUP
    window_start, window_length, seqlen, leftpad = _load_bounds(
        window_start_ptr + b, window_length_ptr + b, seqlens_ptr, leftpad_ptr, b, W, C
    )
    # A row has one list, or one for each KV head.
    list_index = b * lists + tl.minimum(kv_head, lists - 1)
    before_end, after_end, own_end, after, own, n_before, n_cached, n_blocks = _visit_list(
        window_start, window_length, seqlen, leftpad, num_blocks_ptr, list_index,
        kw_ptr is None, KV_BLOCK, BLOCK_N,
    )  # fmt: skip
    per_split = tl.cdiv(n_blocks, NUM_SPLITS)
    low, high = split * per_split, tl.minimum((split + 1) * per_split, n_blocks)

    query = first_query + tl.arange(0, BLOCK_M)
    column = (query // GROUP).to(tl.int64)
    head = kv_head * GROUP + query % GROUP
    valid = column < window_length
    if first_query >= window_length * GROUP:
        high = low  # a tile past the window's end visits nothing
    d = tl.arange(0, BLOCK_D)
    inside = (d < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + b * stride_qb + head[:, None] * stride_qh + column[:, None] * stride_qw
    q_mask = valid[:, None] if HEAD_DIM == BLOCK_D else valid[:, None] & inside
    q, scale = _load_queries(q_ptrs + d[None, :], q_mask, softmax_scale)

    cache_row = b
    if batch_idx_ptr is not None:
        cache_row = tl.load(batch_idx_ptr + b).to(tl.int64)
    cached = cache_row * stride_cb + kv_head * stride_ch
    kc_ptr, vc_ptr = kc_ptr + cached, vc_ptr + cached
    if kw_ptr is not None:
        kw_ptr += b * stride_wb + kv_head * stride_wh
        vw_ptr += b * stride_wb + kv_head * stride_wh

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    offset = tl.arange(0, BLOCK_N)
    for j in range(low, high):
        fresh = j >= n_cached
        n0, seen = _find_block(
            j, fresh, offset, before_end, after_end, own_end, after, own, n_before, n_cached,
            window_start, window_length, seqlen, leftpad, W, indices_ptr, list_index * list_size,
            KV_BLOCK, BLOCK_N,
        )  # fmt: skip
        k_ptr, v_ptr, stride_n = kc_ptr, vc_ptr, stride_cn
        if kw_ptr is None:
            n0 += tl.where(fresh, window_start, 0)
        else:
            stride_n = tl.where(fresh, stride_wn, stride_cn)
            k_ptr, v_ptr = tl.where(fresh, kw_ptr, kc_ptr), tl.where(fresh, vw_ptr, vc_ptr)
        if visible_ptr is not None:
            seen &= tl.load(visible_ptr + b * C + n0 + offset, mask=seen, other=0) != 0
        mask = seen[:, None] if HEAD_DIM == BLOCK_D else seen[:, None] & inside
        # As unsigned 32-bit numbers these offsets fit in registers from KV block to KV block. They
        # suffice for every stride that `check_stride` accepts.
        offsets = (offset[:, None] * stride_n + d[None, :]).to(tl.uint32).to(tl.uint64)
        k = tl.load(k_ptr + n0.to(tl.int64) * stride_n + offsets, mask=mask, other=0.0)
        p, decay, top, total = _online_softmax(q, k, seen, top, total, scale)
        v = tl.load(v_ptr + n0.to(tl.int64) * stride_n + offsets, mask=mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        if next_ptr is not None:  # in the last KV blocks, so that what they read evicts nothing
            prefetch_odd_kib(
                next_ptr, stride_next, next_rows, high - 1 - j, NEXT_LINES, NEXT_ROW_LINES, PDL
            )

    _store_split(
        out_ptr, lse_ptr, acc, top, total, (b * NUM_SPLITS + split) * W, column, head,
        window_length, W, H, HEAD_DIM, NUM_SPLITS, BLOCK_D,
    )  # fmt: skip


@jit
def _combine_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, window_length_ptr, H, W,
    HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Program (tile, batch row): combine the splits of BLOCK_M of the row's W * H queries, in a
    fixed order."""
    wait_for_previous(PDL)
    b = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column, head = (query // H).to(tl.int64), (query % H).to(tl.int64)
    inside = query < H * W
    valid = inside & (column < tl.load(window_length_ptr + b))
    d = tl.arange(0, BLOCK_D)
    mask = (d < HEAD_DIM)[None, :]
    lse_ptrs = partial_lse_ptr + b * NUM_SPLITS * H * W + head * W + column
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for split in range(NUM_SPLITS):
        lse = tl.load(lse_ptrs + split * H * W, mask=valid, other=float("-inf"))
        top = tl.maximum(top, lse)
    shift = tl.where(top == float("-inf"), 0.0, top)
    partial_ptrs = partial_ptr + (b * NUM_SPLITS * H * W + query)[:, None] * HEAD_DIM + d[None, :]
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for split in range(NUM_SPLITS):
        lse = tl.load(lse_ptrs + split * H * W, mask=valid, other=float("-inf"))
        weight = tl.exp(lse - shift)
        total += weight
        offset = tl.cast(split, tl.int64) * H * W * HEAD_DIM
        part = tl.load(partial_ptrs + offset, mask=valid[:, None] & mask, other=0)
        acc += part.to(tl.float32) * weight[:, None]
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    out_ptrs = out_ptr + (b * H * W + query)[:, None] * HEAD_DIM + d[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & mask)
    if lse_ptr is not None:
        lse_ptr += b * H * W + head * W + column
        tl.store(lse_ptr, top + tl.log(total), mask=inside)


def launch(a: Any) -> tuple[Tensor, Tensor]:
    """Compute what `window_attention_reference` returns with the kernels."""
    B, H, W, D = a.q.shape
    H_kv, C = a.k_cache.shape[1:3]
    group = H // H_kv
    out = a.q.new_empty(B, W, H, D)
    lse = a.q.new_empty((B, H, W), dtype=torch.float32) if a.return_lse else None
    if out.numel() > 0:
        config = tile_of(group * W, D, a.q.dtype, architecture_of(a.q.device))
        blocks = dict(config.blocks, BLOCK_D=max(64, triton.next_power_of_2(D)))
        if a.kv_indices is not None:
            blocks["BLOCK_N"] = min(blocks["BLOCK_N"], a.kv_block_size)
        tiles = triton.cdiv(group * W, blocks["BLOCK_M"])
        splits = a.num_splits or choose_splits(B * H_kv * tiles, sm_count(a.q.device))
        target, target_lse = out, lse
        if splits > 1:
            # Partial results are normalised and have the dtype of q; their weights are float32.
            target = a.q.new_empty(B, splits, W, H, D)
            target_lse = a.q.new_empty(B, splits, H, W, dtype=torch.float32)
        k_window, v_window = a.k_window, a.v_window
        if k_window is not None and k_window.stride() != v_window.stride():
            k_window, v_window = k_window.contiguous(), v_window.contiguous()
        lists, list_size = 1, 1
        if a.kv_indices is not None:
            lists, list_size = a.kv_num_blocks.numel() // B, a.kv_indices.shape[-1]
        # With larger heads registers would be spilled.
        asked = odd_lines(a.next_weight) if a.next_weight is not None and D <= 128 else 0
        next_weight = a.next_weight if asked else None
        next_sizes = (0, 0) if next_weight is None else (next_weight.stride(0), len(next_weight))
        wrap_triton(_attention_kernel)[(tiles * splits, H_kv, B)](
            a.q, k_window, v_window, a.k_cache, a.v_cache, target, target_lse,
            a.window_start, a.window_length, a.cache_seqlens, a.cache_leftpad, a.cache_batch_idx,
            a.kv_num_blocks, a.kv_indices, a.kv_visible, next_weight, lists, list_size,
            *a.q.stride()[:3], *(a.k_cache if k_window is None else k_window).stride()[:3],
            *a.k_cache.stride()[:3], *next_sizes, W, C,
            1 / math.sqrt(D) if a.softmax_scale is None else a.softmax_scale,
            GROUP=group, HEAD_DIM=D, NUM_SPLITS=splits, KV_BLOCK=a.kv_block_size,
            NEXT_LINES=max(32 * config.num_warps, triton.next_power_of_2(asked)),
            NEXT_ROW_LINES=asked, **blocks,
            **launch_options(config.num_warps, config.num_stages),
        )  # fmt: skip
        if splits > 1:
            wrap_triton(_combine_kernel)[(triton.cdiv(H * W, COMBINE_QUERIES), B)](
                target, target_lse, out, lse, a.window_length, H, W,
                HEAD_DIM=D, NUM_SPLITS=splits, BLOCK_M=COMBINE_QUERIES, BLOCK_D=blocks["BLOCK_D"],
                **launch_options(4, 1),
            )  # fmt: skip
    if lse is None:
        lse = a.q.new_empty(0, dtype=torch.float32)
    return out.transpose(1, 2), lse
