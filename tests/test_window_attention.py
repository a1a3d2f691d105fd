"""window_attention: the definition against SDPA, the kernel against the definition in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention_cases import CASES, TENSORS, Case, block_lists, relative_error
from tests.op_contract import LOW


@pytest.mark.parametrize("W", [32, 64, 128])
def test_production_tiles_in_bfloat16(W: int) -> None:
    case = Case(heads=2, kv_heads=2, W=W, C=400, D=128, dtype=torch.bfloat16, num_splits=2)
    replace(case, starts=(100, 390 - W), lengths=(W, W - 9), seqlens=(400, 390)).check()


@pytest.mark.slow
@LOW
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
        assert torch.allclose(lse[b, :, :length].double(), scores.logsumexp(-1), atol=1e-5)


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
    index = TENSORS.index(where)
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
        seqlens=draw(st.none() | st.tuples(*[st.integers(0, C)] * B)),
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
