"""KVCache: the keys and values of every layer, written in place where each row's window stands.

Keys are stored after rotation. Positions hold what the last forward that covered them computed,
which is the whole of DSB Cache: a refresh writes every position, a window step writes a few.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsb_runtime.engine.memory import CacheShape


@dataclass(frozen=True)
class KVCache:
    """K and V of `batch` rows of `capacity` positions, (batch, H_kv, capacity, D) for each layer.

    Without a cache policy nothing outlives a layer: then `scratch` is set, all layers share one
    buffer, and the rows of a step take its first rows, whatever batch rows they are.
    """

    batch: int
    keys: list[Tensor]
    values: list[Tensor]
    scratch: bool

    @classmethod
    def over(
        cls, storage: Tensor, shape: CacheShape, batch: int, capacity: int, num_layers: int
    ) -> KVCache:
        """A cache in the first part of `storage` (n,), for a model of `num_layers` layers, of
        which `shape.layers` have buffers: all, or one that they share."""
        size = shape.elements(batch, capacity)
        layers = storage[:size].view(
            shape.layers, 2, batch, shape.kv_heads, capacity, shape.head_dim
        )
        repeats = num_layers // shape.layers
        keys, values = ([*layers[:, i].unbind()] * repeats for i in (0, 1))
        return cls(batch, keys, values, scratch=repeats > 1)
