"""A kernel to compile and what its machine code must look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsb_kernels._configs import ARCHITECTURES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one production configuration.

    `expects_*` and `max_*` are asserted for sm_90 only.
    """

    op: str  # public name of the op
    name: str  # which kernel, variant and shape class
    kernel: Any  # the `@jit` function
    signature: Mapping[str, str]  # runtime arguments: {"x_ptr": "*bf16", "length": "i32", ...}
    constexprs: Mapping[str, Any]  # the tl.constexpr arguments, and pointers that are None
    num_warps: int
    num_stages: int = 1
    divisible: tuple[str, ...] = ()  # runtime arguments known to be divisible by 16 (pointers too)
    architectures: tuple[str, ...] = ARCHITECTURES
    expects_tensor_cores: bool = False  # HGMMA on sm_90
    expects_wide_loads: bool = False  # every global load is of 128 bits, but for ...
    scalar_load_bytes: int = 0  # ... this many bytes of scalars (a flag, a seed)
    max_loop: int | None = None  # instructions of the longest loop that holds no other
    max_exponentials: float | None = None  # MUFU.EX2 in the code, of a thread, divided by ...
    elements_per_thread: float | None = None  # ... the elements that this code scores (a loop once)


def signature_of(
    kernel: Any, constexprs: Mapping[str, Any], types: Mapping[str, str], pointers: str = "*i32"
) -> dict[str, str]:
    """Types of the arguments of a kernel that are known at run time only: those in `types`; of
    other pointers `pointers`; of other numbers int32."""
    return {
        name: types.get(name, pointers if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constexprs
    }


def all_but(signature: Mapping[str, str], *names: str) -> tuple[str, ...]:
    """The arguments of a signature without those that are named."""
    return tuple(name for name in signature if name not in names)


def pointers_of(signature: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name for name, kind in signature.items() if kind.startswith("*"))
