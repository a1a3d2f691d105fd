"""Checks of an op's arguments, from metadata alone: nothing is read from the device.

A message names the op, the argument, its value and what is accepted. Where an op's tensors share
what is asked of them, its `_check` binds that once:

    check = functools.partial(check_tensor, name, dtype=torch.int32, device=a.canvas.device)
    check("start", a.start, shape=(B,))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what kernels compute with


def check_choice(op: str, name: str, value: object, accepted: Sequence[object]) -> None:
    """`value` is one of `accepted`, else a ValueError."""
    if value not in accepted:
        choices = ", ".join(repr(a) for a in accepted)
        raise ValueError(f"{op}: {name}={value!r}: accepted are {choices}")


def check_between(op: str, name: str, value: float, low: float, high: float) -> None:
    """`low` <= `value` <= `high`, else a ValueError."""
    if not low <= value <= high:
        raise ValueError(f"{op}: {name}={value}: accepted are {low} to {high}")


def check_tensor(
    op: str,
    name: str,
    tensor: object,
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
    if (
        isinstance(tensor, Tensor)
        and (tensor.dtype is dtype if isinstance(dtype, torch.dtype) else tensor.dtype in dtype)
        and _fits(tensor.shape, shape)
        and (device is None or tensor.device == device)
        and (not contiguous or tensor.is_contiguous())
        and (not unit_stride or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1)
    ):
        return
    _refuse(op, name, tensor, dtype, shape, device, contiguous)


def _fits(sizes: Sequence[int], expected: Sequence[int | str]) -> bool:
    if expected and expected[0] == "...":
        expected = expected[1:]
        sizes = sizes[max(0, len(sizes) - len(expected)) :]
    if len(sizes) != len(expected):
        return False
    for size, e in zip(sizes, expected, strict=True):
        if size != e and not isinstance(e, str):
            return False
    return True


def _refuse(
    op: str,
    name: str,
    tensor: object,
    dtype: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | str],
    device: torch.device | None,
    contiguous: bool,
) -> NoReturn:
    """Raise what `check_tensor` documents, for the first thing that is wrong."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is {type(tensor).__name__}: a tensor is accepted")
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    if tensor.dtype not in dtypes:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        dtype_name = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} has dtype {dtype_name}: accepted are {accepted}")
    if not _fits(tensor.shape, shape):
        wanted = ", ".join(str(s) for s in shape)
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}: accepted is ({wanted})")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}: accepted is {device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} has strides {tensor.stride()}: accepted is a contiguous tensor"
        )
    raise ValueError(
        f"{op}: {name} has stride {tensor.stride(-1)} in its last dimension: accepted is 1"
    )
