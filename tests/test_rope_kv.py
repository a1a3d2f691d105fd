"""rope_write_kv: the definition against complex products, the kernel against it in float64."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsb_kernels import rope_kv as module
from dsb_kernels.rope_kv import rope_write_kv, rope_write_kv_reference, rotate
from tests.mutations import DEVICE, kernels
from tests.op_contract import (
    LOW_PRECISION,
    Arguments,
    FloatContract,
    OpCase,
    Results,
    by_definition,
    by_kernel,
    exactly,
    ints,
    mistakes_of,
)  # fmt: skip


def angles(max_pos: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """cos_sin_cache of RoFormer's angles, base 10000."""
    frequency = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(max_pos, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1).to(DEVICE, dtype)


@dataclass
class Case:
    """Arguments of one call."""

    heads: int = 4
    kv_heads: int = 2
    W: int = 8
    C: int = 50
    D: int = 64
    starts: tuple[int, ...] = (0, 20, 42)
    lengths: tuple[int, ...] = (8, 5, 8)
    offsets: tuple[int, ...] | None = None
    cache_rows: tuple[int, ...] | None = None  # cache_batch_idx
    cache_batch: int | None = None
    max_pos: int = 50
    dtype: torch.dtype = torch.float32
    cos_sin_dtype: torch.dtype = torch.float32
    seed: int = 0

    def arguments(self) -> Arguments:
        """Of one call; NaN in columns that may not be read."""
        generator = torch.Generator().manual_seed(self.seed)
        B = len(self.starts)

        def rows(heads: int, n: int, B: int = B) -> Tensor:
            x = torch.randn(B, n, heads, self.D, generator=generator).to(self.dtype)
            return x.transpose(1, 2).to(DEVICE)  # (B, heads, n, D) strided as a model's

        q, k, v = rows(self.heads, self.W), rows(self.kv_heads, self.W), rows(self.kv_heads, self.W)
        for b, length in enumerate(self.lengths):
            for x in (q, k, v):
                x[b, :, length:] = torch.nan
        caches = [rows(self.kv_heads, self.C, self.cache_batch or B) for _ in range(2)]
        return {
            "q": q, "k": k, "v": v,
            "cos_sin_cache": angles(self.max_pos, self.D, self.cos_sin_dtype),
            "k_cache": caches[0], "v_cache": caches[1],
            "window_start": ints(*self.starts),
            "window_length": ints(*self.lengths),
            "position_offset": None if self.offsets is None else ints(*self.offsets),
            "cache_batch_idx": None if self.cache_rows is None else ints(*self.cache_rows),
        }  # fmt: skip

    def in_precision(self, dtype: torch.dtype, cos_sin: str = "same") -> Arguments:
        table = torch.float32 if cos_sin == "float32" else dtype
        return replace(self, dtype=dtype, cos_sin_dtype=table).arguments()


def compare(arguments: Arguments) -> Results:
    """As the contract does, and what is outside the window stays in the caches."""
    before = {n: x.clone() for n, x in arguments.items() if isinstance(x, Tensor)}
    found = _, k_cache, v_cache = CASE.compare_floats(arguments)
    q, k_exact, v_exact = exactly(rope_write_kv, arguments)
    assert not q.isnan().any()
    assert torch.equal(v_cache.double(), v_exact)  # values are copied
    untouched = k_exact == before["k_cache"].double()
    assert torch.equal(k_cache[untouched], before["k_cache"][untouched])
    for name, was in before.items():  # the inputs are only read
        assert torch.equal(arguments[name].nan_to_num(), was.nan_to_num())
    return found


CASES = {
    "start_middle_end": Case(),
    "one_row": Case(W=1, starts=(49,), lengths=(1,)),
    "empty_window": Case(lengths=(0, 3, 0)),
    "left_padding": Case(offsets=(0, 7, 42)),
    "no_gqa": Case(heads=3, kv_heads=3),
    "gqa_7": Case(heads=14, kv_heads=2, W=20, starts=(0, 20, 30), lengths=(20, 17, 20)),
    "several_tiles": Case(W=40, starts=(0, 10, 5), lengths=(40, 33, 1)),
    "past_the_cache": Case(starts=(0, 20, 46)),
    "position_past_the_table": Case(max_pos=30),
    "negative_position": Case(offsets=(5, 0, 0)),
    "cache_rows": Case(cache_rows=(4, 0, 2), cache_batch=5),
    "one_cache_row": Case(
        starts=(0, 20, 9), lengths=(0, 5, 0), cache_rows=(0, 0, 0), cache_batch=1
    ),
    "no_cache_row_written": Case(lengths=(0, 0, 0), cache_rows=(1, 1, 0), cache_batch=2),
    **{f"head_dim_{d}": Case(D=d) for d in (16, 80, 96, 128, 256)},
}


def check_special(case: Case) -> None:
    """±inf and NaN in columns that are written: what the definition makes of them, and the columns,
    heads and cache positions beside them as without them."""
    clean, arguments = case.arguments(), case.arguments()
    special = []
    for name in "qkv":  # head 0, columns 0 to 2: one element of a pair; head 1, column 0: both
        x = arguments[name]
        for column, value in enumerate((torch.inf, -torch.inf, torch.nan)):
            x[:, 0, column, [column, -1]] = value
        x[:, 1, 0] = torch.inf
        special.append(torch.zeros(x.shape[:3], dtype=torch.bool, device=DEVICE))
        special[-1][:, 0, :3] = special[-1][:, 1, 0] = True
    for i in (1, 2):  # where the cache holds those columns
        inside, special[i] = special[i], special[i].new_zeros(clean["k_cache"].shape[:3])
        for b, start in enumerate(case.starts):
            row = case.cache_rows[b] if case.cache_rows else b
            special[i][row, :, start : start + case.W] = inside[b]
    every = zip(
        CASE.compare_floats(arguments), exactly(rope_write_kv, arguments), special,
        by_kernel(rope_write_kv, clean), strict=True,
    )  # fmt: skip
    for result, exact, at, without in every:
        for special_value in (exact.isnan(), exact.isposinf(), exact.isneginf()):
            assert special_value[at].any() and not special_value[~at].any()
        assert torch.equal(result[~at], without[~at])


SPECIAL_CASES = {
    "halves": Case(),
    "cache_rows": Case(cache_rows=(2, 0, 1), cache_batch=3, offsets=(0, 7, 42)),
}


SPECIAL_CHECKS = {name: partial(check_special, case) for name, case in SPECIAL_CASES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("name", SPECIAL_CASES)
def test_infinities_and_nan_stay_in_their_columns(name: str, dtype: torch.dtype) -> None:
    check_special(replace(SPECIAL_CASES[name], dtype=dtype))


def test_definition_multiplies_complex_numbers() -> None:
    x, table = torch.randn(10, 64, dtype=torch.float64), angles(10, 64, torch.float64).cpu()
    cos, sin = table.chunk(2, -1)
    pairs = torch.view_as_complex(x.unflatten(-1, (2, -1)).mT.contiguous())
    turned = torch.view_as_real(pairs * torch.complex(cos, sin))
    assert torch.allclose(rotate(x, cos, sin), turned.mT.flatten(-2), atol=1e-14)


def test_definition_with_cache_rows_is_a_loop_over_rows() -> None:
    case = Case(starts=(7, 3, 9, 42), lengths=(0, 5, 8, 0), cache_rows=(3, 0, 3, 3), cache_batch=4)
    arguments = case.arguments()
    rotated, k_cache, v_cache = by_definition(rope_write_kv, arguments)
    of_rows = ("q", "k", "v", "window_start", "window_length")
    for b, row in enumerate(case.cache_rows):
        one = arguments | {name: arguments[name][b : b + 1] for name in of_rows}
        one |= {name: arguments[name][row : row + 1] for name in ("k_cache", "v_cache")}
        q = rope_write_kv_reference(**one | {"cache_batch_idx": None})
        assert torch.equal(rotated[b], q[0])
    assert torch.equal(k_cache, arguments["k_cache"])
    assert torch.equal(v_cache, arguments["v_cache"])


def test_definition_matches_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    case = replace(CASES["left_padding"], lengths=(8, 8, 8))
    arguments = case.arguments()
    position = torch.tensor(case.starts)[:, None] + torch.arange(8)
    position = (position - torch.tensor(case.offsets)[:, None]).to(DEVICE)
    cos, sin = arguments["cos_sin_cache"][position].chunk(2, -1)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    q, k = llama.apply_rotary_pos_emb(arguments["q"], arguments["k"], cos, sin)
    rotated, k_cache, v_cache = by_definition(rope_write_kv, arguments)
    assert torch.allclose(rotated, q, atol=1e-6)
    for b, start in enumerate(case.starts):
        assert torch.allclose(k_cache[b, :, start : start + 8], k[b], atol=1e-6)
        assert torch.equal(v_cache[b, :, start : start + 8], arguments["v"][b])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    B, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    C = draw(st.integers(1, 60))
    W = draw(st.integers(1, min(C, 40)))
    lengths = tuple(draw(st.integers(0, W)) for _ in range(B))
    cache_rows = cache_batch = None
    if draw(st.booleans()):  # distinct where there is a window, anything elsewhere
        written = sum(n > 0 for n in lengths)
        cache_batch = draw(st.integers(max(written, 1), 5))
        free = iter(draw(st.permutations(range(cache_batch))))
        any_row = st.integers(0, cache_batch - 1)
        cache_rows = tuple(next(free) if n else draw(any_row) for n in lengths)
    return Case(
        heads=kv_heads * draw(st.sampled_from([1, 2, 7])),
        kv_heads=kv_heads,
        W=W,
        C=C,
        D=draw(st.sampled_from([16, 64, 80])),
        starts=tuple(draw(st.integers(0, C - n)) for n in lengths),
        lengths=lengths,
        offsets=draw(st.none() | st.tuples(*[st.integers(0, C)] * B)),
        cache_rows=cache_rows,
        cache_batch=cache_batch,
        max_pos=draw(st.integers(1, 80)),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=15, deadline=None)
@given(cases())
def test_any_geometry(case: Case) -> None:
    compare(case.arguments())


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(cases())
def test_any_geometry_at_length(case: Case) -> None:
    compare(case.arguments())


CASE = OpCase(
    op=rope_write_kv,
    module=module,
    own_compare=compare,
    calls={name: case.arguments for name, case in CASES.items()},
    quick=("left_padding", "cache_rows"),
    strided=("q", "k", "v", "cos_sin_cache", "k_cache", "v_cache"),
    separate=("q",),
    low_calls={
        f"{name}_{cos_sin}_table": partial(CASES[name].in_precision, cos_sin=cos_sin)
        for name in ("left_padding", "gqa_7") for cos_sin in ("float32", "same")
    },
    good=CASES["start_middle_end"].arguments,
    refused=[
        ({"q": torch.zeros(3, 4, 8, 64).double()}, "q has dtype float64"),
        ({"q": torch.zeros(3, 3, 8, 64)}, "q has 3 heads: accepted is a multiple"),
        ({"k": torch.zeros(3, 2, 7, 64)}, r"k has shape \(3, 2, 7, 64\)"),
        ({"v": torch.zeros(3, 2, 8, 128)[..., ::2]}, "v has stride 2"),
        ({"cos_sin_cache": torch.zeros(50, 32)}, "cos_sin_cache has shape"),
        ({"cos_sin_cache": torch.zeros(50, 64).half()}, "cos_sin_cache has dtype"),
        ({"k_cache": torch.zeros(3, 2, 50, 64).half()}, "k_cache has dtype float16"),
        ({"v_cache": torch.zeros(3, 2, 49, 64)}, "v_cache has shape"),
        ({"v_cache": torch.zeros(3, 2, 50, 64)}, "v_cache has strides"),
        ({"window_start": torch.zeros(3)}, "window_start has dtype float32"),
        ({"window_length": ints(1)}, "window_length has shape"),
        ({"window_start": ints(*range(6))[::2]}, r"window_start has strides \(2,\)"),
        ({"cache_batch_idx": ints(0, 1)}, r"cache_batch_idx has shape \(2,\)"),
        ({"cache_batch_idx": ints(0, 1, 2).long()}, "cache_batch_idx has dtype int64"),
        ({"k_cache": torch.zeros(4, 2, 50, 64)}, r"k_cache has shape \(4, 2, 50, 64\)"),
        ({"cache_batch_idx": ints(0, 1, 2), "v_cache": torch.zeros(4, 2, 50, 64)},
         r"v_cache has shape \(4, 2, 50, 64\): accepted is \(3, 2, 50, 64\)"),
        ({"cache_batch_idx": ints(0, 1, 2), "k_cache": torch.zeros(0, 2, 50, 64),
          "v_cache": torch.zeros(0, 2, 50, 64)}, "k_cache has 0 batch rows"),
        ({"position_offset": ints(1, 2, 3).to("meta")}, "position_offset is on meta"),
        ({"q": torch.zeros(3, 4, 51, 64), "k": torch.zeros(3, 2, 51, 64),
          "v": torch.zeros(3, 2, 51, 64)}, "q has 51 columns: accepted is at most k_cache's 50"),
    ],
    mistakes=mistakes_of(
        ("start_middle_end", "_rope_write_kv_kernel", [("column < tl.m", "column <= tl.m")]),
        ("one_row", "_rope_write_kv_kernel", [
            ("column < tl.min", "column + 1 < tl.min"), ("+ b) + column", "+ b) + column - 1"),
        ]),
        ("left_padding", "_rope_write_kv_kernel", [("position -= ", "position += ")]),
        ("cache_rows", "_rope_write_kv_kernel", [("tl.load(batch_idx_ptr + b)", "(b)")]),
        ("gqa_7", "_rotate_halves", [
            ("a * cos - b * sin", "a * cos + b * sin"), ("out_ptr + HALF", "out_ptr"),
        ]),
        (SPECIAL_CHECKS["halves"], "_rotate_halves", [
            ("(a * cos", "(tl.where(a == a, a, 0) * cos"),
            ("b * cos + a", "b * cos + tl.minimum(a, 1e30)"),
        ]),
        (SPECIAL_CHECKS["cache_rows"], "_rotate_halves", [  # a column that spoils its tile
            ("a * cos - b * sin", "a * cos - b * sin + 0 * tl.sum(a, 0)"),
        ]),
    ),
)  # fmt: skip


class TestRopeWriteKV(FloatContract):
    case = CASE


@pytest.mark.parametrize("backend", ["definition", "kernel"])
def test_output_has_the_stride_order_of_q(backend: str) -> None:
    case = CASES["gqa_7"]
    arguments = case.arguments()
    q = arguments["q"]
    B, H, W, D = q.shape
    packed = torch.zeros(B, W, H + 5, D, device=DEVICE)[:, :, :H].transpose(1, 2)
    with kernels() if backend == "kernel" else contextlib.nullcontext():
        for x in (q, packed):
            assert rope_write_kv(**arguments | {"q": x}).transpose(1, 2).is_contiguous()
        assert rope_write_kv(**arguments | {"q": q.contiguous()}).is_contiguous()
