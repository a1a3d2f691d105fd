"""Windows and their caches: what calls of rope_write_kv and window_attention have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.mutations import DEVICE
from tests.op_contract import Arguments, ints


@dataclass
class WindowCase:
    """Arguments of one call."""

    heads: int = 4
    kv_heads: int = 2
    W: int = 8
    C: int = 90
    D: int = 64
    starts: tuple[int, ...] = (30,)
    lengths: tuple[int, ...] = (8,)
    cache_rows: tuple[int, ...] | None = None  # cache_batch_idx
    cache_batch: int | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def window(self) -> list[Tensor]:
        """q, K, V and their caches; NaN in columns that may not be read."""
        generator = torch.Generator().manual_seed(self.seed)

        def rows(heads: int, n: int, B: int = len(self.starts)) -> Tensor:
            x = torch.randn(B, n, heads, self.D, generator=generator).to(self.dtype)
            return x.transpose(1, 2).to(DEVICE)  # (B, heads, n, D) strided as a model's

        columns = [rows(heads, self.W) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        for b, length in enumerate(self.lengths):
            for x in columns:
                x[b, :, length:] = torch.nan
        caches = [rows(self.kv_heads, self.C, self.cache_batch or len(self.starts)) for _ in "kv"]
        return [*columns, *caches]

    def where(self) -> Arguments:
        return {
            "window_start": ints(*self.starts),
            "window_length": ints(*self.lengths),
            "cache_batch_idx": ints_or_none(self.cache_rows),
        }


def ints_or_none(values: tuple[int, ...] | None) -> Tensor | None:
    return None if values is None else ints(*values)


def draw_window(draw: st.DrawFn, max_batch: int, max_C: int, max_W: int) -> dict[str, Any]:
    """Fields of a `WindowCase`."""
    B, C = draw(st.integers(1, max_batch)), draw(st.integers(1, max_C))
    W = draw(st.integers(1, min(C, max_W)))
    lengths = tuple(draw(st.integers(0, W)) for _ in range(B))
    cache_rows = cache_batch = None
    if draw(st.booleans()):  # distinct where there is a window, anything elsewhere
        cache_batch = draw(st.integers(max(sum(n > 0 for n in lengths), 1), 5))
        free = iter(draw(st.permutations(range(cache_batch))))
        any_row = st.integers(0, cache_batch - 1)
        cache_rows = tuple(next(free) if n else draw(any_row) for n in lengths)
    kv_heads = draw(st.integers(1, 2))
    return {
        "heads": kv_heads * draw(st.sampled_from([1, 2, 3, 7])), "kv_heads": kv_heads,
        "W": W, "C": C, "starts": tuple(draw(st.integers(0, C - n)) for n in lengths),
        "lengths": lengths, "cache_rows": cache_rows, "cache_batch": cache_batch,
        "seed": draw(st.integers(0, 2**31)),
    }  # fmt: skip


# What both ops refuse, where arguments have three rows, four heads and a strided cache.
WINDOW_REFUSED: list[tuple[Arguments, str]] = [
    ({"q": lambda t: t[..., :63]}, "q has head dimension 63: accepted"),
    ({"q": lambda t: t[:, :3]}, "q has 3 heads: accepted is a multiple of"),
    ({"q": lambda t: t.repeat(1, 1, 12, 1)}, "q has 96 columns: accepted is at most k_cache's"),
    ({"k_cache": lambda t: t[:2], "cache_batch_idx": None}, r"k_cache has shape \(2, .*\(3, "),
    ({"k_cache": lambda t: t[:2]}, r"v_cache has shape \(3, .*: accepted is \(2, "),
    ({"v_cache": lambda t: t[:, :, 1:]}, r"v_cache has shape \(3, 2, "),
    ({"v_cache": lambda t: t.contiguous()}, "v_cache has strides .*: accepted are k_cache's"),
    ({"k_cache": lambda t: t[:0], "v_cache": lambda t: t[:0]}, "k_cache has 0 batch rows"),
    ({"window_length": lambda t: t[:2]}, r"window_length has shape \(2,\)"),
    ({"cache_batch_idx": lambda t: t[:2]}, r"cache_batch_idx has shape \(2,\)"),
]
