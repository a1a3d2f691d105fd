"""rope_write_kv: the definition against complex products, the kernel against it in float64."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsb_kernels import rope_kv as module
from dsb_kernels.rope_kv import rope_write_kv, rope_write_kv_reference, rotate
from tests.mutations import DEVICE, assert_caught, kernels

SLOW = pytest.mark.slow


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def angles(max_pos: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """cos_sin_cache of RoFormer's angles, base 10000."""
    frequency = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(max_pos, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1).to(DEVICE, dtype)


@dataclass
class Case:
    """Arguments of one call; `check` compares the kernel with the definition in float64."""

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

    def tensors(self) -> list[Tensor]:
        """q, k, v, cos_sin_cache, k_cache, v_cache; NaN in rows that may not be read."""
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
        return [q, k, v, angles(self.max_pos, self.D, self.cos_sin_dtype), *caches]

    def metadata(self) -> dict[str, Tensor | None]:
        return {
            "window_start": ints(*self.starts),
            "window_length": ints(*self.lengths),
            "position_offset": None if self.offsets is None else ints(*self.offsets),
            "cache_batch_idx": None if self.cache_rows is None else ints(*self.cache_rows),
        }

    def expected(self, tensors: list[Tensor], double: bool) -> tuple[Tensor, Tensor, Tensor]:
        tensors = [t.double() if double else t.clone() for t in tensors]
        q = rope_write_kv_reference(*tensors, **self.metadata())
        return q, tensors[4], tensors[5]

    def check(self) -> None:
        tensors = self.tensors()
        before = [t.clone() for t in tensors]
        expected = self.expected(tensors, double=True)
        plain = self.expected(tensors, double=False)
        with kernels():
            q = rope_write_kv(*tensors, **self.metadata())
        assert q.dtype == self.dtype
        for result, exact, low in zip((q, *tensors[4:]), expected, plain, strict=True):
            assert not exact.isnan().any()
            bound = 1e-5 * exact.abs().amax()
            if self.dtype != torch.float32:
                bound = 2 * (low.double() - exact).abs().amax()
            assert (result.double() - exact).abs().amax() <= bound
        # Values are copied, what is outside the window stays, and the inputs are only read.
        assert torch.equal(tensors[5].double(), expected[2])
        untouched = expected[1] == before[4].double()
        assert torch.equal(tensors[4][untouched], before[4][untouched])
        for after, was in zip(tensors[:4], before[:4], strict=True):
            assert torch.equal(after.nan_to_num(), was.nan_to_num())


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


@pytest.mark.parametrize("name", CASES)
def test_kernel_matches_definition(name: str) -> None:
    CASES[name].check()


LOW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("cos_sin", ["float32", "same"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["left_padding", "gqa_7"])
def test_low_precision_error_is_at_most_twice_the_plain_one(
    name: str, dtype: torch.dtype, cos_sin: str
) -> None:
    table = torch.float32 if cos_sin == "float32" else dtype
    replace(CASES[name], dtype=dtype, cos_sin_dtype=table).check()


def check_special(case: Case) -> None:
    """±inf and NaN in rows that are written: what the definition makes of them, and the rows, heads
    and cache positions beside them as without them."""
    clean, tensors = case.tensors(), case.tensors()
    special = []
    for x in tensors[:3]:  # head 0, rows 0 to 2: one element of a pair; head 1, row 0: both
        for row, value in enumerate((torch.inf, -torch.inf, torch.nan)):
            x[:, 0, row, [row, -1]] = value
        x[:, 1, 0] = torch.inf
        special.append(torch.zeros(x.shape[:3], dtype=torch.bool, device=DEVICE))
        special[-1][:, 0, :3] = special[-1][:, 1, 0] = True
    for i in (1, 2):  # where the cache holds those rows
        inside, special[i] = special[i], torch.zeros(clean[4].shape[:3], dtype=torch.bool)
        for b, start in enumerate(case.starts):
            row = case.cache_rows[b] if case.cache_rows else b
            special[i][row, :, start : start + case.W] = inside[b]
        special[i] = special[i].to(DEVICE)
    expected = case.expected(tensors, double=True)
    plain = case.expected(tensors, double=False)
    with kernels():
        without = rope_write_kv(*clean, **case.metadata())
        q = rope_write_kv(*tensors, **case.metadata())
    results, beside = (q, *tensors[4:]), (without, *clean[4:])
    for result, exact, low, at, other in zip(
        results, expected, plain, special, beside, strict=True
    ):
        for special_value in (exact.isnan(), exact.isposinf(), exact.isneginf()):
            assert special_value[at].any() and not special_value[~at].any()
        finite = exact.isfinite()
        bound = 1e-5 * exact[finite].abs().amax().item()
        if case.dtype != torch.float32:
            bound = 2 * (low.double() - exact)[finite].abs().amax().item()
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=bound, equal_nan=True)
        assert torch.equal(result[~at], other[~at])


SPECIAL_CASES = {
    "halves": Case(),
    "cache_rows": Case(cache_rows=(2, 0, 1), cache_batch=3, offsets=(0, 7, 42)),
}


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("name", SPECIAL_CASES)
def test_infinities_and_nan_stay_in_their_rows(name: str, dtype: torch.dtype) -> None:
    check_special(replace(SPECIAL_CASES[name], dtype=dtype))


def test_definition_multiplies_complex_numbers() -> None:
    x, table = torch.randn(10, 64, dtype=torch.float64), angles(10, 64, torch.float64).cpu()
    cos, sin = table.chunk(2, -1)
    pairs = torch.view_as_complex(x.unflatten(-1, (2, -1)).mT.contiguous())
    turned = torch.view_as_real(pairs * torch.complex(cos, sin))
    assert torch.allclose(rotate(x, cos, sin), turned.mT.flatten(-2), atol=1e-14)


def test_definition_with_cache_rows_is_a_loop_over_rows() -> None:
    case = Case(starts=(7, 3, 9, 42), lengths=(0, 5, 8, 0), cache_rows=(3, 0, 3, 3), cache_batch=4)
    tensors = case.tensors()
    rotated, k_cache, v_cache = case.expected(tensors, double=False)
    for b, row in enumerate(case.cache_rows):
        one = replace(case, starts=case.starts[b : b + 1], lengths=case.lengths[b : b + 1])
        one.cache_rows = one.cache_batch = None
        q, k, v, table, *caches = tensors
        alone = [x[b : b + 1] for x in (q, k, v)] + [table] + [x[row : row + 1] for x in caches]
        expected, k_row, v_row = one.expected(alone, double=False)
        assert torch.equal(rotated[b], expected[0])
        tensors[4][row], tensors[5][row] = k_row[0], v_row[0]
    assert torch.equal(k_cache, tensors[4])
    assert torch.equal(v_cache, tensors[5])


def test_definition_matches_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    case = replace(CASES["left_padding"], lengths=(8, 8, 8))
    tensors = case.tensors()
    position = torch.tensor(case.starts)[:, None] + torch.arange(8)
    position = (position - torch.tensor(case.offsets)[:, None]).to(DEVICE)
    cos, sin = tensors[3][position].chunk(2, -1)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    q, k = llama.apply_rotary_pos_emb(tensors[0], tensors[1], cos, sin)
    rotated, k_cache, v_cache = case.expected(tensors, double=False)
    assert torch.allclose(rotated, q, atol=1e-6)
    for b, start in enumerate(case.starts):
        assert torch.allclose(k_cache[b, :, start : start + 8], k[b], atol=1e-6)
        assert torch.equal(v_cache[b, :, start : start + 8], tensors[2][b])


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
    case.check()


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(cases())
def test_any_geometry_at_length(case: Case) -> None:
    case.check()


MUTATIONS = {
    # kernel, case, what stands there, the mistake
    "column_past_the_end": (
        "rope_write_kv_kernel", "start_middle_end", "column < tl.m", "column <= tl.m"
    ),
    "last_column_dropped": (
        "rope_write_kv_kernel", "one_row", "column < tl.min", "column + 1 < tl.min"
    ),
    "padding_added": ("rope_write_kv_kernel", "left_padding", "position -= ", "position += "),
    "window_shifted": ("rope_write_kv_kernel", "one_row", "+ b) + column", "+ b) + column - 1"),
    "index_ignored": ("rope_write_kv_kernel", "cache_rows", "tl.load(batch_idx_ptr + b)", "(b)"),
    "sine_negated": ("rotate_halves", "gqa_7", "a * cos - b * sin", "a * cos + b * sin"),
    "half_dropped": ("rotate_halves", "gqa_7", "out_ptr + HALF", "out_ptr"),
}  # fmt: skip
SPECIAL_MUTATIONS = {
    "nan_becomes_zero": ("rotate_halves", "halves", "(a * cos",
                         "(tl.where(a == a, a, 0) * cos"),
    "infinity_clamped": ("rotate_halves", "halves", "b * cos + a",
                         "b * cos + tl.minimum(a, 1e30)"),
    "row_spoils_its_tile": ("rotate_halves", "cache_rows", "a * cos - b * sin",
                            "a * cos - b * sin + 0 * tl.sum(a, 0)"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mistakes_are_caught(mutation: str) -> None:
    kernel, name, old, new = MUTATIONS[mutation]
    assert_caught(CASES[name].check, module, f"_{kernel}", old, new)


@pytest.mark.parametrize("mutation", SPECIAL_MUTATIONS)
def test_mistakes_with_infinities_and_nan_are_caught(mutation: str) -> None:
    kernel, name, old, new = SPECIAL_MUTATIONS[mutation]
    case = SPECIAL_CASES[name]
    assert_caught(functools.partial(check_special, case), module, f"_{kernel}", old, new)


def test_opcheck() -> None:
    op = torch.ops.dsb.rope_write_kv
    for case in (CASES["left_padding"], CASES["cache_rows"]):
        arguments = (*case.tensors(), *case.metadata().values())
        with kernels():
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", ["left_padding", "cache_rows"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_compiles_without_a_graph_break(backend: str, name: str) -> None:
    case = CASES[name]
    tensors, metadata = case.tensors(), case.metadata()
    expected = case.expected(tensors, double=False)
    q = torch.compile(rope_write_kv, fullgraph=True, backend=backend)(*tensors, **metadata)
    for result, exact in zip((q, *tensors[4:]), expected, strict=True):
        assert torch.allclose(result, exact, atol=1e-6)


def test_any_strides() -> None:
    case = CASES["left_padding"]
    tensors = case.tensors()
    apart = [torch.empty(*t.shape[:-1], 100, device=DEVICE)[..., 3:67].copy_(t) for t in tensors]
    with kernels():
        q = rope_write_kv(*tensors, **case.metadata())
        again = rope_write_kv(*apart, **case.metadata())
    for result, expected in zip((again, *apart[4:]), (q, *tensors[4:]), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("backend", ["definition", "kernel"])
def test_output_has_the_stride_order_of_q(backend: str) -> None:
    case = CASES["gqa_7"]
    q, *rest = case.tensors()
    B, H, W, D = q.shape
    packed = torch.zeros(B, W, H + 5, D, device=DEVICE)[:, :, :H].transpose(1, 2)
    with kernels() if backend == "kernel" else contextlib.nullcontext():
        for x in (q, packed):
            assert rope_write_kv(x, *rest, **case.metadata()).transpose(1, 2).is_contiguous()
        assert rope_write_kv(q.contiguous(), *rest, **case.metadata()).is_contiguous()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(3, 4, 8, 64).double()}, TypeError, "q has dtype float64"),
        ({"q": torch.zeros(3, 3, 8, 64)}, ValueError, "q has 3 heads: accepted is a multiple"),
        ({"k": torch.zeros(3, 2, 7, 64)}, ValueError, r"k has shape \(3, 2, 7, 64\)"),
        ({"v": torch.zeros(3, 2, 8, 128)[..., ::2]}, ValueError, "v has stride 2"),
        ({"cos_sin_cache": torch.zeros(50, 32)}, ValueError, "cos_sin_cache has shape"),
        ({"cos_sin_cache": torch.zeros(50, 64).half()}, TypeError, "cos_sin_cache has dtype"),
        ({"k_cache": torch.zeros(3, 2, 50, 64).half()}, TypeError, "k_cache has dtype float16"),
        ({"v_cache": torch.zeros(3, 2, 49, 64)}, ValueError, "v_cache has shape"),
        ({"v_cache": torch.zeros(3, 2, 50, 64)}, ValueError, "v_cache has strides"),
        ({"window_start": torch.zeros(3)}, TypeError, "window_start has dtype float32"),
        ({"window_length": ints(1)}, ValueError, "window_length has shape"),
        ({"window_start": ints(*range(6))[::2]}, ValueError, r"window_start has strides \(2,\)"),
        ({"cache_batch_idx": ints(0, 1)}, ValueError, r"cache_batch_idx has shape \(2,\)"),
        ({"cache_batch_idx": ints(0, 1, 2).long()}, TypeError, "cache_batch_idx has dtype int64"),
        ({"k_cache": torch.zeros(4, 2, 50, 64)}, ValueError, r"k_cache has shape \(4, 2, 50, 64\)"),
        ({"cache_batch_idx": ints(0, 1, 2), "v_cache": torch.zeros(4, 2, 50, 64)}, ValueError,
         r"v_cache has shape \(4, 2, 50, 64\): accepted is \(3, 2, 50, 64\)"),
        ({"cache_batch_idx": ints(0, 1, 2), "k_cache": torch.zeros(0, 2, 50, 64),
          "v_cache": torch.zeros(0, 2, 50, 64)}, ValueError, "k_cache has 0 batch rows"),
        ({"position_offset": ints(1, 2, 3).to("meta")}, ValueError, "position_offset is on meta"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes: dict, error: type[Exception], message: str) -> None:
    names = ("q", "k", "v", "cos_sin_cache", "k_cache", "v_cache")
    arguments = dict(zip(names, CASES["start_middle_end"].tensors(), strict=True))
    arguments |= CASES["start_middle_end"].metadata()
    for name, value in changes.items():
        arguments[name] = value if value.device.type == "meta" else value.to(DEVICE)
    with pytest.raises(error, match=f"rope_write_kv: {message}"):
        rope_write_kv(**arguments)


def test_window_larger_than_the_cache_is_refused() -> None:
    x = torch.zeros(1, 2, 8, 64, device=DEVICE)
    cache = torch.zeros(1, 2, 7, 64, device=DEVICE)
    with pytest.raises(ValueError, match="q has 8 columns: accepted is at most k_cache's 7"):
        rope_write_kv(
            x, x, x, angles(9, 64), cache, cache, window_start=ints(0), window_length=ints(1)
        )
