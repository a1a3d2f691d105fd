"""The windows of drafts in a forward, whose keys and values stay apart from the K/V cache.

`engine.drafts` says what a draft is.

Shapes: b rows of a step and d drafts, W positions of each, H query heads, H_kv KV heads, D head
dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsb_kernels import attention, rope_kv
from dsb_kernels._op import unchecked
from dsb_kernels.place import Layout
from dsb_runtime.engine.cache import KVCache

rope_write_kv = unchecked(rope_kv.rope_write_kv)
window_attention = unchecked(attention.window_attention)


def beside(first: Layout, second: Layout) -> Layout:
    """The layout of a forward of the rows of both."""
    both = Layout(*(torch.cat(pair) for pair in zip(first, second, strict=True)))
    source = torch.cat([first.source_index, second.source_index + first.input_ids.numel()])
    return both._replace(source_index=source)


def no_rotation(keys: Tensor) -> Tensor:
    """The cosines and sines of an angle of 0, (1, D) float32, by which `rope_write_kv` writes keys
    (..., D) as they are."""
    element = torch.arange(keys.shape[-1], device=keys.device)
    return (element < keys.shape[-1] // 2).float()[None]


class DraftWindows:
    """The windows of d drafts in one forward, and their keys and values in every layer.

    Args:
        layout: where the drafts' windows stand, d rows of W positions.
        cache: the K/V cache. `keep` alone writes it.
    """

    def __init__(self, layout: Layout, cache: KVCache) -> None:
        self.layout, self.cache = layout, cache
        d, W = layout.input_ids.shape
        _, heads, _, D = cache.storage.shape
        self.keys = cache.storage.new_empty(len(cache.keys), d, heads, W, D)
        self.values = torch.empty_like(self.keys)
        # Window columns are written at [0, length) of a buffer, rotated by their canvas positions.
        self.first_column = torch.zeros_like(layout.start)
        self.rotary_offset = layout.leftpad - layout.start
        self.unrotated = no_rotation(cache.storage)

    def rotate(self, i: int, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor) -> Tensor:
        """Keep the K and V (d, H_kv, W, D) of layer `i`, with K rotated, and return the rotated
        queries (d, H, W, D)."""
        return rope_write_kv(
            q, k, v, cos_sin, self.keys[i], self.values[i], window_start=self.first_column,
            window_length=self.layout.length, position_offset=self.rotary_offset,
        )  # fmt: skip

    def attend(self, i: int, q: Tensor, leftpad: Tensor | None, scale: float) -> Tensor:
        """The attention of the drafts' queries in layer `i`, (d * W, H * D). They see their own
        keys in their window and the cache outside it, where the step's own windows have already
        written this layer's keys."""
        d = len(q)
        out = window_attention(
            q, self.keys[i], self.values[i], self.cache.keys[i], self.cache.values[i],
            window_start=self.layout.start, window_length=self.layout.length,
            cache_leftpad=None if leftpad is None else self.layout.leftpad,
            cache_batch_idx=self.layout.rows if d < self.cache.batch else None,
            softmax_scale=scale,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def positions(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the K and V (d, H_kv, W, D) of layer `i`, rotated already. Returns the keys and
        values (d, H_kv, L, D) that the drafts' queries see."""
        self.keys[i], self.values[i] = k, v
        rows, layout = self.layout.rows, self.layout
        keys, values = (x[i].index_select(0, rows) for x in (self.cache.keys, self.cache.values))
        rope_write_kv(
            self.keys[i], self.keys[i], self.values[i], self.unrotated, keys, values,
            window_start=layout.start, window_length=layout.length,
        )  # fmt: skip
        return keys, values

    def keep(self, accepted: Tensor) -> None:
        """Write the keys and values of the drafts that are `accepted`, (d,) bool, into the cache,
        all layers at once."""
        layers, batch, storage = len(self.keys), self.cache.batch, self.cache.storage
        # In the storage a layer has the keys of the whole batch, then its values.
        layer = torch.arange(layers, dtype=torch.int32, device=storage.device)
        index = (layer[:, None] * 2 * batch + self.layout.rows).flatten()
        start, length = self.layout.start, self.layout.length * accepted
        keys, values = self.keys.flatten(0, 1), self.values.flatten(0, 1)
        rope_write_kv(
            keys, keys, values, self.unrotated, storage[:-batch], storage[batch:],
            window_start=start.repeat(layers), window_length=length.repeat(layers),
            cache_batch_idx=index,
        )  # fmt: skip
