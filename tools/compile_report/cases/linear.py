"""Compile cases of window_linear and linear_add_norm."""

from __future__ import annotations

import itertools

from dsb_kernels import linear
from dsb_kernels._configs import ARCHITECTURES, Config
from dsb_kernels._op import triton
from tools.compile_report.case import DTYPES, CompileCase

# iLLaDA's 6144 and Dream's 4608 features leave fewer tiles of 128 than there should be programs.
# Where each program has an SM to itself, on sm_90 alone, it has more stages.
ALONE = [
    *((n, 6144, False, "bf16", False) for n in (16, 32, 64, 128)),
    *((n, 4608, False, "bf16", True) for n in (16, 64)),
]
LINEAR = [  # tokens, features, gated, dtype, bias
    *((n, 12288, gated, "bf16", False) for n in (16, 32, 64, 128) for gated in (False, True)),
    *((n, 4608, False, "bf16", True) for n in (32, 128)),
    *((32, 12288, gated, "fp16", False) for gated in (False, True)),
    *((n, 12288, gated, "fp32", False) for n in (32, 64) for gated in (False, True)),
    *ALONE,
]
SPLIT_LINEAR = [(16, "bf16"), (32, "bf16"), (64, "bf16"), (128, "bf16"), (32, "fp16")]
SPLIT_LINEAR += [(32, "fp32"), (64, "fp32")]  # tokens, dtype
ADD_NORM = [(4096, "bf16", 2), (3584, "bf16", 4), (4096, "fp16", 2)]
ADD_NORM += [(4096, "bf16", 0)]  # features, dtype, splits; none after cuBLAS's product


def cases() -> list[CompileCase]:
    """Every class of tokens, plain and gated, at the models' shapes; bias and float16 once. float16
    has bfloat16's tiles, so that it is compiled for sm_90 alone."""
    return [
        *(
            linear_case(a, *v)
            for a, v in itertools.product(ARCHITECTURES, LINEAR)
            if is_compiled(a, *v)
        ),
        *(
            split_case(a, *v)
            for a, v in itertools.product(ARCHITECTURES, SPLIT_LINEAR)
            if is_compiled(a, *v)
        ),
        *(norm_case(*variant) for variant in ADD_NORM),
        silu_case(),
    ]


def is_compiled(architecture: str, *variant: object) -> bool:
    return architecture == "sm_90" or not ("fp16" in variant or variant in ALONE)


def linear_case(
    architecture: str, tokens: int, F: int, gated: bool, dtype: str, bias: bool
) -> CompileCase:
    launch = linear.linear_launch(tokens, F, DTYPES[dtype], architecture, gated=gated)
    constexprs = {**launch.blocks, "EVEN_K": True, "GATED": gated}
    return CompileCase(
        "window_linear", f"{'gated ' * gated}{dtype} {F} features{' bias' * bias} {tokens} tokens",
        linear._window_linear_kernel, launch, constexprs | ({} if bias else {"bias_ptr": None}),
        f"*{dtype}",
        odd=("num_tokens",),
        architectures=(architecture,),
        prefetches=True,
        expects_tensor_cores=dtype != "fp32",
        expects_wide_loads=not bias,  # a bias is loaded by narrower loads
    )  # fmt: skip


def split_case(architecture: str, tokens: int, dtype: str) -> CompileCase:
    launch = linear.split_launch(tokens, 12288, 4096, DTYPES[dtype], architecture)
    return CompileCase(
        "linear_add_norm", f"split linear {dtype} {tokens} tokens", linear._split_linear_kernel,
        launch, {**launch.blocks, "EVEN_K": True}, f"*{dtype}",
        types={"partial_ptr": "*fp32"},
        odd=("num_tokens",),
        architectures=(architecture,),
        prefetches=True,
        expects_tensor_cores=dtype != "fp32",
        expects_wide_loads=True,
    )  # fmt: skip


def norm_case(E: int, dtype: str, splits: int) -> CompileCase:
    """The sum of so many splits with the residual and the norm."""
    return CompileCase(
        "linear_add_norm", f"add norm {dtype} {E} features {splits} splits",
        linear._add_norm_kernel, Config({}, linear.norm_warps(E)),
        {"SPLITS": splits, "BLOCK_F": triton.next_power_of_2(E)}
        | ({} if splits else {"partial_ptr": None}),
        f"*{dtype}",
        types={"partial_ptr": "*fp32", "eps": "fp32"},
        odd=("num_tokens",),
        prefetches=True,
        expects_wide_loads=True,
    )  # fmt: skip


def silu_case() -> CompileCase:
    """The kernel after cuBLAS's product where there are more tokens than our kernel serves."""
    return CompileCase(
        "window_linear", "silu * mul bf16", linear._silu_mul_kernel, Config({}, num_warps=4),
        {"BLOCK": linear.SILU_BLOCK}, "*bf16", expects_wide_loads=True,
    )  # fmt: skip
