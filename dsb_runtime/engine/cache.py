"""The K/V cache: its buffers, their size, and errors that say what would fit.

Keys are stored after rotation. A position has the K and V of the last forward that computed it. DSB
Cache needs nothing else: a refresh writes every position, and a window step writes a few.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsb_runtime.engine.parallel import is_tensor_parallel
from dsb_runtime.families import device_of

# Of a container: its limit and what is in use, of cgroups 2 and 1.
CGROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class CacheShape:
    """What determines the size of the K/V cache of a model, or of this process's share of it."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def elements(self, batch: int, length: int) -> int:
        """How many numbers the keys and values of `batch` rows of `length` positions have."""
        return 2 * self.layers * self.kv_heads * self.head_dim * batch * length

    def nbytes(self, batch: int, length: int) -> int:
        return self.elements(batch, length) * self.dtype.itemsize


def cache_shape_of(model: PreTrainedModel) -> CacheShape:
    attn = model.model.layers[0].self_attn
    heads = model.config.num_key_value_heads
    if is_tensor_parallel(model):
        heads = attn.k_proj.weight.to_local().shape[0] // attn.head_dim
    layers = model.config.num_hidden_layers
    embedding: Any = model.get_input_embeddings()
    dtype = embedding.weight.dtype
    return CacheShape(layers, heads, attn.head_dim, dtype, device_of(model))


def allocate(shape: CacheShape, batch: int, length: int) -> Tensor:
    """Allocate storage (n,) for the keys and values of `batch` rows of `length` positions.

    Raises:
        torch.OutOfMemoryError: the message names the bytes that were asked for and a setting that
            fits.
    """
    try:
        return torch.zeros(shape.elements(batch, length), dtype=shape.dtype, device=shape.device)
    except RuntimeError as error:  # a CPU's allocator raises no OutOfMemoryError
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(growth_message(shape, batch, length)) from error


@dataclass(frozen=True)
class KVCache:
    """K and V of `batch` rows of `capacity` positions, (batch, H_kv, capacity, D) for each layer.

    With cache="none" no layer's K/V is read after the layer has run. Then `scratch` is True, all
    layers share one buffer, and a step writes its b rows into the first b rows of the buffer,
    whichever batch rows they are.
    """

    batch: int
    keys: list[Tensor]
    values: list[Tensor]
    scratch: bool
    storage: Tensor  # of both: (layers * 2 * batch, H_kv, capacity, D)

    def forget(self, rows: slice = slice(None)) -> None:
        """Clear batch rows that may hold NaN. Their next refresh leaves the padding as it is, and
        not every attention that is called spares what it masks."""
        for buffer in (*self.keys, *self.values):
            buffer[slice(None) if self.scratch else rows].zero_()

    @classmethod
    def over(
        cls, storage: Tensor, shape: CacheShape, batch: int, capacity: int, num_layers: int
    ) -> KVCache:
        """Make a cache in the first part of `storage` (n,), for a model of `num_layers` layers.
        `shape.layers` is how many buffers it has: one for each layer, or one for all."""
        size = shape.elements(batch, capacity)
        layers = storage[:size].view(
            shape.layers, 2, batch, shape.kv_heads, capacity, shape.head_dim
        )
        repeats = num_layers // shape.layers
        keys, values = ([*layers[:, i].unbind()] * repeats for i in (0, 1))
        return cls(batch, keys, values, repeats > 1, layers.flatten(0, 2))


# Only torch's GPU allocator raises OutOfMemoryError. These are the messages of the others: the
# CPU's, CUDA's own (for a graph), cuBLAS's, and Triton's (when it loads a kernel).
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


def is_out_of_memory(error: RuntimeError) -> bool:
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in message for words in OUT_OF_MEMORY
    )


def free_bytes(device: torch.device) -> int | None:
    """How many bytes of memory are free on a device; None where that cannot be said."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused  # torch's allocator has some of it
    limits, info = [], Path("/proc/meminfo")
    if info.is_file():
        limits += [1024 * int(n) for n in re.findall(r"MemAvailable:\s*(\d+)", info.read_text())]
    for names in CGROUPS:
        limit, used = (Path("/sys/fs/cgroup", name) for name in names)
        with contextlib.suppress(OSError, ValueError):  # a limit of "max" is none
            limits.append(int(limit.read_text()) - int(used.read_text()))
    return min(limits, default=None)


def fits(shape: CacheShape, batch: int, length: int) -> bool:
    """Try to allocate a cache of that size, and return whether that succeeds."""
    try:
        torch.empty(shape.nbytes(batch, length), dtype=torch.uint8, device=shape.device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def largest(limit: int, fits_with: Callable[[int], bool]) -> int:
    """The largest n from 1 to `limit` for which `fits_with(n)` is true, or 0. If it is true for n,
    it must be true for every smaller number."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits_with(middle):
            low = middle
        else:
            high = middle - 1
    return low


def growth_message(shape: CacheShape, batch: int, length: int) -> str:
    message = (
        f"K/V cache for a batch of {batch} with {length} positions each: "
        f"{shape.nbytes(batch, length):,} bytes asked for on {shape.device} and not there"
    )
    rows = largest(batch - 1, lambda n: fits(shape, n, length))
    if rows:
        return f"{message}; a batch of {rows} fits"
    positions = largest(length - 1, lambda n: fits(shape, 1, n))
    return f"{message}; a batch of 1 with prompt + gen_length = {positions} fits"


def step_message(kind: str, rows: int, width: int, error: Exception) -> str:
    """The error message for a step, or the capture of one, that runs out of memory."""
    allocation = str(error).strip().splitlines()[0]
    advice = f"a batch of {rows // 2}" if rows > 1 else "a shorter prompt or gen_length"
    return f"a {kind} step of {rows} x {width} positions: {allocation} Expected to fit: {advice}"
