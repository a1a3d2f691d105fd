"""Counts the bytes that kernels load and store, address by address, in Triton's interpreter.

must      each input that matters once, each output once
touched   distinct bytes that are read or written at all: what memory has to move
asked     bytes of all loads of the large inputs; what exceeds `touched` comes from the caches
partials  bytes of partial results (states, splits), written once and read once
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from tests.mutations import kernels

L2_BYTES = 50e6  # of an H100


@dataclass
class Traffic:
    """Addresses that each load and store had, with repetitions, and the bytes of an element."""

    loads: list[tuple[np.ndarray, int]] = field(default_factory=list)
    stores: list[tuple[np.ndarray, int]] = field(default_factory=list)

    def asked(self, *tensors: Tensor) -> int:
        """Bytes of loads and stores in the tensors' memory."""
        accesses = self.loads + self.stores
        return sum(self._inside(t, a).size * n for t in tensors for a, n in accesses)

    def touched(self, *tensors: Tensor) -> int:
        """Distinct bytes loaded plus distinct bytes stored in the tensors' memory."""
        total = 0
        for tensor, accesses in itertools.product(tensors, (self.loads, self.stores)):
            inside = [self._inside(tensor, a) for a, _ in accesses]
            total += np.unique(np.concatenate(inside)).size * tensor.element_size() if inside else 0
        return total

    def asked_elsewhere(self, *tensors: Tensor) -> int:
        """Bytes in none of the tensors' memory: partial results."""
        return sum(a.size * n for a, n in self.loads + self.stores) - self.asked(*tensors)

    @staticmethod
    def _inside(tensor: Tensor, addresses: np.ndarray) -> np.ndarray:
        last = sum(
            (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        assert last + 1 == tensor.numel()  # dense, in any order of its dimensions
        low = tensor.data_ptr()
        high = low + tensor.numel() * tensor.element_size()
        return addresses[(addresses >= low) & (addresses < high)]


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Run kernels in the interpreter and record what they load and store."""
    from triton.runtime.interpreter import interpreter_builder

    builder, traffic = type(interpreter_builder), Traffic()
    load, store = builder.create_masked_load, builder.create_masked_store

    def addresses(ptrs, mask):
        size = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        return np.atleast_1d(ptrs.data[mask.data]).ravel(), size

    def recorded_load(self, ptrs, mask, *rest):
        traffic.loads.append(addresses(ptrs, mask))
        return load(self, ptrs, mask, *rest)

    def recorded_store(self, ptrs, value, mask, *rest):
        traffic.stores.append(addresses(ptrs, mask))
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = recorded_load, recorded_store
    try:
        with kernels():
            yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


@dataclass
class Moved:
    """Bytes of one call."""

    name: str
    must: int
    touched: int
    asked: int
    partials: int = 0

    @property
    def all_to_memory(self) -> float:
        """What would move if the partial results left the L2 cache, as a share of `must`."""
        return (self.touched + self.partials) / self.must

    def line(self) -> str:
        return (
            f"{self.name:46} must {self.must / 1e6:6.1f} MB, "
            f"touched {self.touched / self.must:.3f}, asked {self.asked / self.must:.3f}, "
            f"with {self.partials / 1e6:.2f} MB of partial results {self.all_to_memory:.3f}"
        )
