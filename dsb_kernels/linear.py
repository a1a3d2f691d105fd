"""window_linear and linear_add_norm: the matmuls of a layer for the few tokens of a window step.

Both kernels should read their weights as fast as memory delivers them. window_linear is optionally
gated, as the first half of a Llama MLP is: silu(x @ gate.T) * (x @ up.T). linear_add_norm computes
what follows attention and the MLP's activation: a projection, the residual that it is added to, and
the RMSNorm that comes next. For more than MAX_TOKENS tokens cuBLAS is faster, and the ops call it.

Shapes: N tokens, E input features and F output features of a matmul.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from dsb_kernels._check import FLOATS, check_tensor
from dsb_kernels._configs import Launch, architecture_of, configuration, of_dtype
from dsb_kernels._launch import (
    launch_options,
    prefetch_rows,
    prefetch_span,
    wait_for_previous,
    wrap_triton,
)
from dsb_kernels._op import jit, op, tl, triton

MAX_TOKENS = 128  # the kernels read each weight once for up to so many tokens
MAX_STAGES = 16  # of a program's loads, where memory for more is free
SMS = 100  # up to so many programs have an SM each
SILU_BLOCK = 1024

# --- definitions ------------------------------------------------------------------------------


def window_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False
) -> Tensor:
    """Compute x @ weight.T + bias. With `gated`, its two halves are gate and up, and the result is
    silu(gate) * up.

    Args:
        x: (N, E) float32, float16 or bfloat16, last dimension of stride 1. N may be any number; the
            kernel serves up to MAX_TOKENS.
        weight: (F, E), or (2 F, E) with `gated`, the gate's features first; same dtype, last
            dimension of stride 1.
        bias: (F,) or (2 F,) of the same dtype, contiguous, or None.
        gated: whether to return silu(gate) * up.

    Returns:
        (N, F), accumulated in float32. The kernel rounds once. The definition rounds gate and up
        before it multiplies them, and so does the op for more than MAX_TOKENS tokens.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or stride.
    """
    y = linear(x, weight, bias)
    if not gated:
        return y
    gate, up = y.chunk(2, -1)
    return silu(gate) * up


def linear_add_norm_reference(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
) -> Tensor:
    """Add x @ weight.T to the residual in place, and return the RMSNorm of the new residual.

    Args:
        x: (N, E) float32, float16 or bfloat16. N may be any number; the kernels serve up to
            MAX_TOKENS.
        weight: (F, E) of the same dtype.
        residual: (N, F) of the same dtype. The op adds in float32 and rounds the sum once. The
            residual must share no memory with the other tensors (not checked).
        norm_weight: (F,) of the same dtype, contiguous.
        eps: the number that RMSNorm adds to the mean square.

    x, weight and residual may have any stride in their first dimension, with the last one
    contiguous.

    Returns:
        (N, F), `F.rms_norm` of the rounded residual, computed in float32 and rounded once.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or stride.
    """
    residual.addmm_(x, weight.t())
    return rms_norm(residual, norm_weight.shape, norm_weight, eps)


# --- kernels ----------------------------------------------------------------------------------
# The weights are the M operand of the tensor cores, which want 64 features; the tokens are the N
# operand. A program of window_linear computes BLOCK_V output features (of gate and of up, if gated)
# and reads each of their weights once for up to 128 tokens. All programs run at once and have equal
# work, so that they wait for memory and for nothing else.
#
# linear_add_norm has too few output features to occupy every SM with 64 of them, so that several
# programs share the input features of a tile. Each writes its sum in float32. Then one program for
# each token adds these sums in the order of the splits, whichever was finished first.


@jit
def _window_linear_kernel(
    weight_ptr, x_ptr, bias_ptr, out_ptr, stride_wf, stride_xn, stride_on, num_tokens, F, E,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Program (tile of features, block of tokens): compute a tile (BLOCK_N, BLOCK_V) of out and
    round it once."""
    feature = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    token = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Masks of whole tokens and features, where E allows it, keep the loads wide.
    w_mask, x_mask = (feature < F)[:, None], (token < num_tokens)[None, :]
    gate_ptrs = weight_ptr + feature.to(tl.int64)[:, None] * stride_wf + k[None, :]
    up_ptrs = gate_ptrs + tl.cast(F, tl.int64) * stride_wf
    x_ptrs = x_ptr + token.to(tl.int64)[None, :] * stride_xn + k[:, None]

    if bias_ptr is not None:
        first = tl.program_id(0) * BLOCK_V
        prefetch_span(bias_ptr, first, F, BLOCK_V, PDL)
        if GATED:
            prefetch_span(bias_ptr + F, first, F, BLOCK_V, PDL)
    prefetch_rows(weight_ptr, feature, F, stride_wf, 0, E, PDL, 2 if GATED else 1)
    if GATED:
        prefetch_rows(weight_ptr, F + feature, 2 * F, stride_wf, 0, E, PDL, 2)
    wait_for_previous(PDL)
    gate = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)  # the only sum where not gated
    up = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)
    for k0 in range(0, E, BLOCK_K):
        inside = k0 + k < E
        wide_mask = w_mask if EVEN_K else w_mask & inside[None, :]
        w = tl.load(gate_ptrs + k0, mask=wide_mask, other=0.0)
        x = tl.load(x_ptrs + k0, mask=x_mask if EVEN_K else x_mask & inside[:, None], other=0.0)
        gate = tl.dot(w, x, gate, input_precision="ieee")
        if GATED:
            w = tl.load(up_ptrs + k0, mask=wide_mask, other=0.0)
            up = tl.dot(w, x, up, input_precision="ieee")
    if bias_ptr is not None:
        gate += tl.load(bias_ptr + feature, mask=feature < F, other=0.0).to(tl.float32)[:, None]
        if GATED:
            bias = tl.load(bias_ptr + F + feature, mask=feature < F, other=0.0)
            up += bias.to(tl.float32)[:, None]
    if GATED:
        gate = gate / (1.0 + tl.exp(-gate)) * up
    out_ptrs = out_ptr + token.to(tl.int64)[None, :] * stride_on + feature[:, None]
    tl.store(out_ptrs, gate.to(out_ptr.dtype.element_ty), mask=w_mask & x_mask)


@jit
def _silu_mul_kernel(
    gate_up_ptr, out_ptr, numel, F, BLOCK: tl.constexpr, PDL: tl.constexpr = False
):
    """Program: compute BLOCK elements of out = silu(gate) * up, which is (N, F); gate and up are
    the halves of gate_up (N, 2 F)."""
    wait_for_previous(PDL)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    gate_ptrs = gate_up_ptr + index // F * F + index
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + F, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _split_linear_kernel(
    weight_ptr, x_ptr, partial_ptr, stride_wf, stride_xn, num_tokens, F, E, share,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Program (tile of features, split, block of tokens): write a tile of partial (S, N, F), the
    sum over the `share` input features of its split. There are S splits."""
    feature = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    split = tl.program_id(1)
    token = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Masks of whole tokens and features, where E allows it, keep the loads wide.
    w_mask, x_mask = (feature < F)[:, None], (token < num_tokens)[None, :]
    w_ptrs = weight_ptr + feature.to(tl.int64)[:, None] * stride_wf + k[None, :]
    x_ptrs = x_ptr + token.to(tl.int64)[None, :] * stride_xn + k[:, None]

    first = split * share  # a multiple of BLOCK_K
    last = tl.minimum(first + share, E)
    prefetch_rows(weight_ptr, feature, F, stride_wf, first, last, PDL)
    wait_for_previous(PDL)
    y = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)
    for k0 in range(first, last, BLOCK_K):
        inside = k0 + k < E
        w = tl.load(w_ptrs + k0, mask=w_mask if EVEN_K else w_mask & inside[None, :], other=0.0)
        x = tl.load(x_ptrs + k0, mask=x_mask if EVEN_K else x_mask & inside[:, None], other=0.0)
        y = tl.dot(w, x, y, input_precision="ieee")
    partial_token = split.to(tl.int64) * num_tokens + token
    tl.store(partial_ptr + partial_token[None, :] * F + feature[:, None], y, mask=w_mask & x_mask)


@jit
def _add_norm_kernel(
    partial_ptr, residual_ptr, norm_weight_ptr, out_ptr, stride_rn, stride_on, num_tokens, F, eps,
    SPLITS: tl.constexpr, BLOCK_F: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Program (token): add the splits to the residual, round it once, and compute the norm of the
    rounded residual. There are no splits where cuBLAS has added the product already."""
    token = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK_F)
    inside = feature < F
    residual_ptr += token * stride_rn + feature
    prefetch_span(norm_weight_ptr, 0, F, BLOCK_F, PDL)
    wait_for_previous(PDL)
    y = tl.zeros((BLOCK_F,), tl.float32)
    for split in tl.static_range(SPLITS):
        partial_token = tl.cast(split, tl.int64) * num_tokens + token
        y += tl.load(partial_ptr + partial_token * F + feature, mask=inside, other=0.0)
    y += tl.load(residual_ptr, mask=inside, other=0.0).to(tl.float32)
    rounded = y.to(residual_ptr.dtype.element_ty)
    if SPLITS > 0:
        tl.store(residual_ptr, rounded, mask=inside)

    y = rounded.to(tl.float32)
    eps = tl.cast(eps, tl.float32)  # Inductor passes scalars as float64
    scale = tl.rsqrt(tl.sum(y * y, 0) / F + eps)
    gain = tl.load(norm_weight_ptr + feature, mask=inside, other=0.0).to(tl.float32)
    out = (y * scale * gain).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * stride_on + feature, out, mask=inside)


# --- ops --------------------------------------------------------------------------------------


def linear_launch(
    num_tokens: int, F: int, dtype: torch.dtype, architecture: str, *, gated: bool
) -> Launch:
    """The launch of window_linear, whose grid is (tiles of features, blocks of tokens).

    While the tiles of features are fewer than PROGRAMS, they are halved, down to the 64 features
    that tensor cores want. Where every program has an SM to itself, its stages fill ALONE_KIB.
    """
    name = of_dtype("window_linear" + " gated" * gated, dtype)
    config = configuration(name, num_tokens, architecture)
    blocks, warps = dict(config.blocks), config.num_warps
    programs, alone = blocks.pop("PROGRAMS"), blocks.pop("ALONE_KIB", 0)
    while blocks["BLOCK_V"] > 64 and triton.cdiv(F, blocks["BLOCK_V"]) < programs:
        blocks["BLOCK_V"] //= 2
        warps //= 2
    grid = (triton.cdiv(F, blocks["BLOCK_V"]), triton.cdiv(num_tokens, blocks["BLOCK_N"]))
    stages = config.num_stages
    if alone and grid[0] * grid[1] <= SMS:
        lines = blocks["BLOCK_V"] * (2 if gated else 1) + blocks["BLOCK_N"]
        stages = min(MAX_STAGES, alone * 1024 // (lines * blocks["BLOCK_K"] * dtype.itemsize))
    return Launch(blocks, warps, stages, grid=grid)


def _silu_mul(gate_up: Tensor, out: Tensor) -> Tensor:
    """Compute out = silu(gate) * up in one launch, from the gate and up of cuBLAS."""
    wrap_triton(_silu_mul_kernel)[(triton.cdiv(out.numel(), SILU_BLOCK),)](
        gate_up, out, out.numel(), out.shape[1], BLOCK=SILU_BLOCK, **launch_options(4, 1)
    )
    return out


def _launch_linear(a: Any) -> Tensor:
    (num_tokens, E), F = a.x.shape, len(a.weight) // (2 if a.gated else 1)
    out = a.x.new_empty((num_tokens, F))
    if out.numel() == 0:
        return out
    if num_tokens > MAX_TOKENS:
        y = linear(a.x, a.weight, a.bias)
        return _silu_mul(y, out) if a.gated else y
    launch = linear_launch(num_tokens, F, a.x.dtype, architecture_of(a.x.device), gated=a.gated)
    wrap_triton(_window_linear_kernel)[launch.grid](
        a.weight, a.x, a.bias, out, a.weight.stride(0), a.x.stride(0), out.stride(0),
        num_tokens, F, E, EVEN_K=E % launch.blocks["BLOCK_K"] == 0, GATED=a.gated,
        **launch.options(),
    )  # fmt: skip
    return out


def _check_linear(a: Any) -> None:
    name = "window_linear"
    check_tensor(name, "x", a.x, dtype=FLOATS, shape=("N", "E"), unit_stride=True)
    like_x = functools.partial(check_tensor, name, dtype=a.x.dtype, device=a.x.device)
    shape = ("2 F" if a.gated else "F", a.x.shape[1])
    like_x("weight", a.weight, shape=shape, unit_stride=True)
    if a.gated and len(a.weight) % 2:
        raise ValueError(
            f"{name}: weight has {len(a.weight)} rows: accepted with gated is an even number"
        )
    if a.bias is not None:
        like_x("bias", a.bias, shape=a.weight.shape[:1], contiguous=True)


window_linear = op(window_linear_reference, launch=_launch_linear, check=_check_linear)


def split_launch(num_tokens: int, E: int, F: int, dtype: torch.dtype, architecture: str) -> Launch:
    """The launch of linear_add_norm's matmul, whose grid is (tiles of features, splits, blocks of
    tokens).

    It has only as many splits as a block of tokens needs for PROGRAMS programs, since each split
    writes N x F partial sums in float32, which must be read again.
    """
    config = configuration(of_dtype("linear_add_norm", dtype), num_tokens, architecture)
    blocks = dict(config.blocks)
    programs, block_k = blocks.pop("PROGRAMS"), blocks["BLOCK_K"]
    tiles, steps = triton.cdiv(F, blocks["BLOCK_V"]), triton.cdiv(E, block_k)
    share = triton.cdiv(steps, min(triton.cdiv(programs, tiles), steps))
    grid = (tiles, triton.cdiv(steps, share), triton.cdiv(num_tokens, blocks["BLOCK_N"]))
    return Launch(blocks, config.num_warps, config.num_stages, grid=grid, share=share * block_k)


def norm_warps(F: int) -> int:
    """How many warps normalise F features: as many as give each thread 16 features, 1 to 16."""
    return min(16, max(1, triton.next_power_of_2(F) // 512))


def _launch_add_norm(a: Any) -> Tensor:
    num_tokens, (F, E) = len(a.x), a.weight.shape
    if 0 in (num_tokens, E, F):
        return linear_add_norm_reference(*a)
    partial: Tensor | None = None
    splits = 0
    if num_tokens > MAX_TOKENS:
        a.residual.addmm_(a.x, a.weight.t())
    else:
        launch = split_launch(num_tokens, E, F, a.x.dtype, architecture_of(a.x.device))
        splits = launch.grid[1]
        partial = a.x.new_empty((splits, num_tokens, F), dtype=torch.float32)
        wrap_triton(_split_linear_kernel)[launch.grid](
            a.weight, a.x, partial, a.weight.stride(0), a.x.stride(0), num_tokens, F, E,
            launch.share, EVEN_K=E % launch.blocks["BLOCK_K"] == 0, **launch.options(),
        )  # fmt: skip
    out = a.x.new_empty((num_tokens, F))
    wrap_triton(_add_norm_kernel)[(num_tokens,)](
        partial, a.residual, a.norm_weight, out, a.residual.stride(0), out.stride(0),
        num_tokens, F, a.eps, SPLITS=splits, BLOCK_F=triton.next_power_of_2(F),
        **launch_options(norm_warps(F), 1),
    )  # fmt: skip
    return out


def _check_add_norm(a: Any) -> None:
    name = "linear_add_norm"
    check_tensor(name, "x", a.x, dtype=FLOATS, shape=("N", "E"), unit_stride=True)
    num_tokens, E = a.x.shape
    like_x = functools.partial(check_tensor, name, dtype=a.x.dtype, device=a.x.device)
    like_x("weight", a.weight, shape=("F", E), unit_stride=True)
    F = len(a.weight)
    like_x("residual", a.residual, shape=(num_tokens, F), unit_stride=True)
    like_x("norm_weight", a.norm_weight, shape=(F,), contiguous=True)


linear_add_norm = op(
    linear_add_norm_reference, launch=_launch_add_norm, check=_check_add_norm,
    mutates_args=("residual",),
)  # fmt: skip
