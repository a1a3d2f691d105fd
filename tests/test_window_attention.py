"""window_attention: the definition against SDPA, the kernel against the definition in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsb_kernels.attention import window_attention, window_attention_definition
from tests.mutations import DEVICE, kernels

SLOW = pytest.mark.slow


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@dataclass
class Case:
    """Arguments of one call; `run` calls the op, `expected` the definition in float64."""

    heads: int = 4
    kv_heads: int = 2
    W: int = 8
    C: int = 90
    D: int = 64
    starts: tuple[int, ...] = (30,)
    lengths: tuple[int, ...] = (8,)
    seqlens: tuple[int, ...] = (90,)
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

        def rows(heads: int, n: int, B: int = B) -> Tensor:
            x = torch.randn(B, n, heads, self.D, generator=generator).to(self.dtype)
            return x.transpose(1, 2).to(DEVICE)  # (B, heads, n, D) strided as a model's

        q, kw, vw = (
            rows(self.heads, self.W),
            rows(self.kv_heads, self.W),
            rows(self.kv_heads, self.W),
        )
        kc, vc = (rows(self.kv_heads, self.C, self.cache_batch or B) for _ in range(2))
        unread = torch.ones(len(kc), self.C, dtype=torch.bool, device=DEVICE)
        for b in range(B):
            if self.lengths[b] == 0:
                continue
            start, end = self.starts[b], self.starts[b] + self.lengths[b]
            cache_row = b if self.cache_rows is None else self.cache_rows[b]
            leftpad = 0 if self.leftpads is None else self.leftpads[b]
            unread[cache_row, leftpad : self.seqlens[b]] = False
            unread[cache_row, start:end] = not self.in_cache
            unread[cache_row, :leftpad] = True
            kw[b, :, : max(leftpad - start, 0)] = vw[b, :, : max(leftpad - start, 0)] = torch.nan
        for cache in (kc, vc):
            cache.transpose(1, 2)[unread] = torch.nan
        for b, length in enumerate(self.lengths):
            for x in (q, kw, vw):
                x[b, :, length:] = torch.nan
        return [q, None, None, kc, vc] if self.in_cache else [q, kw, vw, kc, vc]

    def metadata(self) -> dict[str, Tensor | None]:
        num_blocks, indices = self.lists or (None, None)
        return {
            "window_start": ints(*self.starts),
            "window_length": ints(*self.lengths),
            "cache_seqlens": ints(*self.seqlens),
            "cache_leftpad": None if self.leftpads is None else ints(*self.leftpads),
            "cache_batch_idx": None if self.cache_rows is None else ints(*self.cache_rows),
            "kv_num_blocks": num_blocks,
            "kv_indices": indices,
        }

    def run(self, tensors: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        with kernels():
            return window_attention(
                *tensors,
                **self.metadata(),
                kv_block_size=self.kv_block_size,
                softmax_scale=self.softmax_scale,
                num_splits=self.num_splits,
                return_lse=True,
            )

    def expected(self, tensors: list[Tensor | None], double: bool = True) -> tuple[Tensor, Tensor]:
        if double:
            tensors = [None if t is None else t.double() for t in tensors]
        scale = 1 / math.sqrt(self.D) if self.softmax_scale is None else self.softmax_scale
        metadata = self.metadata().values()
        return window_attention_definition(*tensors, *metadata, self.kv_block_size, scale)

    def check(self) -> None:
        tensors = self.tensors()
        out, lse = self.run(tensors)
        expected, expected_lse = self.expected(tensors)
        assert out.dtype == self.dtype
        assert lse.dtype == torch.float32
        assert not expected.isnan().any()
        assert torch.equal(lse.isinf(), expected_lse.isinf())
        bound = 1e-5
        if self.dtype != torch.float32:
            plain, _ = self.expected(tensors, double=False)
            bound = 2 * relative_error(plain, expected)
        assert relative_error(out, expected) <= bound
        assert out[expected == 0].abs().sum() == 0
        seen = expected_lse.isfinite()
        # In any precision: products of 16-bit numbers are exact in float32, which sums them up.
        assert ((lse - expected_lse)[seen].abs() <= 1e-5 * (1 + expected_lse[seen].abs())).all()


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


@pytest.mark.parametrize("in_cache", [False, True], ids=["fresh", "in_cache"])
@pytest.mark.parametrize("name", CASES)
def test_kernel_matches_definition(name: str, in_cache: bool) -> None:
    replace(CASES[name], in_cache=in_cache).check()


LOW = [torch.float16, torch.bfloat16]
LOW_FRESH = ["no_gqa", "gqa_4", "gqa_7", "splits", "lists", "left_padding", "head_dim_80"]
LOW_IN_CACHE = ["no_gqa", "gqa_7", "splits", "many_keys"]
LOW_CASES = [(name, False) for name in LOW_FRESH] + [(name, True) for name in LOW_IN_CACHE]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("name", "in_cache"), LOW_CASES)
def test_low_precision_error_is_at_most_twice_the_plain_one(
    name: str, in_cache: bool, dtype: torch.dtype
) -> None:
    replace(CASES[name], dtype=dtype, in_cache=in_cache).check()


@pytest.mark.parametrize("W", [32, 64, 128])
def test_production_tiles_in_bfloat16(W: int) -> None:
    case = Case(heads=2, kv_heads=2, W=W, C=400, D=128, dtype=torch.bfloat16, num_splits=2)
    replace(case, starts=(100, 390 - W), lengths=(W, W - 9), seqlens=(400, 390)).check()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("W", [32, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (14, 2)])
def test_model_shapes_with_default_splits(
    heads: int, kv_heads: int, W: int, dtype: torch.dtype
) -> None:
    case = Case(heads=heads, kv_heads=kv_heads, W=W, C=600, D=128, num_splits=None, dtype=dtype)
    replace(case, starts=(512, 64), lengths=(W, 24), seqlens=(590, 600)).check()


@pytest.mark.parametrize("in_cache", [False, True], ids=["fresh", "in_cache"])
def test_definition_is_sdpa_over_what_is_visible(in_cache: bool) -> None:
    case = replace(CASES["left_padding"], in_cache=in_cache)
    q, kw, vw, kc, vc = tensors = case.tensors()
    out, lse = case.expected(tensors)
    for b, (start, length) in enumerate(zip(case.starts, case.lengths, strict=True)):
        before = slice(case.leftpads[b], start)
        after = slice(start + length, case.seqlens[b])
        if in_cache:
            kw, vw = (x[:, :, start : start + length] for x in (kc, vc))
        k = torch.cat([kc[b, :, before], kw[b, :, :length], kc[b, :, after]], 1).double()
        v = torch.cat([vc[b, :, before], vw[b, :, :length], vc[b, :, after]], 1).double()
        rows = q[b, :, :length].double()
        plain = torch.nn.functional.scaled_dot_product_attention(rows, k, v, enable_gqa=True)
        assert torch.allclose(out[b, :, :length], plain, atol=1e-12)
        scores = rows @ k.repeat_interleave(2, 0).transpose(1, 2) / math.sqrt(case.D)
        assert torch.allclose(lse[b, :, :length], scores.logsumexp(-1), atol=1e-12)


def test_all_lists_equal_no_lists_whatever_their_order() -> None:
    case = replace(CASES["many_keys"], num_splits=1, dtype=torch.float16)
    tensors = case.tensors()
    plain = case.expected(tensors)[0]
    lists = block_lists([3, 10, 0, 1, 2, 9, 8, 7, 6, 5, 4])
    assert torch.equal(replace(case, lists=lists).expected(tensors)[0], plain)
    out = replace(case, lists=lists).run(tensors)[0]
    assert torch.allclose(out.double(), case.run(tensors)[0].double(), atol=2e-3)


# --- values ---------------------------------------------------------------------------------------


def test_one_huge_score_takes_all() -> None:
    case = Case(lengths=(8,), starts=(30,), num_splits=3)
    tensors = case.tensors()
    q, _, _, kc, vc = tensors
    q[:] = q.sign() * 30
    kc[0, 0, 77], kc[0, 1, 77] = q[0, 0, 0] * 1e4, q[0, 2, 0] * 1e4
    out, lse = case.run(tensors)
    assert torch.equal(out[0, 0, 0], vc[0, 0, 77])
    assert torch.equal(out[0, 2, 0], vc[0, 1, 77])
    assert lse[0, 0, 0] == pytest.approx(case.expected(tensors)[1][0, 0, 0].item(), rel=1e-6)


def test_equal_scores_average_the_values() -> None:
    case = Case(C=129, seqlens=(129,), num_splits=2)
    tensors = case.tensors()
    tensors[0][:] = 0
    out, lse = case.run(tensors)
    expected = case.expected(tensors)
    assert relative_error(out, expected[0]) <= 1e-5
    assert torch.allclose(lse, torch.full_like(lse, math.log(129)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("where", ["q", "k_window", "k_cache", "v_cache"])
def test_non_finite_input_reaches_the_same_outputs(where: str, value: float) -> None:
    case = Case(num_splits=2)
    tensors = case.tensors()
    index = ["q", "k_window", "v_window", "k_cache", "v_cache"].index(where)
    tensors[index][0, 1, 5 if index < 3 else 60, 7] = value
    out, lse = case.run(tensors)
    expected, expected_lse = case.expected(tensors)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert torch.allclose(out[finite].double(), expected[finite], rtol=1e-5, atol=1e-5)
    assert torch.equal(lse.isfinite(), expected_lse.isfinite())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_keys_of_minus_infinity_count_for_nothing() -> None:
    case = Case(num_splits=3)
    tensors = case.tensors()
    tensors[0].abs_()
    tensors[3][:, :, 40:] = -math.inf
    out, _ = case.run(tensors)
    shorter = case.expected([tensors[0], *tensors[1:3], *(t[:, :, :40] for t in tensors[3:])])[0]
    assert relative_error(out, shorter) <= 1e-5


# --- properties -----------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> Case:
    B, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    C = draw(st.integers(1, 150))
    W = draw(st.integers(1, min(C, 20)))
    lengths = tuple(draw(st.integers(0, W)) for _ in range(B))
    starts = tuple(draw(st.integers(0, C - n)) for n in lengths)
    size = draw(st.sampled_from([16, 32, 64]))
    cache_rows = cache_batch = lists = None
    if draw(st.booleans()):  # distinct where there is a window, anything elsewhere
        cache_batch = draw(st.integers(max(sum(n > 0 for n in lengths), 1), 4))
        free = iter(draw(st.permutations(range(cache_batch))))
        any_row = st.integers(0, cache_batch - 1)
        cache_rows = tuple(next(free) if n else draw(any_row) for n in lengths)
    if draw(st.booleans()):
        blocks = st.lists(st.integers(0, (C - 1) // size), unique=True)
        lists = block_lists(*(draw(blocks) for _ in range(B)))
    return Case(
        heads=kv_heads * draw(st.sampled_from([1, 2, 3, 7])),
        kv_heads=kv_heads,
        W=W,
        C=C,
        starts=starts,
        lengths=lengths,
        seqlens=tuple(draw(st.integers(0, C)) for _ in range(B)),
        leftpads=draw(st.none() | st.tuples(*[st.integers(0, C)] * B)),
        cache_rows=cache_rows,
        cache_batch=cache_batch,
        lists=lists,
        kv_block_size=size,
        in_cache=draw(st.booleans()),
        num_splits=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=15, deadline=None)
@given(cases())
def test_any_geometry(case: Case) -> None:
    case.check()


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(cases())
def test_any_geometry_at_length(case: Case) -> None:
    case.check()
