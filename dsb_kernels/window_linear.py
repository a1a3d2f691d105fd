"""window_linear: a linear layer for the few rows of a window step, as fast as its weights arrive.

Optionally gated, as the first half of a Llama MLP: silu(x @ gate.T) * (x @ up.T) in one launch,
gate and up never in memory. `N` = rows, `E` = input features, `F` = output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from dsb_kernels._check import FLOATS, check_tensor
from dsb_kernels._configs import (
    Config,
    architecture_of,
    configuration,
    of_dtype,
)
from dsb_kernels._op import jit, launch_options, op, tl, triton, wrap_triton

MAX_ROWS = 128  # of one pass over the weights; more rows are correct, and read them once more

# --- definition -------------------------------------------------------------------------------


def window_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False
) -> Tensor:
    """x @ weight.T + bias; with `gated` silu(gate) * up of the two halves of that.

    Args:
        x: (N, E) float32, float16 or bfloat16, last dimension of stride 1. Any N; made for 128 and
            fewer.
        weight: (F, E), or (2 F, E) with `gated`, gate rows first; same dtype, last dimension of
            stride 1.
        bias: (F,) or (2 F,) of the same dtype, or None.
        gated: apply silu(gate) * up.

    Returns:
        (N, F), accumulated in float32. The kernel rounds once; the definition's gate and up are
        rounded before they are multiplied.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or stride.
    """
    y = linear(x, weight, bias)
    if not gated:
        return y
    gate, up = y.chunk(2, -1)
    return silu(gate) * up


# --- kernel -----------------------------------------------------------------------------------
# The weights are the M operand of the tensor cores, which want 64 rows of it, the window's rows
# are N: a program owns BLOCK_V output features (of gate and of up, where gated) and reads each of
# their weights once for up to 128 rows. All programs run at once and have equal work, so that what
# they wait for is memory and nothing else.


@jit
def _window_linear_kernel(
    weight_ptr, x_ptr, bias_ptr, out_ptr, stride_wf, stride_xn, stride_on, rows, F, E,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Program (tile of features, block of rows): out (BLOCK_N, BLOCK_V), rounded once."""
    feature = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Whole rows are masked, never parts of one where E allows it: the loads stay wide.
    w_mask, x_mask = (feature < F)[:, None], (row < rows)[None, :]
    gate_ptrs = weight_ptr + feature.to(tl.int64)[:, None] * stride_wf + k[None, :]
    up_ptrs = gate_ptrs + tl.cast(F, tl.int64) * stride_wf
    x_ptrs = x_ptr + row.to(tl.int64)[None, :] * stride_xn + k[:, None]

    gate = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)  # the only sum where not gated
    up = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)
    for at in range(0, E, BLOCK_K):
        inside = at + k < E
        wide_mask = w_mask if EVEN_K else w_mask & inside[None, :]
        w = tl.load(gate_ptrs + at, mask=wide_mask, other=0.0)
        x = tl.load(x_ptrs + at, mask=x_mask if EVEN_K else x_mask & inside[:, None], other=0.0)
        gate = tl.dot(w, x, gate, input_precision="ieee")
        if GATED:
            w = tl.load(up_ptrs + at, mask=wide_mask, other=0.0)
            up = tl.dot(w, x, up, input_precision="ieee")
    if bias_ptr is not None:
        gate += tl.load(bias_ptr + feature, mask=feature < F, other=0.0).to(tl.float32)[:, None]
        if GATED:
            bias = tl.load(bias_ptr + F + feature, mask=feature < F, other=0.0)
            up += bias.to(tl.float32)[:, None]
    if GATED:
        gate = gate / (1.0 + tl.exp(-gate)) * up
    out_ptrs = out_ptr + row.to(tl.int64)[None, :] * stride_on + feature[:, None]
    tl.store(out_ptrs, gate.to(out_ptr.dtype.element_ty), mask=w_mask & x_mask)


# --- op ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Geometry of a call, from static shapes alone."""

    grid: tuple[int, int]  # (tiles of features, blocks of rows)
    blocks: dict[str, int]
    num_warps: int
    num_stages: int


def narrowed(config: Config, features: int) -> tuple[dict[str, int], int]:
    """Blocks and warps of a configuration, its tile of features halved (down to the 64 rows that
    tensor cores want) while fewer programs than PROGRAMS would run."""
    blocks, warps = dict(config.blocks), config.num_warps
    programs = blocks.pop("PROGRAMS")
    while blocks["BLOCK_V"] > 64 and triton.cdiv(features, blocks["BLOCK_V"]) < programs:
        blocks["BLOCK_V"] //= 2
        warps //= 2
    return blocks, warps


def launch_of(rows: int, F: int, dtype: torch.dtype, architecture: str, *, gated: bool) -> Launch:
    op = of_dtype("window_linear" + " gated" * gated, dtype)
    config = configuration(op, rows, architecture)
    blocks, warps = narrowed(config, F)
    grid = (triton.cdiv(F, blocks["BLOCK_V"]), triton.cdiv(rows, blocks["BLOCK_N"]))
    return Launch(grid, blocks, warps, config.num_stages)


def _launch(a: Any) -> Tensor:
    (rows, E), F = a.x.shape, len(a.weight) // (2 if a.gated else 1)
    out = a.x.new_empty((rows, F))
    if out.numel() == 0:
        return out
    launch = launch_of(rows, F, a.x.dtype, architecture_of(a.x.device), gated=a.gated)
    wrap_triton(_window_linear_kernel)[launch.grid](
        a.weight, a.x, a.bias, out, a.weight.stride(0), a.x.stride(0), out.stride(0), rows, F, E,
        EVEN_K=E % launch.blocks["BLOCK_K"] == 0, GATED=a.gated, **launch.blocks,
        **launch_options(launch.num_warps, launch.num_stages),
    )  # fmt: skip
    return out


def _check(a: Any) -> None:
    name = "window_linear"
    check_tensor(name, "x", a.x, dtype=FLOATS, shape=("N", "E"), unit_stride=True)
    same = {"dtype": a.x.dtype, "device": a.x.device}
    features = "2 F" if a.gated else "F"
    shape = (features, a.x.shape[1])
    check_tensor(name, "weight", a.weight, shape=shape, unit_stride=True, **same)
    if a.gated and len(a.weight) % 2:
        raise ValueError(
            f"{name}: weight has {len(a.weight)} rows: accepted with gated is an even number"
        )
    if a.bias is not None:
        check_tensor(name, "bias", a.bias, shape=a.weight.shape[:1], contiguous=True, **same)


window_linear = op(window_linear_reference, launch=_launch, check=_check)
