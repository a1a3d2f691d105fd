"""Calls of window_attention that its tests share, and how a call is held against the definition in
float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsb_kernels.attention import window_attention
from tests.mutations import DEVICE
from tests.op_contract import Arguments, Results, by_definition, by_kernel, exactly, ints

TENSORS = ("q", "k_window", "v_window", "k_cache", "v_cache")


@dataclass
class Case:
    """Arguments of one call."""

    heads: int = 4
    kv_heads: int = 2
    W: int = 8
    C: int = 90
    D: int = 64
    starts: tuple[int, ...] = (30,)
    lengths: tuple[int, ...] = (8,)
    seqlens: tuple[int, ...] | None = (90,)  # None: all of the cache is stored
    leftpads: tuple[int, ...] | None = None
    cache_rows: tuple[int, ...] | None = None  # cache_batch_idx
    cache_batch: int | None = None
    lists: tuple[Tensor, Tensor] | None = None
    kv_block_size: int = 64
    in_cache: bool = False
    num_splits: int | None = 1
    softmax_scale: float | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def tensors(self) -> list[Tensor | None]:
        """q, k_window, v_window, k_cache, v_cache; NaN wherever nothing may be read."""
        generator = torch.Generator().manual_seed(self.seed)
        B = len(self.starts)
        seqlens = self.seqlens or (self.C,) * B

        def rows(heads: int, n: int, B: int = B) -> Tensor:
            x = torch.randn(B, n, heads, self.D, generator=generator).to(self.dtype)
            return x.transpose(1, 2).to(DEVICE)  # (B, heads, n, D) strided as a model's

        q = rows(self.heads, self.W)
        kw, vw = (rows(self.kv_heads, self.W) for _ in range(2))
        kc, vc = (rows(self.kv_heads, self.C, self.cache_batch or B) for _ in range(2))
        unread = torch.ones(len(kc), self.C, dtype=torch.bool, device=DEVICE)
        for b in range(B):
            if self.lengths[b] == 0:
                continue
            start, end = self.starts[b], self.starts[b] + self.lengths[b]
            cache_row = b if self.cache_rows is None else self.cache_rows[b]
            leftpad = 0 if self.leftpads is None else self.leftpads[b]
            unread[cache_row, leftpad : seqlens[b]] = False
            unread[cache_row, start:end] = not self.in_cache
            unread[cache_row, :leftpad] = True
            kw[b, :, : max(leftpad - start, 0)] = vw[b, :, : max(leftpad - start, 0)] = torch.nan
        for cache in (kc, vc):
            cache.transpose(1, 2)[unread] = torch.nan
        for b, length in enumerate(self.lengths):
            for x in (q, kw, vw):
                x[b, :, length:] = torch.nan
        return [q, None, None, kc, vc] if self.in_cache else [q, kw, vw, kc, vc]

    def arguments(self, tensors: list[Tensor | None] | None = None) -> Arguments:
        num_blocks, indices = self.lists or (None, None)
        return dict(zip(TENSORS, tensors or self.tensors(), strict=True)) | {
            "window_start": ints(*self.starts),
            "window_length": ints(*self.lengths),
            "cache_seqlens": None if self.seqlens is None else ints(*self.seqlens),
            "cache_leftpad": None if self.leftpads is None else ints(*self.leftpads),
            "cache_batch_idx": None if self.cache_rows is None else ints(*self.cache_rows),
            "kv_num_blocks": num_blocks,
            "kv_indices": indices,
            "kv_block_size": self.kv_block_size,
            "softmax_scale": self.softmax_scale,
            "num_splits": self.num_splits,
            "return_lse": True,
        }

    def run(self, tensors: list[Tensor | None]) -> Results:
        return by_kernel(window_attention, self.arguments(tensors))

    def expected(self, tensors: list[Tensor | None]) -> Results:
        return exactly(window_attention, self.arguments(tensors))

    def check(self) -> None:
        compare(self.arguments())


def compare(arguments: Arguments) -> Results:
    out, lse = by_kernel(window_attention, arguments)
    expected, expected_lse = exactly(window_attention, arguments)
    assert out.dtype == arguments["q"].dtype
    assert lse.dtype == torch.float32
    assert not expected.isnan().any()
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    bound = 1e-5
    if out.dtype != torch.float32:
        plain, _ = by_definition(window_attention, arguments)
        bound = 2 * relative_error(plain, expected)
    assert relative_error(out, expected) <= bound
    assert out[expected == 0].abs().sum() == 0
    seen = expected_lse.isfinite()
    # In any precision: products of 16-bit numbers are exact in float32, which sums them up.
    assert ((lse - expected_lse)[seen].abs() <= 1e-5 * (1 + expected_lse[seen].abs())).all()
    return out, lse


def relative_error(x: Tensor, expected: Tensor) -> float:
    """Largest error in a row, as a share of the row's largest value; all-zero rows left out."""
    size = expected.abs().amax(-1)
    error = (x.double() - expected).abs().amax(-1)
    return torch.where(size > 0, error / size.clamp(min=1e-30), 0).amax().item()


def block_lists(*rows: list[int] | list[list[int]]) -> tuple[Tensor, Tensor]:
    """Lists per row (or per row and KV head), padded with an index that must not be read."""
    per_head = isinstance(rows[0][0], list) if rows[0] else False
    flat = [head for row in rows for head in row] if per_head else list(rows)
    width = max(1, *(len(x) for x in flat))
    num = ints(*(len(x) for x in flat))
    indices = ints(*(i for x in flat for i in x + [10**6] * (width - len(x)))).view(-1, width)
    if per_head:
        return num.view(len(rows), -1), indices.view(len(rows), -1, width)
    return num, indices


THREE = {"starts": (0, 40, 82), "lengths": (8, 5, 8), "seqlens": (90, 70, 90)}
CASES = {
    "start_middle_end": Case(**THREE),
    "one_row": Case(W=1, lengths=(1,), starts=(89,)),
    "one_row_one_position": Case(W=1, C=1, lengths=(1,), starts=(0,), seqlens=(1,)),
    "empty_cache": Case(seqlens=(0,), starts=(0,)),
    "empty_window": Case(lengths=(0,)),
    "nothing_at_all": Case(lengths=(0, 3), starts=(0, 0), seqlens=(0, 0)),
    "no_gqa": Case(heads=3, kv_heads=3, **THREE),
    "gqa_4": Case(heads=8, kv_heads=2, **THREE),
    "gqa_7": Case(heads=14, kv_heads=2, W=9, **THREE),
    "left_padding": Case(leftpads=(0, 33, 70), **THREE),
    "left_padding_reaches_window": Case(leftpads=(40,), starts=(40,)),
    "left_padding_in_window": Case(leftpads=(4, 43, 90), num_splits=2, **THREE),
    "whole_canvas": Case(
        heads=7, kv_heads=1, W=90, starts=(0, 0), lengths=(90, 90), seqlens=(90, 90),
        leftpads=(70, 3), num_splits=None,
    ),
    "all_stored": Case(**{**THREE, "seqlens": None}),
    "all_stored_padded": Case(**{**THREE, "seqlens": None}, leftpads=(0, 33, 70), num_splits=2),
    "ends_in_window": Case(seqlens=(33,), starts=(30,)),
    "gap": Case(seqlens=(20,), starts=(60,)),
    "window_is_everything": Case(W=20, C=20, starts=(0,), lengths=(20,), seqlens=(20,)),
    "splits": Case(num_splits=3, leftpads=(0, 33, 0), **THREE),
    "more_splits_than_blocks": Case(num_splits=9, **THREE),
    "tile_past_the_window": Case(heads=7, kv_heads=1, W=16, lengths=(2,), num_splits=2),
    "lists": Case(
        C=300, starts=(70, 0, 290), lengths=(8, 8, 8), seqlens=(300, 280, 300), num_splits=2,
        lists=block_lists([0, 4, 2], [], [1, 2, 3, 4]),
    ),
    "lists_per_head": Case(
        C=300, starts=(70, 5), lengths=(8, 3), seqlens=(300, 150),
        lists=block_lists([[0, 3], [4]], [[], [0, 1, 2, 3, 4]]),
    ),
    "lists_padded": Case(
        C=300, starts=(70,), seqlens=(280,), leftpads=(20,), lists=block_lists([4, 0, 1])
    ),
    "lists_of_small_blocks": Case(
        C=100, starts=(40,), seqlens=(97,), kv_block_size=16, lists=block_lists([6, 0, 2, 3])
    ),
    "lists_of_large_blocks": Case(
        C=300, starts=(40,), seqlens=(290,), kv_block_size=128, lists=block_lists([2, 0])
    ),
    "cache_rows": Case(cache_rows=(4, 0, 2), cache_batch=5, leftpads=(0, 33, 0), **THREE),
    "one_cache_row": Case(
        starts=(0, 40, 82), lengths=(0, 5, 0), seqlens=(90, 70, 90), num_splits=2,
        cache_rows=(0, 0, 0), cache_batch=1,
    ),
    "cache_rows_and_lists": Case(
        C=300, starts=(70, 0), lengths=(8, 8), seqlens=(300, 280), cache_rows=(2, 1),
        cache_batch=3, lists=block_lists([[0, 4], [2]], [[1], [1, 2, 3, 4]]),
    ),
    "scale": Case(softmax_scale=0.5, **THREE),
    "negative_scale": Case(softmax_scale=-0.2, num_splits=2, **THREE),
    "scale_0": Case(softmax_scale=0.0, num_splits=2, leftpads=(0, 33, 70), **THREE),
    "many_keys": Case(heads=2, kv_heads=1, C=700, starts=(300,), seqlens=(650,), num_splits=4),
    **{f"head_dim_{d}": Case(D=d, num_splits=2, **THREE) for d in (16, 80, 96, 128, 256)},
}  # fmt: skip
