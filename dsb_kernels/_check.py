"""Checks of an op's arguments. They look at metadata alone and read nothing from the device.

A message names the op, the argument, its value and what is accepted. Where several tensors of an op
must meet the same requirements, its `_check` binds them once:

    check = functools.partial(check_tensor, name, dtype=torch.int32, device=a.canvas.device)
    check("start", a.start, shape=(B,))
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # dtypes that kernels take


def check_choice(op: str, name: str, value: object, accepted: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `accepted`."""
    if value not in accepted:
        choices = ", ".join(repr(a) for a in accepted)
        raise ValueError(f"{op}: {name}={value!r}: accepted are {choices}")


def check_between(op: str, name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless `low` <= `value` <= `high`."""
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
        dtype: the accepted dtype, or several.
        shape: expected sizes. A string stands for any size; a leading "..." stands for any number
            of dimensions.
        device: the device that the tensor must be on; None accepts every device.
        contiguous: the whole tensor must be contiguous.
        unit_stride: the last dimension must have stride 1.

    Raises:
        TypeError: `tensor` is not a tensor, or has another dtype.
        ValueError: `tensor` has the wrong shape, device or strides.
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
    """Whether a shape is the `expected` one, which `check_tensor` explains."""
    if expected and expected[0] == "...":
        expected = expected[1:]
        sizes = sizes[max(0, len(sizes) - len(expected)) :]
    if len(sizes) != len(expected):
        return False
    for size, wanted in zip(sizes, expected, strict=True):
        if size != wanted and not isinstance(wanted, str):
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


def check_stride(op: str, name: str, tensor: Tensor, dim: int, tile: int) -> None:
    """Raise ValueError if `tile` neighbours in a dimension of a tensor reach 2**32 elements: a
    kernel keeps the offsets of a tile's elements in 32 bits, since registers are scarce."""
    limit = (1 << 32) // tile
    if tensor.shape[dim] > 1 and tensor.stride(dim) > limit:
        raise ValueError(
            f"{op}: {name} has stride {tensor.stride(dim)} in dimension {dim}: accepted is at most "
            f"{limit}"
        )


def check_window(
    op: str, a: Any, optional: Sequence[str], head_dims: range, accepted: str
) -> functools.partial[None]:
    """Check the arguments that rope_write_kv and window_attention share: q, the caches, the window,
    and the (B,) int32 arguments that `optional` names, which may be None. `accepted` describes
    `head_dims` in words. Returns a check for tensors that must have q's dtype and device, and a
    last dimension of stride 1.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or stride.
    """
    check_tensor(op, "q", a.q, dtype=FLOATS, shape=("B", "H", "W", "D"), unit_stride=True)
    B, H, W, D = a.q.shape
    if D not in head_dims:
        raise ValueError(f"{op}: q has head dimension {D}: accepted is {accepted}")
    check = functools.partial(check_tensor, op, device=a.q.device)
    like_q = functools.partial(check, dtype=a.q.dtype, unit_stride=True)
    batch = B if a.cache_batch_idx is None else "cache batch"
    like_q("k_cache", a.k_cache, shape=(batch, "H_kv", "C", D))
    batch, H_kv, C = a.k_cache.shape[:3]
    like_q("v_cache", a.v_cache, shape=(batch, H_kv, C, D))
    if a.k_cache.stride() != a.v_cache.stride():
        raise ValueError(
            f"{op}: v_cache has strides {a.v_cache.stride()}: accepted are k_cache's "
            f"{a.k_cache.stride()}"
        )
    if batch == 0 < B:
        raise ValueError(f"{op}: k_cache has 0 batch rows: accepted is at least 1")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"{op}: q has {H} heads: accepted is a multiple of k_cache's {H_kv}")
    if W > C:
        raise ValueError(f"{op}: q has {W} columns: accepted is at most k_cache's {C} positions")
    for name in ("window_start", "window_length", *optional):
        value = getattr(a, name)
        if value is not None or name not in optional:
            check(name, value, dtype=torch.int32, shape=(B,), contiguous=True)
    return like_q
