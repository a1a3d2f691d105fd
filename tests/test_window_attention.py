"""window_attention: the definition against SDPA, the kernel against the definition in float64."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dsb_kernels import attention_kernel as module
from dsb_kernels.attention import window_attention
from tests.attention_cases import WINDOW_REFUSED, WindowCase, draw_window, ints_or_none
from tests.mutations import DEVICE, kernels
from tests.op_contract import (
    INF,
    NAN,
    SLOW,
    Arguments,
    FloatContract,
    OpCase,
    Results,
    by_kernel,
    exactly,
    ints,
    mistakes_of,
    strided,
)  # fmt: skip

TENSORS = ("q", "k_window", "v_window", "k_cache", "v_cache")


@dataclass
class Case(WindowCase):
    seqlens: tuple[int, ...] | None = (90,)  # None: all of the cache is stored
    leftpads: tuple[int, ...] | None = None
    lists: tuple[Tensor, Tensor] | None = None
    kv_block_size: int = 64
    in_cache: bool = False
    hidden: float | None = None  # the share of positions that kv_visible hides
    num_splits: int | None = 1
    softmax_scale: float | None = None
    next_features: int | None = None  # of the layer that comes next

    def visible(self) -> Tensor | None:
        if self.hidden is None:
            return None
        draw = torch.Generator().manual_seed(self.seed)
        shown = torch.rand(len(self.starts), self.C, generator=draw) >= self.hidden
        return shown.to(DEVICE)

    def next_weight(self) -> Tensor | None:
        if self.next_features is None:
            return None
        return torch.full(
            (self.next_features, self.heads * self.D), NAN, dtype=self.dtype, device=DEVICE
        )

    def tensors(self) -> list[Tensor | None]:
        """q, k_window, v_window, k_cache, v_cache; NaN wherever nothing may be read."""
        q, kw, vw, kc, vc = self.window()
        seqlens = self.seqlens or (self.C,) * len(self.starts)
        unread = torch.ones(len(kc), self.C, dtype=torch.bool, device=DEVICE)
        for b, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            if length == 0:
                continue
            cache_row = b if self.cache_rows is None else self.cache_rows[b]
            leftpad = 0 if self.leftpads is None else self.leftpads[b]
            unread[cache_row, leftpad : seqlens[b]] = False
            unread[cache_row, start : start + length] = not self.in_cache
            unread[cache_row, :leftpad] = True
            kw[b, :, : max(leftpad - start, 0)] = vw[b, :, : max(leftpad - start, 0)] = NAN
            if self.hidden is not None:
                unread[cache_row] |= ~self.visible()[b]
        for cache in (kc, vc):
            cache.transpose(1, 2)[unread] = NAN
        return [q, None, None, kc, vc] if self.in_cache else [q, kw, vw, kc, vc]

    def arguments(self, tensors: list[Tensor | None] | None = None) -> Arguments:
        num_blocks, indices = self.lists or (None, None)
        tensors = self.tensors() if tensors is None else tensors
        return dict(zip(TENSORS, tensors, strict=True)) | self.where() | {
            "cache_seqlens": ints_or_none(self.seqlens),
            "cache_leftpad": ints_or_none(self.leftpads),
            "kv_num_blocks": num_blocks,
            "kv_indices": indices,
            "kv_block_size": self.kv_block_size,
            "kv_visible": self.visible(),
            "softmax_scale": self.softmax_scale,
            "num_splits": self.num_splits,
            "next_weight": self.next_weight(),
            "return_lse": True,
        }  # fmt: skip

    def in_precision(self, dtype: torch.dtype) -> Arguments:
        return replace(self, dtype=dtype).arguments()

    def run(self, tensors: list[Tensor | None]) -> Results:
        return by_kernel(window_attention, self.arguments(tensors))

    def expected(self, tensors: list[Tensor | None]) -> Results:
        return exactly(window_attention, self.arguments(tensors))

    def check(self) -> None:
        compare(self.arguments())


def compare(arguments: Arguments) -> Results:
    actual = CASE.compare_floats(arguments)
    assert not actual[0].isnan().any()  # as nothing that may not be read is
    return actual


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


def of_model(heads: int, W: int, **fields: Any) -> Arguments:
    """Tiles of the table in 16 bits."""
    return Case(
        heads=heads, W=W, C=400, D=128, dtype=torch.bfloat16, starts=(100, 390 - W),
        lengths=(W, W - 9), seqlens=(400, 390), **fields,
    ).arguments()  # fmt: skip


def one_huge_score() -> Arguments:
    """One key takes all."""
    arguments = Case(num_splits=3).arguments()
    q, kc = arguments["q"], arguments["k_cache"]
    q[:] = q.sign() * 30
    kc[0, 0, 77], kc[0, 1, 77] = q[0, 0, 0] * 1e4, q[0, 2, 0] * 1e4
    return arguments


def keys_of_minus_infinity() -> Arguments:
    """They count for nothing."""
    arguments = Case(num_splits=3).arguments()
    arguments["q"].abs_()
    arguments["k_cache"][:, :, 40:] = -INF
    return arguments


def empty_batch() -> Arguments:
    lists = (ints(), ints().view(0, 2))
    return Case(starts=(), lengths=(), seqlens=(), lists=lists).arguments()


def lse_near_0() -> Arguments:
    """The terms of a query's only score cancel. As shares of such an lse, the errors of the kernel
    are several times the definition's with this seed."""
    arguments = Case(starts=(0,), lengths=(1,), seqlens=(0,), seed=30).arguments()
    q, k = arguments["q"][:, :, 0], arguments["k_window"][:, :, 0]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    q[..., -1] = -(q * k)[..., :-1].sum(-1) / k[..., -1]
    return arguments


@st.composite
def cases(draw: st.DrawFn) -> Case:
    window = draw_window(draw, max_batch=2, max_C=150, max_W=20)
    B, C, size = len(window["starts"]), window["C"], draw(st.sampled_from([16, 32, 64]))
    blocks = st.lists(st.integers(0, (C - 1) // size), unique=True)
    per_row = st.none() | st.tuples(*[st.integers(0, C)] * B)
    in_cache = draw(st.booleans())
    return Case(
        **window,
        seqlens=draw(per_row),
        leftpads=draw(per_row),
        lists=block_lists(*(draw(blocks) for _ in range(B))) if draw(st.booleans()) else None,
        kv_block_size=size,
        in_cache=in_cache,
        hidden=draw(st.sampled_from([None, 0.1, 0.9])) if in_cache else None,
        num_splits=draw(st.integers(1, 4)),
    )


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
    "splits": Case(num_splits=3, leftpads=(0, 33, 0), next_features=12, **THREE),
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


FRESH = {f"{name}-fresh": case for name, case in CASES.items()}
IN_CACHE = {f"{name}-in_cache": replace(case, in_cache=True) for name, case in CASES.items()}
IN_CACHE |= {
    "hidden": Case(in_cache=True, hidden=0.5, leftpads=(0, 33, 70), num_splits=2, **THREE),
    "all_hidden": Case(in_cache=True, hidden=1.0, num_splits=2, **THREE),
    "hidden_and_lists": Case(
        C=300, starts=(70, 0), lengths=(8, 8), seqlens=(300, 280), cache_rows=(2, 1),
        cache_batch=3, lists=block_lists([0, 4], [1, 2]), in_cache=True, hidden=0.3,
    ),
}  # fmt: skip
LOW_FRESH = ["no_gqa", "gqa_4", "gqa_7", "splits", "lists", "left_padding", "head_dim_80"]
LOW_IN_CACHE = ["no_gqa", "gqa_7", "splits", "many_keys"]
ATTENTION, COMBINE = "_attention_kernel", "_combine_kernel"

CASE = OpCase(
    op=window_attention,
    module=module,
    own_compare=compare,
    logarithms=(1,),  # the lse
    rounds_once=False,
    calls={name: case.arguments for name, case in (FRESH | IN_CACHE).items()}
    | {f"model_2_{W}": partial(of_model, 2, W, num_splits=2) for W in (32, 64, 128)}
    | {f.__name__: f for f in (one_huge_score, keys_of_minus_infinity, empty_batch, lse_near_0)},
    quick=("splits-fresh", "lists_padded-fresh", "cache_rows-fresh"),
    any_check=cases().map(lambda case: case.check),
    examples=(15, 100),
    strided=TENSORS,
    low_calls={
        **{f"{name}-low-fresh": FRESH[f"{name}-fresh"].in_precision
           for name in (*LOW_FRESH, "many_keys")},
        **{f"{name}-low-in_cache": IN_CACHE[f"{name}-in_cache"].in_precision
           for name in LOW_IN_CACHE},
    },
    good=Case(
        **THREE, leftpads=(0, 33, 0), cache_rows=(2, 0, 1), cache_batch=3,
        lists=block_lists([0, 1], [], [1]), next_features=3,
    ).arguments,
    refused=[
        ({"k_window": None}, "k_window=None: v_window is not None"),
        ({"v_window": lambda t: t[:, :, :7]}, r"v_window has shape \(3, 2, 7, 64\)"),
        ({"kv_num_blocks": None}, "kv_num_blocks=None: kv_indices"),
        ({"kv_num_blocks": [1, 1, 1]}, "kv_num_blocks is list"),
        ({"kv_indices": [[0]]}, "kv_indices is list"),
        ({"kv_block_size": 48}, "kv_block_size=48: accepted is a power of 2"),
        ({"softmax_scale": INF}, "softmax_scale=inf"),
        ({"num_splits": 0}, "num_splits=0"),
        ({"kv_visible": torch.ones(3, 90, dtype=torch.bool)}, "k_window with kv_visible"),
        ({"kv_visible": torch.ones(3, 89, dtype=torch.bool)}, r"kv_visible has shape \(3, 89\)"),
        ({"k_window": strided(2, 2**26 + 1)}, "k_window has stride 67108865 in dimension 2"),
        ({"v_window": strided(2, 2**26 + 1)}, "v_window has stride 67108865 in dimension 2"),
        (dict.fromkeys(("k_cache", "v_cache"), strided(2, 2**26 + 1)),
         "k_cache has stride 67108865 in dimension 2: accepted is at most 67108864"),
        ({"next_weight": lambda t: t[:, 1:]}, r"next_weight has shape \(3, 255\): .* \(F, 256\)"),
        *WINDOW_REFUSED,
    ],
    mistakes=mistakes_of(
        ("left_padding-fresh", "_find_block", [("offset < tl.where", "offset <= tl.where")]),
        ("many_keys-fresh", "_find_block", [("(j - n_before)", "j")]),
        ("many_keys-fresh", ATTENTION, [
            ("split, n_blocks)\n", "split, n_blocks - 1)\n"),
            ("acc * decay[:, None]", "acc"),
        ]),
        ("lists-fresh", "_find_block", [
            ("start - n0)", "start - n0 + 1)"), ("hole >= ", "hole > "),
        ]),
        ("lists_padded-fresh", "_find_block", [("leftpad - n0)", "0)")]),
        ("lists_per_head-fresh", ATTENTION, [("tl.minimum(kv_head, ", "tl.minimum(0, ")]),
        ("negative_scale-fresh", "_load_queries", [("scale < 0", "scale < -1e9")]),
        ("cache_rows-fresh", ATTENTION, [("tl.load(batch_idx_ptr + b)", "(b)")]),
        ("gqa_7-fresh", ATTENTION, [("query % GROUP\n", "query % (GROUP - 1)\n")]),
        ("gqa_4-fresh", ATTENTION, [("tl.where(fresh, vw_ptr, vc_ptr)", "vc_ptr")]),
        ("lists_of_large_blocks-fresh", "_find_block", [("j % part * BLOCK_N", "0 * BLOCK_N")]),
        ("splits-fresh", COMBINE, [
            ("weight = ", "weight = (split > 0) * "),
            ("(tl.float32) * weight[:, None]", "(tl.float32)"),
            ("column < tl.load", "column + 1 < tl.load"),
            ("(query % H)", "(H - 1 - query % H)"),
        ]),
        ("ends_in_window-fresh", "_load_bounds", [("tl.load(seqlens_ptr + b)", "C")]),
        ("start_middle_end-fresh", "_visit_list", [
            ("minimum(window_start, ", "minimum(9, "),
            ("after, after_end = ", "after, after_end = 1 + "),
        ]),
        ("gap-in_cache", "_visit_list", [("window_start <= seqlen", "window_start >= 0")]),
        ("ends_in_window-in_cache", "_visit_list", [
            ("maximum(window_end, seqlen)", "abs(seqlen)"),
        ]),
        ("hidden", ATTENTION, [("visible_ptr + b * C + n0", "visible_ptr + n0")]),
        ("left_padding_in_window-fresh", "_visit_list", [("leftpad - window_start", "0")]),
        ("many_keys-low-fresh", "_online_softmax", [  # which float32 could not show
            ("tl.exp2(scores * scale", "tl.exp2(scores.to(k.dtype).to(tl.float32) * scale"),
        ]),
    ),
)  # fmt: skip


class TestWindowAttention(FloatContract):
    case = CASE
    # A key reaches every query of its row, and a query has many columns.
    test_what_is_in_one_row_stays_there = None


@SLOW
@pytest.mark.parametrize(("heads", "W"), [(8, 32), (14, 64)])
def test_model_shapes_with_default_splits(heads: int, W: int) -> None:
    compare(of_model(heads, W, num_splits=None))


@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
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


def test_strides_of_two_kinds() -> None:
    case = CASES["splits"]
    tensors = case.tensors()
    out = case.run(tensors)[0]
    tensors[1] = tensors[1].contiguous()  # the window's K and V differ
    assert torch.equal(case.run(tensors)[0], out)


@pytest.mark.parametrize("backend", ["definition", "kernel", "splits"])
def test_output_is_contiguous_token_by_token(backend: str) -> None:
    case = CASES["gqa_7"]
    arguments = case.arguments() | {"num_splits": 2 if backend == "splits" else 1}
    arguments |= {"return_lse": False}
    with contextlib.nullcontext() if backend == "definition" else kernels():
        for q in (arguments["q"], arguments["q"].contiguous()):
            assert window_attention(**arguments | {"q": q}).transpose(1, 2).is_contiguous()


def test_partial_results_may_be_more_than_an_int32_counts() -> None:
    """As 32 heads of 128 with 8192 rows in 128 splits; only one row of them is in the window."""
    splits, W, D = 65, 1 << 17, 256
    assert (splits - 1) * W * D == 1 << 31
    partial = torch.empty(splits, W, D, dtype=torch.float16, device=DEVICE)  # hardly touched
    partial[:, 0] = torch.arange(splits, device=DEVICE)[:, None]
    lse, out = torch.zeros(splits, W, device=DEVICE), partial.new_empty(W, D)
    module._combine_kernel[(1, 1)](
        partial, lse, out, None, ints(1), 1, W,
        HEAD_DIM=D, NUM_SPLITS=splits, BLOCK_M=8, BLOCK_D=D,
    )  # fmt: skip
    assert (out[0] == (splits - 1) / 2).all()


@pytest.mark.parametrize(
    ("programs", "splits"),
    [(128, 1), (32, 4), (28, 4), (1, 28), (8, 14), (64, 2)],  # 64 programs would use 64 of 132 SMs
)
def test_splits_depend_on_static_shapes_only(programs: int, splits: int) -> None:
    assert module.choose_splits(programs, 132) == splits
