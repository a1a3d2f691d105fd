"""rope_write_kv: rotate the window's queries and keys and write K, V into the cache, in one launch.

Rotary embedding as in RoFormer (arXiv 2104.09864) in the two layouts in use: `is_neox` pairs
element i with i + D/2 (LLaMA, Qwen2), otherwise 2i with 2i + 1 (GPT-J). `H` = query heads,
`H_kv` = KV heads, `W` = window capacity (rows), `C` = cache capacity (positions), `D` = head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsb_kernels.dispatch import check_tensor, register_op

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
    is_neox: bool,
) -> Tensor:
    """In the wider of the precisions of `q` and `cos_sin_cache`; one rounding at the end."""
    W, C = q.shape[2], k_cache.shape[2]
    row = torch.arange(W, device=q.device)
    index = window_start[:, None].long() + row
    written = ((row < window_length[:, None]) & (index < C))[:, None, :, None]
    position = index if position_offset is None else index - position_offset[:, None]
    position = position.clamp(0, cos_sin_cache.shape[0] - 1)
    cos, sin = cos_sin_cache[position][:, None].chunk(2, -1)
    # W <= C, so the wrapped indices of a row differ: those not written store what they hold.
    at = (index % C)[:, None, :, None].expand_as(k)
    k_cache.scatter_(
        2, at, torch.where(written, rotate(k, cos, sin, is_neox), k_cache.gather(2, at))
    )
    v_cache.scatter_(2, at, torch.where(written, v, v_cache.gather(2, at)))
    return torch.where(written, rotate(q, cos, sin, is_neox), 0)


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
    is_neox: bool,
) -> Tensor:
    return rope_write_kv_definition(
        q, k, v, cos_sin_cache, k_cache, v_cache,
        window_start, window_length, position_offset, is_neox,
    )  # fmt: skip


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
    is_neox: bool = True,
) -> Tensor:
    """Rotate the window's Q and K; write K, V into the cache at `[start, start + length)`.

    Args:
        q: (B, H, W, D) float32, float16 or bfloat16; D even, H a multiple of H_kv.
        k, v: (B, H_kv, W, D), same dtype.
        cos_sin_cache: (max_pos, D), cosines of the D / 2 angles, then their sines; float32 or
            the dtype of `q`. The rotation is computed in float32 and rounded once.
        k_cache, v_cache: (B, H_kv, C, D), C >= W, written in place; the rest stays as it is.
        window_start: (B,) int32, canvas index of row 0, >= 0.
        window_length: (B,) int32, rows of the window, 0 to W; rows past it are not written.
        position_offset: (B,) int32 or None (zeros); the rotary position of canvas index i is
            i - offset (left padding), held within [0, max_pos).
        is_neox: pair element i with i + D / 2 (True) or 2i with 2i + 1 (False).

    Every tensor may have any strides with the last dimension contiguous.

    Returns:
        The rotated queries, (B, H, W, D); 0 in rows past the window's end or the cache's.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or stride.
    """
    op = "rope_write_kv"
    check_tensor(op, "q", q, dtype=DTYPES, shape=("B", "H", "W", "D"), unit_stride=True)
    B, H, W, D = q.shape
    check_tensor(
        op,
        "k_cache",
        k_cache,
        dtype=q.dtype,
        shape=(B, "H_kv", "C", D),
        device=q.device,
        unit_stride=True,
    )
    H_kv, C = k_cache.shape[1:3]
    check_tensor(
        op,
        "v_cache",
        v_cache,
        dtype=q.dtype,
        shape=(B, H_kv, C, D),
        device=q.device,
        unit_stride=True,
    )
    for name, value in (("k", k), ("v", v)):
        check_tensor(
            op, name, value, dtype=q.dtype, shape=(B, H_kv, W, D), device=q.device, unit_stride=True
        )
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
    for name, value in (
        ("window_start", window_start),
        ("window_length", window_length),
        ("position_offset", position_offset),
    ):
        if value is not None:
            check_tensor(op, name, value, dtype=torch.int32, shape=(B,), device=q.device)
    return _rope_write_kv_op(
        q, k, v, cos_sin_cache, k_cache, v_cache,
        window_start, window_length, position_offset, is_neox,
    )  # fmt: skip
