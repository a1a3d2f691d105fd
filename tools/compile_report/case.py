"""A kernel to compile and what its machine code must look like."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dsb_kernels._configs import ARCHITECTURES

OVERLAPPING = ("sm_90", "sm_100")  # where a kernel begins before the one before it has ended
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one production configuration.

    `expects_*` and `max_*` are asserted for sm_90 only.
    """

    op: str  # public name of the op
    name: str  # which kernel, variant and shape class
    kernel: Any  # the `@jit` function
    config: Any  # the launch's `num_warps` and `num_stages`
    constexprs: Mapping[str, Any]  # the tl.constexpr arguments, and pointers that are None
    pointers: str = "*i32"  # the type of the pointers that are not in `types`
    types: Mapping[str, str] = field(default_factory=dict)  # other arguments are int32
    odd: Container[str] = ()  # integers that are not known to be divisible by 16
    architectures: tuple[str, ...] = ARCHITECTURES
    expects_tensor_cores: bool = False  # HGMMA on sm_90
    expects_wide_loads: bool = False  # global loads have 128 bits, except those of scalars
    peeks: bool = False  # at what says where to prefetch, before it waits for the kernel before
    prefetches: bool = False  # into the L2 cache, before it waits for the kernel before
    prefetches_in_loop: bool = False  # into the L2 cache, beside its accesses
    scalar_load_bytes: int = 0  # bytes of these scalars (a flag, a seed)
    max_loop: int | None = None  # instructions of the longest loop that holds no other
    max_exponentials: float | None = None  # MUFU.EX2 of a thread for each element
    elements_per_thread: float | None = None  # elements that the code scores, each loop once

    @property
    def signature(self) -> dict[str, str]:
        """The names and types of the arguments that are known at run time only."""
        return {
            name: self.types.get(name, self.pointers if name.endswith("_ptr") else "i32")
            for name in self.kernel.arg_names
            if name not in self.constexprs and name != "PDL"
        }

    @property
    def divisible(self) -> list[str]:
        """The arguments that are known to be divisible by 16; all pointers are."""
        return [
            name
            for name, kind in self.signature.items()
            if kind.startswith("*") or (kind == "i32" and name not in self.odd)
        ]
