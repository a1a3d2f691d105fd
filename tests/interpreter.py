"""bfloat16 as a GPU computes it, in Triton's interpreter.

The interpreter keeps bfloat16 as its bits, in uint16. Triton 3.6 to 3.9 multiply those integers in
`tl.dot` (relative errors of 1e9), truncate float32 to bfloat16 where a GPU rounds to nearest even,
and lose subnormal numbers. Without a repair no test on a CPU could hold a bfloat16 kernel against
its definition. What stands here is right whatever the version, so that one that is right itself
computes the same with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_dot, _cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl


def to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even; too large is infinity, as the carry into the exponent makes it."""
    bits = np.ascontiguousarray(x).view(np.uint32).reshape(x.shape)
    rounded = bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)
    return np.where(np.isnan(x), 0x7FFF, rounded >> 16).astype(np.uint16)


def _widened(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle(to_float32(x.data), tl.float32)


def _cast_with_bfloat16(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
    src = _widened(src)
    if dst_type.scalar != tl.bfloat16:
        return _cast(self, src, dst_type)
    return TensorHandle(to_bfloat16(_cast(self, src, tl.float32).data), tl.bfloat16)


def _dot_with_bfloat16(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *args: Any
) -> TensorHandle:
    return _dot(self, _widened(a), _widened(b), *args)  # accumulates in float32


def repair_bfloat16() -> None:
    InterpreterBuilder.create_dot = _dot_with_bfloat16
    InterpreterBuilder.cast_impl = _cast_with_bfloat16
