"""rope_write_kv: the definition against transformers, the kernel against it in float64."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dsb_kernels import rope_kv as module
from dsb_kernels.rope_kv import rope_write_kv, rope_write_kv_reference
from tests.attention_cases import WINDOW_REFUSED, WindowCase, draw_window, ints_or_none
from tests.mutations import DEVICE, kernels
from tests.op_contract import (
    INF,
    NAN,
    Arguments,
    FloatContract,
    OpCase,
    Results,
    by_definition,
    exactly,
    mistakes_of,
)  # fmt: skip

TENSORS = ("q", "k", "v", "k_cache", "v_cache")


def angles(max_pos: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """cos_sin_cache of RoFormer's angles, base 10000."""
    frequency = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(max_pos, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1).to(DEVICE, dtype)


@dataclass
class Case(WindowCase):
    C: int = 50
    starts: tuple[int, ...] = (0, 20, 42)
    lengths: tuple[int, ...] = (8, 5, 8)
    offsets: tuple[int, ...] | None = None
    max_pos: int = 50
    cos_sin_dtype: torch.dtype = torch.float32
    scattered: bool = False  # columns that are no neighbours, some of them past the cache
    special: bool = False  # infinities and NaN in columns that are read

    def arguments(self) -> Arguments:
        tensors = self.window()
        if self.special:
            for x in tensors[:3]:  # of a pair, one element in head 0, both in head 1
                for column, value in enumerate((INF, -INF, NAN)):
                    x[:, 0, column, [column, -1]] = value
                x[:, 1, 0] = INF
        return dict(zip(TENSORS, tensors, strict=True)) | self.where() | {
            "cos_sin_cache": angles(self.max_pos, self.D, self.cos_sin_dtype),
            "position_offset": ints_or_none(self.offsets),
            "position": self.positions() if self.scattered else None,
        }  # fmt: skip

    def positions(self) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed)
        rows = [torch.randperm(self.C + 2, generator=draw)[: self.W] for _ in self.starts]
        return torch.stack(rows).int().to(DEVICE)

    def in_precision(self, dtype: torch.dtype, cos_sin: str = "same") -> Arguments:
        table = torch.float32 if cos_sin == "float32" else dtype
        return replace(self, dtype=dtype, cos_sin_dtype=table).arguments()

    def check(self) -> None:
        compare(self.arguments())


def compare(arguments: Arguments) -> Results:
    """As the contract does, and what is outside the window stays in the caches."""
    before = {n: x.clone() for n, x in arguments.items() if isinstance(x, Tensor)}
    actual = q, k_cache, v_cache = CASE.compare_floats(arguments)
    _, k_exact, v_exact = exactly(rope_write_kv, arguments)
    assert not q.isnan().any() or arguments["q"].isinf().any()
    assert v_cache.double().allclose(v_exact, rtol=0, atol=0, equal_nan=True)  # copied
    untouched = k_exact == before["k_cache"].double()
    assert torch.equal(k_cache[untouched], before["k_cache"][untouched])
    for name, was in before.items():  # the inputs are only read
        assert torch.equal(arguments[name].nan_to_num(), was.nan_to_num())
    return actual


CASES = {
    "start_middle_end": Case(),
    "one_row": Case(W=1, starts=(49,), lengths=(1,)),
    "empty_window": Case(lengths=(0, 3, 0)),
    "empty_batch": Case(starts=(), lengths=()),
    "no_columns": Case(W=0, lengths=(0, 0, 0)),
    "left_padding": Case(offsets=(0, 7, 42)),
    "no_gqa": Case(heads=3, kv_heads=3),
    "gqa_7": Case(heads=14, kv_heads=2, W=20, starts=(0, 20, 30), lengths=(20, 17, 20)),
    "several_tiles": Case(W=40, starts=(0, 10, 5), lengths=(40, 33, 1)),
    "past_the_cache": Case(starts=(0, 20, 46)),
    "position_past_the_table": Case(max_pos=30),
    "negative_position": Case(offsets=(5, 0, 0)),
    "scattered": Case(scattered=True, offsets=(0, 7, 42), cache_rows=(4, 0, 2), cache_batch=5),
    "scattered_tiles": Case(scattered=True, W=40, lengths=(40, 33, 0)),
    "cache_rows": Case(cache_rows=(4, 0, 2), cache_batch=5),
    "one_cache_row": Case(
        starts=(0, 20, 9), lengths=(0, 5, 0), cache_rows=(0, 0, 0), cache_batch=1
    ),
    "no_cache_row_written": Case(lengths=(0, 0, 0), cache_rows=(1, 1, 0), cache_batch=2),
    **{f"head_dim_{d}": Case(D=d) for d in (16, 80, 96, 128, 256)},
    "special": Case(special=True),
    "special_cache_rows": Case(
        special=True, cache_rows=(2, 0, 1), cache_batch=3, offsets=(0, 7, 42)
    ),
}


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
    window = draw_window(draw, max_batch=3, max_C=60, max_W=40)
    offsets = st.none() | st.tuples(*[st.integers(0, window["C"])] * len(window["starts"]))
    return Case(
        **window,
        D=draw(st.sampled_from([16, 64, 80])),
        offsets=draw(offsets),
        scattered=draw(st.booleans()),
        max_pos=draw(st.integers(1, 80)),
    )


CASE = OpCase(
    op=rope_write_kv,
    module=module,
    own_compare=compare,
    calls={name: case.arguments for name, case in CASES.items()},
    quick=("left_padding", "cache_rows"),
    any_check=cases().map(lambda case: case.check),
    examples=(15, 150),
    strided=(*TENSORS, "cos_sin_cache"),
    separate=("q",),
    low_calls={
        f"{name}_{cos_sin}_table": partial(CASES[name].in_precision, cos_sin=cos_sin)
        for name in ("left_padding", "gqa_7", "special", "special_cache_rows")
        for cos_sin in ("float32", "same")
    },
    good=Case(cache_rows=(2, 0, 1), cache_batch=3, offsets=(0, 7, 42)).arguments,
    refused=[
        ({"k": lambda t: t[:, :, :7]}, r"k has shape \(3, 2, 7, 64\)"),
        ({"cos_sin_cache": torch.zeros(50, 32)}, "cos_sin_cache has shape"),
        ({"cos_sin_cache": lambda t: t[:0]}, "cos_sin_cache has no positions"),
        ({"position": torch.zeros(3, 7, dtype=torch.int32)}, r"position has shape \(3, 7\)"),
        *WINDOW_REFUSED,
    ],
    mistakes=mistakes_of(
        ("start_middle_end", "_rope_write_kv_kernel", [("column < tl.m", "column <= tl.m")]),
        ("one_row", "_rope_write_kv_kernel", [
            ("column < tl.min", "column + 1 < tl.min"), ("+ b) + column", "+ b) + column - 1"),
        ]),
        ("left_padding", "_rope_write_kv_kernel", [("position -= ", "position += ")]),
        ("scattered_tiles", "_rope_write_kv_kernel", [("b * W + column", "b * H + column")]),
        ("cache_rows", "_rope_write_kv_kernel", [("tl.load(batch_idx_ptr + b)", "(b)")]),
        ("gqa_7", "_rotate_halves", [
            ("a * cos - b * sin", "a * cos + b * sin"), ("out_ptr + HALF", "out_ptr"),
        ]),
        ("special", "_rotate_halves", [
            ("(a * cos", "(tl.where(a == a, a, 0) * cos"),
            ("b * cos + a", "b * cos + tl.minimum(a, 1e30)"),
        ]),
        ("special_cache_rows", "_rotate_halves", [  # a column that spoils its tile
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
