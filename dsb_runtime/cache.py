"""WindowCache: one preallocated K/V buffer per layer, written in place at each row's window.

Keys are stored after rotation. Positions hold what the last forward that covered them computed,
which is the whole of DSB Cache: a refresh writes every position, a window step writes a few.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class WindowLayer(CacheLayerMixin):
    """K/V of one layer: (B, H_kv, L + 1, D); slot L takes what lies past a row's window."""

    is_compileable = False
    is_sliding = False

    def __init__(self, target: WriteTarget) -> None:
        super().__init__()
        self.target = target

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        target = self.target
        shape = (target.batch, key_states.shape[1], target.capacity + 1, key_states.shape[3])
        self.keys = key_states.new_zeros(shape)
        self.values = value_states.new_zeros(shape)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (b, H_kv, W, D) states at the target's rows and positions; return those rows'
        whole K/V (b, H_kv, L, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, buffer: Tensor, states: Tensor) -> Tensor:
        target = self.target
        length = target.capacity
        if target.positions is None:  # a refresh: every position
            if target.rows is None:
                buffer[:, :, :length].copy_(states)
            else:
                buffer[target.rows, :, :length] = states
            return states
        if target.rows is None:
            if target.batch == 1:  # the same write, without an index for every element
                buffer.index_copy_(2, target.positions[0], states)
                return buffer[:, :, :length]
            index = target.positions[:, None, :, None].expand_as(states)
            buffer.scatter_(2, index, states)
            return buffer[:, :, :length]
        buffer[target.rows[:, None], :, target.positions] = states.transpose(1, 2)
        return buffer[target.rows, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.target.capacity, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.target.capacity

    def get_max_cache_shape(self) -> int:
        return self.target.capacity


class WriteTarget:
    """Where the coming forward's K/V go.

    `rows`: (b,) batch rows, None for all. `positions`: (b, W) canvas indices (L for a row past its
    window), None for every position. `start`, `length`: (b,) int32, the same as intervals.
    `leftpad`: (B,) int32, positions before each row's prompt.
    """

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.capacity = batch, length
        self.rows: Tensor | None = None
        self.positions: Tensor | None = None
        self.start: Tensor | None = None
        self.length: Tensor | None = None
        self.leftpad: Tensor | None = None


class WindowCache(Cache):
    """A transformers Cache for window forwards over a canvas of fixed length."""

    def __init__(
        self, num_layers: int, batch: int, length: int, leftpad: Tensor | None = None
    ) -> None:
        self.target = WriteTarget(batch, length)
        self.target.leftpad = leftpad
        super().__init__(layers=[WindowLayer(self.target) for _ in range(num_layers)])

    def point(
        self, rows: Tensor | None, start: Tensor, length: Tensor, width: int | None = None
    ) -> None:
        """Say where the coming forward writes: [start, start + length) of each row, (b,) each;
        `width` is the forward's number of rows, None for every position."""
        target = self.target
        target.rows, target.start, target.length = rows, start.int(), length.int()
        target.positions = None
        if width is not None:
            offset = torch.arange(width, device=start.device)
            index = start[:, None].long() + offset
            target.positions = torch.where(offset < length[:, None], index, target.capacity)
