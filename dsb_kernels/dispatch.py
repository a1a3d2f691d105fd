"""The one dispatch rule, op registration and argument checks shared by every op.

CUDA tensors run the Triton kernel, CPU tensors the plain-PyTorch definition. `DSB_BACKEND=eager`
and `DSB_BACKEND=triton` override that; with `TRITON_INTERPRET=1` in the environment before Triton
is imported, `DSB_BACKEND=triton` runs the kernels on CPU tensors under Triton's interpreter.
Without Triton (it exists only for Linux) the package works on the definitions alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

BACKENDS = ("eager", "triton")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what kernels compute with


def jit(fn: Callable | None = None, **options: Any) -> Any:
    """`triton.jit`, or the bare function where Triton does not exist (it is never launched)."""
    if triton is None:
        return fn if fn is not None else (lambda f: f)
    return triton.jit(fn, **options)


def interpreted() -> bool:
    """Whether kernels were decorated for the interpreter, which is decided when they are."""
    return triton is not None and triton.knobs.runtime.interpret


def use_triton(*tensors: Tensor | None) -> bool:
    """Whether an op on these tensors (None is skipped) launches its Triton kernel.

    Raises:
        ValueError: `DSB_BACKEND` is neither "eager" nor "triton".
        RuntimeError: `DSB_BACKEND=triton` where no Triton kernel can run.
    """
    backend = os.environ.get("DSB_BACKEND", "")
    if backend and backend not in BACKENDS:
        raise ValueError(f"DSB_BACKEND={backend!r}: accepted are 'eager', 'triton' or unset")
    present = [t for t in tensors if t is not None]
    on_cuda = all(t.is_cuda for t in present)
    if not backend:
        return on_cuda and triton is not None
    if backend == "eager":
        return False
    if triton is None:
        raise RuntimeError("DSB_BACKEND=triton: Triton is not installed")
    if on_cuda:
        return True
    # The interpreter needs data; shape propagation and tracing see the definition instead.
    if any(isinstance(t, FakeTensor | FunctionalTensor) for t in present):
        return False
    if not interpreted():
        raise RuntimeError("DSB_BACKEND=triton on CPU tensors: only with TRITON_INTERPRET=1")
    return True


def takes_definition(*tensors: Tensor | None) -> bool:
    """Whether a public function may call the definition itself instead of the op, which does the
    same 70 us later. The compiler is given the op, whose dispatch it can trace."""
    return not torch.compiler.is_compiling() and not use_triton(*tensors)


def register_op(name: str, *, mutates_args: Sequence[str] = ()) -> Callable:
    """Decorator: make a function the op `dsb::name`, transparent to `torch.compile`.

    The function's own body is the definition-or-kernel dispatch; it is traced as it stands, so
    the compiler sees either the definition's operators or the kernel launches (`wrap_triton`).
    """

    def decorate(fn: Callable) -> Callable:
        qualified = f"dsb::{name}"
        if triton is not None:
            return torch.library.triton_op(qualified, fn, mutates_args=tuple(mutates_args))
        op = torch.library.custom_op(qualified, fn, mutates_args=tuple(mutates_args))
        op.register_fake(fn)
        return op

    return decorate


class OnDevice:
    """A kernel launched on the device of its tensors; Triton takes the current one, whatever they
    are on."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            with torch.cuda.device(next(a.device for a in args if isinstance(a, Tensor))):
                self.kernel[grid](*args, **options)

        return launch


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton` while tracing; otherwise what launches the kernel."""
    if not isinstance(kernel, triton.runtime.jit.JITFunction):
        return kernel  # an interpreted one
    wrapped = torch.library.wrap_triton(kernel)
    return OnDevice(kernel) if wrapped is kernel else wrapped


def launch_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Keyword arguments of a launch: warps, stages, and FP fusion on whatever Triton's default."""
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    # The traced launch (torch.compile) takes no compiler options besides these two.
    if not torch._library.triton.is_wrap_triton_enabled():
        options["enable_fp_fusion"] = True
    return options


# --- argument checks: from metadata alone, nothing is read from the device --------------------


def check_choice(op: str, name: str, value: object, accepted: Sequence[object]) -> None:
    """`value` is one of `accepted`, else a ValueError."""
    if value not in accepted:
        choices = ", ".join(repr(a) for a in accepted)
        raise ValueError(f"{op}: {name}={value!r}: accepted are {choices}")


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    *,
    dtype: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | str],
    device: torch.device | None = None,
    contiguous: bool = False,
    unit_stride: bool = False,
) -> None:
    """Check one tensor argument.

    Args:
        dtype: what is accepted.
        shape: expected sizes; a string names a free dimension; a leading "..." takes any.
        device: device it must be on, None for any.
        contiguous: the whole tensor must be contiguous.
        unit_stride: the last dimension must have stride 1.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: wrong shape, device or strides.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is {type(tensor).__name__}: a tensor is accepted")
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    if tensor.dtype not in dtypes:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} has dtype {found}: accepted are {accepted}")
    found, expected = list(tensor.shape), list(shape)
    if expected and expected[0] == "...":
        expected = expected[1:]
        found = found[len(found) - len(expected) :] if len(found) >= len(expected) else found
    fits = len(found) == len(expected) and all(
        isinstance(e, str) or f == e for f, e in zip(found, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(s) for s in shape)
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}: accepted is ({wanted})")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}: accepted is {device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} has strides {tensor.stride()}: accepted is a contiguous tensor"
        )
    if unit_stride and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} has stride {tensor.stride(-1)} in its last dimension: accepted is 1"
        )
