"""How a kernel is launched, and how it overlaps with the kernel before it.

A kernel of a step is launched while the one before it still runs ("programmatic dependent launch",
GPUs of capability 9.0 and up). It asks the L2 cache for what does not depend on other kernels, the
weights, by `prefetch_rows` and the like; then `wait_for_previous`. docs/tuning.md says why that is
right. With `PDL` False these functions do nothing: on older GPUs, under the interpreter, and where
torch traces the launch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsb_kernels._op import constant, jit, tl, triton

if triton is not None:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINE_BYTES = constant(128)  # of the L2 cache
PREFETCHED_LINES = constant(512)  # by a program: 64 KiB
PDL_OPTIONS = {"PDL": True, "launch_pdl": True}  # of a launch that overlaps

# --- for kernels --------------------------------------------------------------------------------


@jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernel before has ended and all that it wrote is visible, and let the next
    kernel begin. Before this call a kernel must neither load nor store; it may prefetch, and `peek`
    at what says where."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@jit
def peek(ptr):
    """Read a number that says what to prefetch before `wait_for_previous`. The kernel before may
    yet write it, so nothing but a prefetch may depend on it."""
    return tl.load(ptr, volatile=True)  # so that the number after the wait is read again


@jit
def prefetch(ptrs, mask, PDL: tl.constexpr):
    """Ask the L2 cache for the lines of these addresses, without waiting for them."""
    if PDL:
        ptrs, mask = tl.broadcast(ptrs, mask)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r", [ptrs, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@jit
def prefetch_span(ptr, first, end, SIZE: tl.constexpr, PDL: tl.constexpr):
    """Ask the L2 cache for SIZE neighbours from element `first` on, and before `end`."""
    if PDL:
        PER_LINE: tl.constexpr = LINE_BYTES * 8 // ptr.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = SIZE // PER_LINE if SIZE > PER_LINE else 1
        element = first + PER_LINE * tl.arange(0, LINES)
        prefetch(ptr + element, element < end, PDL)


@jit
def prefetch_rows(
    ptr, row, num_rows, stride, first, end, PDL: tl.constexpr, SHARE: tl.constexpr = 1
):
    """Ask the L2 cache for each `row` (R,) of the matrix at `ptr`: its columns from `first` on and
    before `end`, as many as make PREFETCHED_LINES / SHARE lines in all."""
    if PDL:
        PER_LINE: tl.constexpr = LINE_BYTES * 8 // ptr.dtype.element_ty.primitive_bitwidth
        column = first + PER_LINE * tl.arange(0, PREFETCHED_LINES // (SHARE * row.shape[0]))
        mask = (row < num_rows)[:, None] & (column < end)[None, :]
        prefetch(ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask, PDL)


@jit
def prefetch_odd_kib(
    ptr, stride, num_rows, step, LINES: tl.constexpr, ROW_LINES: tl.constexpr, PDL: tl.constexpr
):
    """Ask the L2 cache for some of the odd KiB of a matrix's rows, which have ROW_LINES lines
    (`odd_lines`). Each program has an equal share of the rows and asks for it in steps of LINES
    lines, of which this is number `step`; after the last one the function asks for nothing."""
    if PDL:
        PER_ROW: tl.constexpr = triton.next_power_of_2(ROW_LINES)
        PER_LINE: tl.constexpr = LINE_BYTES * 8 // ptr.dtype.element_ty.primitive_bitwidth
        ROWS: tl.constexpr = LINES // PER_ROW
        n0, n1, n2 = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
        share = tl.cdiv(num_rows, n0 * n1 * n2)
        first = ((tl.program_id(2) * n1 + tl.program_id(1)) * n0 + tl.program_id(0)) * share
        row, line = first + step * ROWS + tl.arange(0, ROWS), tl.arange(0, PER_ROW)
        mask = (row < tl.minimum(first + share, num_rows))[:, None]
        if PER_ROW > ROW_LINES:
            mask &= (line < ROW_LINES)[None, :]
        column = (line // 8 * 16 + 8 + line % 8) * PER_LINE
        prefetch(ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask, PDL)


# --- launches -----------------------------------------------------------------------------------


def odd_lines(weight: Tensor) -> int:
    """How many lines of the L2 cache the odd KiB of a row of `weight` (F, E) have."""
    lines = triton.cdiv(weight.shape[1] * weight.itemsize, LINE_BYTES.value)
    return lines // 16 * 8 + max(lines % 16 - 8, 0)


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on a device are launched while the one before them still runs. `DSB_PDL=0`
    forbids it, to see what it brings or whether a fault comes from it."""
    if os.environ.get("DSB_PDL") == "0":
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


class OnDevice:
    """Launches a kernel on the device of its tensors; Triton itself uses the current device."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            device = next(a.device for a in args if isinstance(a, Tensor))
            if overlaps(device):
                options |= PDL_OPTIONS
            with torch.cuda.device(device):
                self.kernel[grid](*args, **options)

        return launch


def wrap_triton(kernel: Any) -> Any:
    """Return an object that launches the kernel as `object[grid](...)`. While torch traces, it is
    the one of `torch.library.wrap_triton`."""
    if not isinstance(kernel, triton.runtime.jit.JITFunction):
        return kernel  # The kernel is an interpreted one, which torch does not wrap.
    wrapped = torch.library.wrap_triton(kernel)
    return OnDevice(kernel) if wrapped is kernel else wrapped


def launch_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Return the keyword arguments of a launch, which fuses floating-point operations whatever
    Triton's default is. `OnDevice` decides on PDL."""
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "PDL": False}
    # The traced launch (torch.compile) takes no compiler options besides the first two.
    if not torch._library.triton.is_wrap_triton_enabled():
        options["enable_fp_fusion"] = True
    return options
