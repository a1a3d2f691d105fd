"""window_attention: window queries over cached and fresh keys, bidirectional, block-sparse.

The attention of a window step of a diffusion language model (DSB Cache, arXiv 2602.05992): the
rows of the window see every stored position, before and after them. Split-KV as in
FlashDecoding, block lists in FlexAttention's layout. `H` = query heads, `H_kv` = KV heads,
`G = H / H_kv`, `W` = window capacity (rows), `C` = cache capacity (positions), `D` = head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsb_kernels._check import check_tensor
from dsb_kernels._op import register_op, use_triton
from dsb_kernels.attention_kernel import MAX_SPLITS, launch

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
    cache_batch_idx: Tensor | None,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """In the precision of `q`; a query that sees nothing gives 0 and -inf."""
    if cache_batch_idx is not None:
        k_cache, v_cache = k_cache[cache_batch_idx], v_cache[cache_batch_idx]
    B, W = q.shape[0], q.shape[2]
    H_kv, C = k_cache.shape[1], k_cache.shape[2]
    position, row = torch.arange(C, device=q.device), torch.arange(W, device=q.device)
    start, length = window_start[:, None].long(), window_length[:, None].long()
    inside = (position >= start) & (position < start + length)
    leftpad = torch.zeros_like(start) if cache_leftpad is None else cache_leftpad[:, None]
    stored = ((position >= leftpad) & (position < cache_seqlens[:, None]))[:, None]
    if kv_indices is not None:
        named = listed_positions(kv_num_blocks, kv_indices, kv_block_size, C)
        stored = stored & named.view(B, -1, C)
    if k_window is None:
        own = inside & (position >= leftpad)
        k, v, visible = k_cache, v_cache, stored & ~inside[:, None] | own[:, None]
    else:
        k, v = torch.cat([k_cache, k_window], 2), torch.cat([v_cache, v_window], 2)
        fresh = ((row < length) & (start + row >= leftpad))[:, None].expand(B, stored.shape[1], W)
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


# --- op ---------------------------------------------------------------------------------------


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
    cache_batch_idx: Tensor | None,
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
            cache_leftpad, cache_batch_idx, kv_num_blocks, kv_indices, kv_block_size, softmax_scale,
        )  # fmt: skip
        lse = lse.float() if return_lse else q.new_empty(0, dtype=torch.float32)
        return torch.empty_like(q).copy_(out), lse  # strides as those of the kernel's result
    return launch(
        q, k_window, v_window, k_cache, v_cache, window_start, window_length, cache_seqlens,
        cache_leftpad, cache_batch_idx, kv_num_blocks, kv_indices, kv_block_size, softmax_scale,
        num_splits, return_lse,
    )  # fmt: skip


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
    cache_batch_idx: Tensor | None = None,
    kv_num_blocks: Tensor | None = None,
    kv_indices: Tensor | None = None,
    kv_block_size: int = 64,
    softmax_scale: float | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the window's rows to everything stored and to the window itself.

    A query row w < window_length sees the cached positions in [leftpad, seqlens) outside
    [window_start, window_start + window_length), and the fresh rows below window_length that stand
    at leftpad or after it. Nothing else is read: the rest of the cache may hold anything. A window
    over the whole canvas is full attention without the padding.

    Args:
        q: (B, H, W, D) bfloat16, float16 or float32; D a multiple of 8 up to 256.
        k_window, v_window: (B, H_kv, W, D), H a multiple of H_kv; both None when the window's
            rows have been written into the cache already, which is then read there too.
        k_cache, v_cache: (B, H_kv, C, D); with `cache_batch_idx` of any batch size from 1.
        window_start: (B,) int32, canvas index of row 0, 0 to C - window_length.
        window_length: (B,) int32, rows of the window, 0 to W.
        cache_seqlens: (B,) int32, end of what is stored, 0 to C.
        cache_leftpad: (B,) int32 or None (zeros), start of what is stored.
        cache_batch_idx: (B,) int32, the row of the caches that each row of q reads, as in
            FlashAttention; None is row b itself. A row of length 0 reads nothing.
        kv_num_blocks, kv_indices: (B,) and (B, N), or (B, H_kv) and (B, H_kv, N) int32: the KV
            blocks visited outside the window (no block twice); both None visits all.
        kv_block_size: positions of a listed block, a power of two from 16.
        softmax_scale: None is 1 / sqrt(D).
        num_splits: parts that the keys are split into; None derives it from B, H, W and the GPU,
            never from the cache or its contents, so that results are reproducible.
        return_lse: also return the log-sum-exp of the scaled scores.

    Every tensor may have any strides with the last dimension contiguous.

    Returns:
        out (B, H, W, D) in the stride order of q, 0 in rows past window_length and where nothing
        is visible; with `return_lse` also lse (B, H, W) float32, natural logarithm, -inf there.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device, stride or value.
    """
    op = "window_attention"
    rows = {"device": q.device, "dtype": q.dtype, "unit_stride": True}
    check_tensor(op, "q", q, dtype=DTYPES, shape=("B", "H", "W", "D"), unit_stride=True)
    B, H, W, D = q.shape
    if D % 8 or not 8 <= D <= 256:
        raise ValueError(f"{op}: q has head dimension {D}: accepted is a multiple of 8 up to 256")
    batch = B if cache_batch_idx is None else "cache batch"
    check_tensor(op, "k_cache", k_cache, shape=(batch, "H_kv", "C", D), **rows)
    batch, H_kv, C = k_cache.shape[:3]
    check_tensor(op, "v_cache", v_cache, shape=(batch, H_kv, C, D), **rows)
    if batch == 0 < B:
        raise ValueError(f"{op}: k_cache has 0 batch rows: accepted is at least 1")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"{op}: q has {H} heads: accepted is a multiple of k_cache's {H_kv}")
    if W > C:
        raise ValueError(f"{op}: q has {W} window rows: accepted is at most k_cache's {C}")
    _check_pair(op, "k_window", k_window, "v_window", v_window)
    if k_window is not None:
        check_tensor(op, "k_window", k_window, shape=(B, H_kv, W, D), **rows)
        check_tensor(op, "v_window", v_window, shape=(B, H_kv, W, D), **rows)
    counts = {"device": q.device, "dtype": torch.int32, "contiguous": True}
    check_tensor(op, "window_start", window_start, shape=(B,), **counts)
    check_tensor(op, "window_length", window_length, shape=(B,), **counts)
    check_tensor(op, "cache_seqlens", cache_seqlens, shape=(B,), **counts)
    if cache_leftpad is not None:
        check_tensor(op, "cache_leftpad", cache_leftpad, shape=(B,), **counts)
    if cache_batch_idx is not None:
        check_tensor(op, "cache_batch_idx", cache_batch_idx, shape=(B,), **counts)
    _check_pair(op, "kv_num_blocks", kv_num_blocks, "kv_indices", kv_indices)
    if kv_num_blocks is not None:
        lists = (B,) if kv_num_blocks.ndim == 1 else (B, H_kv)
        counts = {"device": q.device, "dtype": torch.int32}
        check_tensor(op, "kv_num_blocks", kv_num_blocks, shape=lists, **counts)
        check_tensor(op, "kv_indices", kv_indices, shape=(*lists, "N"), unit_stride=True, **counts)
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
        cache_leftpad, cache_batch_idx, kv_num_blocks, kv_indices, kv_block_size, softmax_scale,
        num_splits, return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_pair(op: str, name: str, value: object, other_name: str, other: object) -> None:
    """Both or neither are given."""
    if (value is None) != (other is None):
        missing, given = (name, other_name) if value is None else (other_name, name)
        raise ValueError(f"{op}: {missing}=None: {given} is given, accepted are both or neither")
