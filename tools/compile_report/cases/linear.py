"""Compile cases of window_linear and linear_add_norm."""

from __future__ import annotations

import itertools
from typing import Any

from dsb_kernels import linear
from dsb_kernels._configs import ARCHITECTURES
from dsb_kernels._op import triton
from tools.compile_report.case import DTYPES, CompileCase, all_but, signature_of

LINEAR = [  # rows, features, gated, dtype, bias
    *((n, 12288, gated, "bf16", False) for n in (16, 32, 64, 128) for gated in (False, True)),
    # Dream's 4608 features leave fewer tiles of 128 than there should be programs.
    *((n, 4608, False, "bf16", True) for n in (32, 128)),
    *((32, 12288, gated, "fp16", False) for gated in (False, True)),
    *((n, 12288, gated, "fp32", False) for n in (32, 64) for gated in (False, True)),
]
SPLIT_LINEAR = [(16, "bf16"), (32, "bf16"), (64, "bf16"), (128, "bf16"), (32, "fp16")]
SPLIT_LINEAR += [(32, "fp32"), (64, "fp32")]  # rows, dtype
ADD_NORM = [(4096, "bf16", 2), (3584, "bf16", 4), (4096, "fp16", 2)]  # features, dtype, splits


def cases() -> list[CompileCase]:
    """Every row class, plain and gated, at the models' shapes; bias and float16 once."""
    return [
        *(linear_case(a, *variant) for a, variant in itertools.product(ARCHITECTURES, LINEAR)),
        *(split_case(a, *variant) for a, variant in itertools.product(ARCHITECTURES, SPLIT_LINEAR)),
        *(norm_case(*variant) for variant in ADD_NORM),
        silu_case(),
    ]


def linear_case(
    architecture: str, rows: int, F: int, gated: bool, dtype: str, bias: bool
) -> CompileCase:
    launch = linear.linear_launch(rows, F, DTYPES[dtype], architecture, gated=gated)
    constexprs: dict[str, Any] = {**launch.blocks, "EVEN_K": True, "GATED": gated}
    constexprs |= {} if bias else {"bias_ptr": None}
    kernel = linear._window_linear_kernel
    signature = signature_of(kernel, constexprs, {}, f"*{dtype}")
    words = f"{'gated ' * gated}{dtype} {F} features{' bias' * bias}"
    return CompileCase(
        op="window_linear",
        name=f"{words} {rows} rows",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        divisible=all_but(signature, "num_tokens"),
        architectures=(architecture,),
        expects_tensor_cores=dtype != "fp32",
        expects_wide_loads=not bias,  # whose loads are as narrow as it is
    )


def split_case(architecture: str, rows: int, dtype: str) -> CompileCase:
    launch = linear.split_launch(rows, 12288, 4096, DTYPES[dtype], architecture)
    constexprs = {**launch.blocks, "EVEN_K": True}
    kernel = linear._split_linear_kernel
    signature = signature_of(kernel, constexprs, {"partial_ptr": "*fp32"}, f"*{dtype}")
    return CompileCase(
        op="linear_add_norm",
        name=f"split linear {dtype} {rows} rows",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        divisible=all_but(signature, "num_tokens"),
        architectures=(architecture,),
        expects_tensor_cores=dtype != "fp32",
        expects_wide_loads=True,
    )


def norm_case(E: int, dtype: str, splits: int) -> CompileCase:
    """For the splits that the models' shapes give."""
    constexprs = {"SPLITS": splits, "BLOCK_F": triton.next_power_of_2(E)}
    types = {"partial_ptr": "*fp32", "eps": "fp32"}
    kernel = linear._add_norm_kernel
    signature = signature_of(kernel, constexprs, types, f"*{dtype}")
    return CompileCase(
        op="linear_add_norm",
        name=f"add norm {dtype} {E} features {splits} splits",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=linear.norm_warps(E),
        divisible=all_but(signature, "num_tokens", "eps"),
        expects_wide_loads=True,
    )


def silu_case() -> CompileCase:
    """What follows cuBLAS where there are more tokens than our kernel serves."""
    kernel, constexprs = linear._silu_mul_kernel, {"BLOCK": linear.SILU_BLOCK}
    signature = signature_of(kernel, constexprs, {}, "*bf16")
    return CompileCase(
        op="window_linear",
        name="silu * mul bf16",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=4,
        divisible=all_but(signature),
        expects_wide_loads=True,
    )
