"""WindowCache: one preallocated K/V buffer per layer, written in place at each row's window.

Keys are stored after rotation. Positions hold what the last forward that covered them computed,
which is the whole of DSB Cache: a refresh writes every position, a window step writes a few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dsb_runtime.engine.attention import CanvasOffset


@dataclass(frozen=True)
class Place:
    """Where the rows of a forward lie in the canvas: b sequences of W rows each.

    Row j of sequence i stands at canvas position `start[i] + j` of batch row `rows[i]`; rows at or
    past `length[i]` stand nowhere: they are computed and thrown away.
    """

    rows: Tensor | None  # (b,) int32 batch rows, None for all of them in order
    start: Tensor  # (b,) int32
    length: Tensor  # (b,) int32, 0 to W
    seqlens: Tensor  # (b,) int32, the canvas length: all of it is stored
    width: int  # W
    canvas_length: int  # L
    leftpad: Tensor | None  # (b,) int32 positions before each prompt, None where there are none
    full: bool  # a refresh: W = L, every start 0

    def index(self) -> Tensor:
        """(b, W) int64 canvas positions, those of rows past a length clamped to the canvas."""
        offset = torch.arange(self.width, device=self.start.device)
        return (self.start[:, None].long() + offset).clamp_(max=self.canvas_length - 1)

    def mask(self) -> Tensor:
        """(b, 1, 1, L) bool, True at positions that are no padding."""
        index = torch.arange(self.canvas_length, device=self.start.device)
        return (index >= self.leftpad[:, None])[:, None, None]

    def slots(self, spare: int) -> Tensor:
        """(b, W) int64 cache slots to write, `spare` for rows past a length."""
        offset = torch.arange(self.width, device=self.start.device)
        index = self.start[:, None].long() + offset
        return torch.where(offset < self.length[:, None], index, spare)


class WriteTarget:
    """What the layers of a cache share: its size, and the place that the coming forward writes."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        self.place: Place | None = None
        self.slots: Tensor | None = None  # (b, W), made by the first layer that writes there


class WindowLayer(CacheLayerMixin):
    """K/V of one layer: (B, H_kv, C + 1, D); slot C takes what lies past a row's window."""

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
        """Write (b, H_kv, W, D) states at the target's place; return those rows' whole K/V,
        (b, H_kv, L, D)."""
        if self.target.place is None:
            raise ValueError("WindowCache: expected a call of point(...) before a forward")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, buffer: Tensor, states: Tensor) -> Tensor:
        target = self.target
        if target.slots is None:
            target.slots = target.place.slots(target.capacity)
        place, slots = target.place, target.slots
        if target.batch == 1:
            buffer.index_copy_(2, slots[0], states)
        else:
            rows = place.rows
            if rows is None:
                rows = torch.arange(states.shape[0], device=states.device)
            buffer[rows[:, None].long(), :, slots] = states.transpose(1, 2)
        return states if place.full else self.stored(buffer)

    def stored(self, buffer: Tensor) -> Tensor:
        """What the buffer holds for the place's rows: (b, H_kv, L, D), a view where it can be."""
        place = self.target.place
        stored = buffer[:, :, : place.canvas_length]
        if place.rows is not None:
            return stored.index_select(0, place.rows)
        return stored[: place.start.shape[0]]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        place = self.target.place
        return self.target.capacity if place is None else place.canvas_length, 0

    def get_seq_length(self) -> int:
        """Where a model's forward takes its queries to begin if it got no `position_ids`.

        Raises:
            ValueError: a window forward, whose queries begin elsewhere.
        """
        place = self.target.place
        if place is not None and not place.full:
            raise ValueError("position_ids=None: expected the positions of a window's rows")
        return 0

    def get_max_length(self) -> int:
        return self.target.capacity

    def get_max_cache_shape(self) -> int:
        return self.target.capacity


class WindowCache(Cache):
    """A transformers Cache for window forwards over canvases of up to `capacity` positions.

    Args:
        num_layers: the model's.
        batch: batch rows, B.
        capacity: canvas positions, C.
    """

    def __init__(self, num_layers: int, batch: int, capacity: int) -> None:
        self.target = WriteTarget(batch, capacity)
        super().__init__(layers=[WindowLayer(self.target) for _ in range(num_layers)])

    @classmethod
    def over(cls, storage: list[Tensor], batch: int, capacity: int) -> WindowCache:
        """A cache that lives in memory held by another: per layer (2, slots, H_kv, D) with at
        least B * (C + 1) slots."""
        cache = cls(len(storage), batch, capacity)
        for layer, held in zip(cache.layers, storage, strict=True):
            _, _, heads, dim = held.shape
            slots = held[:, : batch * (capacity + 1)]
            layer.keys, layer.values = slots.view(2, batch, heads, capacity + 1, dim)
            layer.is_initialized = True
        return cache

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return CanvasOffset(0)

    def put(self, place: Place) -> None:
        """Say where the coming forward's K/V go."""
        self.target.place, self.target.slots = place, None

    def point(
        self, rows: Tensor | None, start: Tensor, length: Tensor, width: int | None = None
    ) -> None:
        """Say where the coming forward writes: [start, start + length) of each row, (b,) each;
        `width` is the forward's number of rows, None for every position of the cache."""
        full, capacity = width is None, self.target.capacity
        width = capacity if full else width
        start, length = start.int(), length.int()
        seqlens = torch.full_like(start, capacity)
        self.put(Place(rows, start, length, seqlens, width, capacity, None, full))
