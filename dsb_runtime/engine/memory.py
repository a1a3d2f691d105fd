"""Memory of the K/V cache, and errors that say what was asked for and what would fit."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class CacheLayout:
    """What a position of one batch row takes in the cache of a model (of this process's share)."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def slot_bytes(self) -> int:
        """K and V of one position in every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


def layout_of(model: PreTrainedModel) -> CacheLayout:
    embedding = model.get_input_embeddings().weight
    attn = model.model.layers[0].self_attn
    heads, weight = model.config.num_key_value_heads, getattr(attn.k_proj, "weight", None)
    if isinstance(weight, DTensor):
        heads = weight.to_local().shape[0] // attn.head_dim
    layers = model.config.num_hidden_layers
    return CacheLayout(layers, heads, attn.head_dim, embedding.dtype, embedding.device)


def allocate(layout: CacheLayout, batch: int, length: int) -> list[Tensor]:
    """One tensor (2, slots, kv_heads, head_dim) per layer, for `batch` rows of `length` positions
    and a spare one each.

    Raises:
        torch.OutOfMemoryError: naming the bytes asked for and a setting that fits.
    """
    shape = (2, batch * (length + 1), layout.kv_heads, layout.head_dim)
    storage: list[Tensor] = []
    try:
        for _ in range(layout.layers):
            storage.append(torch.zeros(shape, dtype=layout.dtype, device=layout.device))
    except RuntimeError as error:  # a CPU's allocator raises no OutOfMemoryError
        if not is_out_of_memory(error):
            raise
        storage.clear()
        raise torch.OutOfMemoryError(growth_message(layout, batch, length)) from error
    return storage


# Of allocations that are not torch's GPU allocator's, which alone raises OutOfMemoryError: a CPU's,
# CUDA's own (a graph's), cuBLAS's, Triton's (of a kernel that is loaded).
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


def is_out_of_memory(error: RuntimeError) -> bool:
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in said for words in OUT_OF_MEMORY
    )


def fits(layout: CacheLayout, batch: int, length: int) -> bool:
    """Whether a cache of that size can be allocated now, by trying."""
    size = batch * (length + 1) * layout.slot_bytes
    try:
        torch.empty(size, dtype=torch.uint8, device=layout.device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def largest(most: int, fits_with: Callable[[int], bool]) -> int:
    """The largest n <= most for which `fits_with(n)`, which holds up to some n; 0 for none."""
    return bisect.bisect_left(range(1, most + 1), True, key=lambda n: not fits_with(n))


def growth_message(layout: CacheLayout, batch: int, length: int) -> str:
    asked = batch * (length + 1) * layout.slot_bytes
    message = (
        f"K/V cache for a batch of {batch} with {length} positions each: {asked:,} bytes asked for "
        f"on {layout.device} and not there"
    )
    rows = largest(batch - 1, lambda n: fits(layout, n, length))
    if rows:
        return f"{message}; a batch of {rows} fits"
    positions = largest(length - 1, lambda n: fits(layout, 1, n))
    return f"{message}; a batch of 1 with prompt + gen_length = {positions} fits"


def step_message(kind: str, rows: int, width: int, error: Exception) -> str:
    """What to say when a step, or its capture, runs out of memory."""
    asked = str(error).strip().splitlines()[0]
    advice = f"a batch of {rows // 2}" if rows > 1 else "a shorter prompt or gen_length"
    return f"a {kind} step of {rows} x {width} positions: {asked} Expected to fit: {advice}"
