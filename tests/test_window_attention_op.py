"""window_attention as an op: contract, strides, splits and deliberate mistakes in its kernels."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dsb_kernels import attention_kernel as module
from dsb_kernels.attention import window_attention
from tests.attention_cases import CASES, TENSORS, Case, compare
from tests.mutations import DEVICE, kernels
from tests.op_contract import Arguments, FloatContract, OpCase, ints, mistakes_of


def in_precision(case: Case) -> Callable[[torch.dtype], Arguments]:
    return lambda dtype: replace(case, dtype=dtype).arguments()


FRESH = {f"{name}-fresh": case for name, case in CASES.items()}
IN_CACHE = {f"{name}-in_cache": replace(case, in_cache=True) for name, case in CASES.items()}
LOW_FRESH = ["no_gqa", "gqa_4", "gqa_7", "splits", "lists", "left_padding", "head_dim_80"]
LOW_IN_CACHE = ["no_gqa", "gqa_7", "splits", "many_keys"]
ATTENTION, COMBINE = "_attention_kernel", "_combine_kernel"

CASE = OpCase(
    op=window_attention,
    module=module,
    own_compare=compare,
    calls={name: case.arguments for name, case in (FRESH | IN_CACHE).items()},
    quick=("splits-fresh", "lists_padded-fresh", "cache_rows-fresh"),
    strided=TENSORS,
    low_calls={
        **{f"{name}-low-fresh": in_precision(FRESH[f"{name}-fresh"])
           for name in (*LOW_FRESH, "many_keys")},
        **{f"{name}-low-in_cache": in_precision(IN_CACHE[f"{name}-in_cache"])
           for name in LOW_IN_CACHE},
    },
    good=CASES["start_middle_end"].arguments,
    refused=[
        ({"q": torch.zeros(3, 4, 8, 64, dtype=torch.float64)}, "q has dtype float64"),
        ({"q": torch.zeros(3, 4, 8, 60)}, "q has head dimension 60: accepted"),
        ({"q": torch.zeros(3, 5, 8, 64)}, "q has 5 heads: accepted is a multiple of"),
        ({"q": torch.zeros(3, 4, 64, 8).mT}, "q has stride"),
        ({"q": torch.zeros(3, 4, 91, 64)}, "q has 91 columns: accepted is at most"),
        ({"k_window": None}, "k_window=None: v_window is not None"),
        ({"v_window": torch.zeros(3, 2, 7, 64)}, r"v_window has shape \(3, 2, 7, 64\)"),
        ({"k_cache": torch.zeros(3, 2, 90, 64).half()}, "k_cache has dtype float16"),
        ({"v_cache": torch.zeros(3, 2, 80, 64)}, "v_cache has shape"),
        ({"v_cache": torch.zeros(3, 90, 2, 64).transpose(1, 2).contiguous()},
         "v_cache has strides .*: accepted are k_cache's"),
        ({"window_start": torch.zeros(3)}, "window_start has dtype float32"),
        ({"window_length": ints(1, 2)}, r"window_length has shape \(2,\)"),
        ({"cache_seqlens": ints(1, 2, 3).to("meta")}, "cache_seqlens is on meta"),
        ({"cache_leftpad": ints(1)}, "cache_leftpad has shape"),
        ({"window_start": ints(*range(6))[::2]}, r"window_start has strides \(2,\)"),
        ({"kv_num_blocks": ints(1, 1, 1), "kv_indices": ints(*range(12)).view(3, 4)[:, ::2]},
         "kv_indices has strides"),
        ({"cache_batch_idx": ints(0, 1)}, r"cache_batch_idx has shape \(2,\)"),
        ({"cache_batch_idx": ints(0, 1, 2).long()}, "cache_batch_idx has dtype int64"),
        ({"k_cache": torch.zeros(4, 2, 90, 64)}, r"k_cache has shape \(4, 2, 90, 64\)"),
        ({"cache_batch_idx": ints(0, 1, 2), "v_cache": torch.zeros(4, 2, 90, 64)},
         r"v_cache has shape \(4, 2, 90, 64\): accepted is \(3, 2, 90, 64\)"),
        ({"cache_batch_idx": ints(0, 1, 2), "k_cache": torch.zeros(0, 2, 90, 64),
          "v_cache": torch.zeros(0, 2, 90, 64)}, "k_cache has 0 batch rows"),
        ({"kv_indices": ints(1, 2, 3)[:, None]}, "kv_num_blocks=None: kv_indices"),
        ({"kv_block_size": 48}, "kv_block_size=48: accepted is a power of 2"),
        ({"softmax_scale": math.inf}, "softmax_scale=inf"),
        ({"num_splits": 0}, "num_splits=0"),
    ],
    mistakes=mistakes_of(
        ("left_padding-fresh", ATTENTION, [("offset < tl.where", "offset <= tl.where")]),
        ("many_keys-fresh", ATTENTION, [
            ("(j - n_before)", "j"),
            ("split, n_blocks)\n", "split, n_blocks - 1)\n"),
            ("acc * decay[:, None]", "acc"),
        ]),
        ("lists-fresh", ATTENTION, [("start - n0)", "start - n0 + 1)"), ("hole >= ", "hole > ")]),
        ("lists_padded-fresh", ATTENTION, [("leftpad - n0)", "0)")]),
        ("lists_per_head-fresh", ATTENTION, [("tl.minimum(kv_head, ", "tl.minimum(0, ")]),
        ("negative_scale-fresh", ATTENTION, [("scale < 0", "scale < -1e9")]),
        ("cache_rows-fresh", ATTENTION, [("tl.load(batch_idx_ptr + b)", "(b)")]),
        ("gqa_7-fresh", ATTENTION, [("query % GROUP\n", "query % (GROUP - 1)\n")]),
        ("gqa_4-fresh", ATTENTION, [("tl.where(fresh, vw_ptr, vc_ptr)", "vc_ptr")]),
        ("lists_of_large_blocks-fresh", ATTENTION, [("j % part * BLOCK_N", "0 * BLOCK_N")]),
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
        ("left_padding_in_window-fresh", "_visit_list", [("leftpad - window_start", "0")]),
        ("many_keys-low-fresh", "_online_softmax", [  # which float32 could not show
            ("tl.exp2(scores * scale", "tl.exp2(scores.to(k.dtype).to(tl.float32) * scale"),
        ]),
    ),
)  # fmt: skip


class TestWindowAttention(FloatContract):
    case = CASE
    # What NaN and infinities reach is in tests/test_window_attention.py.
    test_what_is_in_one_row_stays_there = None


def test_contiguous_tensors_and_strides_of_two_kinds() -> None:
    case = CASES["splits"]
    tensors = case.tensors()
    out, lse = case.run(tensors)
    assert torch.equal(case.run([t.contiguous() for t in tensors])[0], out)
    tensors[1] = tensors[1].contiguous()  # the window's K and V differ
    again, lse_again = case.run(tensors)
    assert torch.equal(again, out) and torch.equal(lse_again, lse)


@pytest.mark.parametrize("backend", ["definition", "kernel", "splits"])
def test_output_is_contiguous_token_by_token(backend: str) -> None:
    case = CASES["gqa_7"]
    arguments = case.arguments() | {"num_splits": 2 if backend == "splits" else 1}
    arguments |= {"return_lse": False}
    with contextlib.nullcontext() if backend == "definition" else kernels():
        for q in (arguments["q"], arguments["q"].contiguous()):
            assert window_attention(**arguments | {"q": q}).transpose(1, 2).is_contiguous()


def test_empty_batch() -> None:
    q = torch.empty(0, 4, 8, 64, device=DEVICE)
    cache = torch.empty(0, 2, 16, 64, device=DEVICE)
    none = ints()
    with kernels():
        out = window_attention(
            q, None, None, cache, cache, window_start=none, window_length=none, cache_seqlens=none
        )
    assert out.shape == q.shape


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


def test_splits_depend_on_static_shapes_only() -> None:
    assert module.choose_splits(128, 132, 64) == 1
    assert module.choose_splits(32, 132, 64) == 4
    assert module.choose_splits(28, 132, 64) == 4
    assert module.choose_splits(1, 132, 8) == 28


def test_fewer_splits_where_their_results_would_be_more_than_a_tenth() -> None:
    assert module.choose_splits(1, 132, 16) == 25
    assert module.choose_splits(32, 132, 128) == 3
    assert module.choose_splits(64, 132, 256) == 2  # one split would use 64 of 132 SMs
    assert module.choose_splits(8, 132, 128) == 14
    assert module.choose_splits(28, 132, 896) == 4
