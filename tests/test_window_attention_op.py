"""window_attention as an op: registration, compilation, strides, splits, bad input, and deliberate
mistakes in its kernels, each of which a test must catch."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsb_kernels import attention_kernel as module
from dsb_kernels.attention import window_attention
from tests.attention_cases import CASES, ints, relative_error
from tests.mutations import DEVICE, assert_caught, kernels

SLOW = pytest.mark.slow


def test_opcheck() -> None:
    for name in ("lists", "left_padding", "cache_rows"):
        case = CASES[name]
        arguments = (*case.tensors(), *case.metadata().values(), case.kv_block_size, 0.125, 2, True)
        op = torch.ops.dsb.window_attention
        with kernels():
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", ["start_middle_end", "cache_rows"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_compiles_without_a_graph_break(backend: str, name: str) -> None:
    case = CASES[name]
    tensors, metadata = case.tensors(), case.metadata()
    compiled = torch.compile(window_attention, fullgraph=True, backend=backend)
    out = compiled(*tensors, **metadata)
    assert relative_error(out, case.expected(tensors)[0]) <= 1e-5


def test_any_strides() -> None:
    case = CASES["splits"]
    tensors = case.tensors()
    out, lse = case.run(tensors)
    assert torch.equal(case.run([t.contiguous() for t in tensors])[0], out)
    apart = [torch.empty(*t.shape[:3], 100, device=DEVICE)[..., 3:67].copy_(t) for t in tensors]
    of_two_kinds = [*apart[:2], tensors[2], *apart[3:]]  # the window's K and V
    for strided in (apart, of_two_kinds):
        again, lse_again = case.run(strided)
        assert torch.equal(again, out) and torch.equal(lse_again, lse)


@pytest.mark.parametrize("backend", ["definition", "kernel", "splits"])
def test_output_is_contiguous_token_by_token(backend: str) -> None:
    case = CASES["gqa_7"]
    q, *rest = case.tensors()
    options = case.metadata() | {"num_splits": 2 if backend == "splits" else 1}
    with contextlib.nullcontext() if backend == "definition" else kernels():
        for x in (q, q.contiguous()):
            assert window_attention(x, *rest, **options).transpose(1, 2).is_contiguous()


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


def bad(**changes: object) -> dict[str, object]:
    case = CASES["start_middle_end"]
    names = ("q", "k_window", "v_window", "k_cache", "v_cache")
    return dict(zip(names, case.tensors(), strict=True)) | case.metadata() | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(3, 4, 8, 64, dtype=torch.float64)}, TypeError, "q has dtype float64"),
        ({"q": torch.zeros(3, 4, 8, 60)}, ValueError, "q has head dimension 60: accepted"),
        ({"q": torch.zeros(3, 5, 8, 64)}, ValueError, "q has 5 heads: accepted is a multiple of"),
        ({"q": torch.zeros(3, 4, 64, 8).mT}, ValueError, "q has stride"),
        ({"q": torch.zeros(3, 4, 91, 64)}, ValueError, "q has 91 columns: accepted is at most"),
        ({"k_window": None}, ValueError, "k_window=None: v_window is not None"),
        ({"v_window": torch.zeros(3, 2, 7, 64)}, ValueError, r"v_window has shape \(3, 2, 7, 64\)"),
        ({"k_cache": torch.zeros(3, 2, 90, 64).half()}, TypeError, "k_cache has dtype float16"),
        ({"v_cache": torch.zeros(3, 2, 80, 64)}, ValueError, "v_cache has shape"),
        ({"v_cache": torch.zeros(3, 90, 2, 64).transpose(1, 2).contiguous()}, ValueError,
         "v_cache has strides .*: accepted are k_cache's"),
        ({"window_start": torch.zeros(3)}, TypeError, "window_start has dtype float32"),
        ({"window_length": ints(1, 2)}, ValueError, r"window_length has shape \(2,\)"),
        ({"cache_seqlens": ints(1, 2, 3).to("meta")}, ValueError, "cache_seqlens is on meta"),
        ({"cache_leftpad": ints(1)}, ValueError, "cache_leftpad has shape"),
        ({"window_start": ints(*range(6))[::2]}, ValueError, r"window_start has strides \(2,\)"),
        ({"kv_num_blocks": ints(1, 1, 1), "kv_indices": ints(*range(12)).view(3, 4)[:, ::2]},
         ValueError, "kv_indices has strides"),
        ({"cache_batch_idx": ints(0, 1)}, ValueError, r"cache_batch_idx has shape \(2,\)"),
        ({"cache_batch_idx": ints(0, 1, 2).long()}, TypeError, "cache_batch_idx has dtype int64"),
        ({"k_cache": torch.zeros(4, 2, 90, 64)}, ValueError, r"k_cache has shape \(4, 2, 90, 64\)"),
        ({"cache_batch_idx": ints(0, 1, 2), "v_cache": torch.zeros(4, 2, 90, 64)}, ValueError,
         r"v_cache has shape \(4, 2, 90, 64\): accepted is \(3, 2, 90, 64\)"),
        ({"cache_batch_idx": ints(0, 1, 2), "k_cache": torch.zeros(0, 2, 90, 64),
          "v_cache": torch.zeros(0, 2, 90, 64)}, ValueError, "k_cache has 0 batch rows"),
        ({"kv_indices": ints(1, 2, 3)[:, None]}, ValueError, "kv_num_blocks=None: kv_indices"),
        ({"kv_block_size": 48}, ValueError, "kv_block_size=48: accepted is a power of 2"),
        ({"softmax_scale": math.inf}, ValueError, "softmax_scale=inf"),
        ({"num_splits": 0}, ValueError, "num_splits=0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes: dict, error: type[Exception], message: str) -> None:
    moved = {
        k: v.to(DEVICE) if isinstance(v, Tensor) and v.device.type == "cpu" else v
        for k, v in changes.items()
    }
    with pytest.raises(error, match=f"window_attention: .*{message}"):
        window_attention(**bad(**moved))


MUTATIONS = {
    # kernel or helper, case, what stands there, the mistake
    "window_start": ("visit_list", "start_middle_end", "minimum(window_start, ", "minimum(9, "),
    "window_end": ("visit_list", "start_middle_end", "after, after_end = ",
                   "after, after_end = 1 + "),
    "gap_read": ("visit_list", "gap", "window_start <= seqlen", "window_start >= 0"),
    "window_cut": ("visit_list", "ends_in_window", "maximum(window_end, seqlen)", "abs(seqlen)"),
    "padding_in_window": ("visit_list", "left_padding_in_window", "leftpad - window_start", "0"),
    "seqlens_ignored": ("load_bounds", "ends_in_window", "tl.load(seqlens_ptr + b)", "C"),
    "end_of_a_block": ("attention_kernel", "left_padding", "offset < tl.where",
                       "offset <= tl.where"),
    "second_range": ("attention_kernel", "many_keys", "(j - n_before)", "j"),
    "listed_window_start": ("attention_kernel", "lists", "start - n0)", "start - n0 + 1)"),
    "listed_window_end": ("attention_kernel", "lists", "hole >= ", "hole > "),
    "listed_padding": ("attention_kernel", "lists_padded", "leftpad - n0)", "0)"),
    "list_of_the_first_head": ("attention_kernel", "lists_per_head", "tl.minimum(kv_head, ",
                               "tl.minimum(0, "),
    "negative_scale": ("attention_kernel", "negative_scale", "scale < 0", "scale < -1e9"),
    "index_ignored": ("attention_kernel", "cache_rows", "tl.load(batch_idx_ptr + b)", "(b)"),
    "last_block_dropped": ("attention_kernel", "many_keys", "split, n_blocks)\n",
                           "split, n_blocks - 1)\n"),
    "head_dropped": ("attention_kernel", "gqa_7", "query % GROUP\n", "query % (GROUP - 1)\n"),
    "no_rescaling": ("attention_kernel", "many_keys", "acc * decay[:, None]", "acc"),
    "fresh_values": ("attention_kernel", "gqa_4", "tl.where(fresh, vw_ptr, vc_ptr)", "vc_ptr"),
    "list_part": ("attention_kernel", "lists_of_large_blocks", "j % part * BLOCK_N", "0 * BLOCK_N"),
    "split_dropped": ("combine_kernel", "splits", "weight = ", "weight = (split > 0) * "),
    "unweighted": ("combine_kernel", "splits", "(tl.float32) * weight[:, None]", "(tl.float32)"),
    "window_length": ("combine_kernel", "splits", "column < tl.load", "column + 1 < tl.load"),
    "heads_swapped": ("combine_kernel", "splits", "(query % H)", "(H - 1 - query % H)"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mistakes_are_caught(mutation: str) -> None:
    kernel, name, old, new = MUTATIONS[mutation]
    case = replace(CASES[name], in_cache=mutation in ("gap_read", "window_cut"))
    assert_caught(case.check, module, f"_{kernel}", old, new)


def test_rounded_scores_are_caught() -> None:
    """Which float32, having nothing to round, could not show."""
    check = replace(CASES["many_keys"], dtype=torch.bfloat16).check
    rounded = "tl.exp2(scores.to(k.dtype).to(tl.float32) * scale"
    assert_caught(check, module, "_online_softmax", "tl.exp2(scores * scale", rounded)
