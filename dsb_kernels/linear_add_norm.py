"""linear_add_norm: a projection, the residual it is added to, and the RMSNorm that comes next.

What follows attention and what follows the MLP's activation in a Llama layer, for the few rows of a
window step: two launches. `N` = rows, `F` = input features, `E` = output features (the model's
hidden size), `S` = splits of the input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from dsb_kernels._check import FLOATS, check_tensor
from dsb_kernels._configs import (
    architecture_of,
    configuration,
    of_dtype,
)
from dsb_kernels._op import (
    jit,
    launch_options,
    register_op,
    takes_definition,
    tl,
    triton,
    use_triton,
    wrap_triton,
)

# --- definition -------------------------------------------------------------------------------


def linear_add_norm_definition(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
) -> Tensor:
    residual.addmm_(x, weight.t())
    return rms_norm(residual, norm_weight.shape, norm_weight, eps)


# --- kernels ----------------------------------------------------------------------------------
# As in window_linear, the weights are the M operand of the tensor cores and the rows N. There are
# too few output features to occupy every SM with 64 of them, so that S programs share the input
# features of a tile. Each leaves its sum in float32; a program for each row adds them in the order
# of the splits, whatever finished first.


@jit
def _split_linear_kernel(
    weight_ptr, x_ptr, partial_ptr, stride_we, stride_xn, rows, E, F, share,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Program (tile of features, split, block of rows): its sum of partial (S, N, E), over the
    `share` input features of its split."""
    feature = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    split = tl.program_id(1)
    row = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Whole rows are masked, never parts of one where F allows it: the loads stay wide.
    w_mask, x_mask = (feature < E)[:, None], (row < rows)[None, :]
    w_ptrs = weight_ptr + feature.to(tl.int64)[:, None] * stride_we + k[None, :]
    x_ptrs = x_ptr + row.to(tl.int64)[None, :] * stride_xn + k[:, None]

    first = split * share  # a multiple of BLOCK_K
    last = tl.minimum(first + share, F)
    y = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)
    for at in range(first, last, BLOCK_K):
        inside = at + k < F
        w = tl.load(w_ptrs + at, mask=w_mask if EVEN_K else w_mask & inside[None, :], other=0.0)
        x = tl.load(x_ptrs + at, mask=x_mask if EVEN_K else x_mask & inside[:, None], other=0.0)
        y = tl.dot(w, x, y, input_precision="ieee")
    partial_row = split.to(tl.int64) * rows + row
    tl.store(partial_ptr + partial_row[None, :] * E + feature[:, None], y, mask=w_mask & x_mask)


@jit
def _add_norm_kernel(
    partial_ptr, residual_ptr, norm_weight_ptr, out_ptr, stride_rn, stride_on, rows, E, eps,
    SPLITS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Program (row): the residual, rounded once, and the norm of what it was rounded to."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK_E)
    inside = feature < E
    residual_ptr += row * stride_rn + feature
    y = tl.zeros((BLOCK_E,), tl.float32)
    for split in tl.static_range(SPLITS):
        partial_row = tl.cast(split, tl.int64) * rows + row
        y += tl.load(partial_ptr + partial_row * E + feature, mask=inside, other=0.0)
    y += tl.load(residual_ptr, mask=inside, other=0.0).to(tl.float32)
    rounded = y.to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr, rounded, mask=inside)

    y = rounded.to(tl.float32)
    eps = tl.cast(eps, tl.float32)  # Inductor passes scalars as float64
    scale = tl.rsqrt(tl.sum(y * y, 0) / E + eps)
    gain = tl.load(norm_weight_ptr + feature, mask=inside, other=0.0).to(tl.float32)
    out = (y * scale * gain).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_on + feature, out, mask=inside)


# --- op ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Geometry of a call, from static shapes alone."""

    grid: tuple[int, int, int]  # (tiles of features, splits, blocks of rows)
    share: int  # input features of a split
    blocks: dict[str, int]
    num_warps: int
    num_stages: int


def launch_of(rows: int, E: int, F: int, dtype: torch.dtype, architecture: str) -> Launch:
    """As few splits as give PROGRAMS programs for a block of rows: every split costs partial sums
    of N x E float32, written and read again."""
    config = configuration(of_dtype("linear_add_norm", dtype), rows, architecture)
    blocks = dict(config.blocks)
    programs, block_k = blocks.pop("PROGRAMS"), blocks["BLOCK_K"]
    tiles, steps = triton.cdiv(E, blocks["BLOCK_V"]), triton.cdiv(F, block_k)
    share = triton.cdiv(steps, min(triton.cdiv(programs, tiles), steps))
    grid = (tiles, triton.cdiv(steps, share), triton.cdiv(rows, blocks["BLOCK_N"]))
    return Launch(grid, share * block_k, blocks, config.num_warps, config.num_stages)


def norm_warps(E: int) -> int:
    """16 elements a thread where that is a block's worth of them."""
    return min(16, max(1, triton.next_power_of_2(E) // 512))


@register_op("linear_add_norm", mutates_args=("residual",))
def _linear_add_norm_op(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
) -> Tensor:
    if not use_triton(x, weight, residual):
        return linear_add_norm_definition(x, weight, residual, norm_weight, eps)
    rows, (E, F) = len(x), weight.shape
    launch = launch_of(rows, E, F, x.dtype, architecture_of(x.device))
    splits = launch.grid[1]
    partial = x.new_empty((splits, rows, E), dtype=torch.float32)
    wrap_triton(_split_linear_kernel)[launch.grid](
        weight, x, partial, weight.stride(0), x.stride(0), rows, E, F, launch.share,
        EVEN_K=F % launch.blocks["BLOCK_K"] == 0, **launch.blocks,
        **launch_options(launch.num_warps, launch.num_stages),
    )  # fmt: skip
    out = x.new_empty((rows, E))
    wrap_triton(_add_norm_kernel)[(rows,)](
        partial, residual, norm_weight, out, residual.stride(0), out.stride(0), rows, E, eps,
        SPLITS=splits, BLOCK_E=triton.next_power_of_2(E), **launch_options(norm_warps(E), 1),
    )  # fmt: skip
    return out


def linear_add_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
) -> Tensor:
    """residual += x @ weight.T, and the RMSNorm of that.

    Args:
        x: (N, F) float32, float16 or bfloat16. Any N; made for 128 and fewer.
        weight: (E, F) of the same dtype.
        residual: (N, E) of the same dtype, changed in place; summed in float32 and rounded once.
            It shares no memory with the others (not checked).
        norm_weight: (E,) of the same dtype, contiguous.
        eps: added to the mean square.

    x, weight and residual may have any row stride, with the last dimension contiguous.

    Returns:
        (N, E), `F.rms_norm` of the rounded residual: computed in float32 and rounded once.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or stride.
    """
    op = "linear_add_norm"
    check_tensor(op, "x", x, dtype=FLOATS, shape=("N", "F"), unit_stride=True)
    (rows, F), same = x.shape, {"dtype": x.dtype, "device": x.device}
    check_tensor(op, "weight", weight, shape=("E", F), unit_stride=True, **same)
    E = len(weight)
    check_tensor(op, "residual", residual, shape=(rows, E), unit_stride=True, **same)
    check_tensor(op, "norm_weight", norm_weight, shape=(E,), contiguous=True, **same)
    if 0 in (rows, E, F) or takes_definition(x, weight, residual):
        return linear_add_norm_definition(x, weight, residual, norm_weight, eps)
    return _linear_add_norm_op(x, weight, residual, norm_weight, eps)
