"""Block lists: what they name, and that they are FlexAttention's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsb_kernels.block_lists import (
    blocks_all,
    blocks_left_padding,
    blocks_near_window,
    blocks_top_k,
    lists_of,
)
from tests.mutations import DEVICE
from tests.op_contract import ints


def named(lists: tuple[Tensor, Tensor]) -> list:
    """The lists as Python lists, nested as they are."""
    num, indices = lists
    assert num.dtype == indices.dtype == torch.int32
    assert indices.shape[:-1] == num.shape
    if num.ndim == 2:
        return [named((n, i)) for n, i in zip(num, indices, strict=True)]
    return [i[:n].tolist() for n, i in zip(num.tolist(), indices, strict=True)]


def test_all_and_left_padding() -> None:
    assert named(blocks_all(ints(0, 1, 64, 65, 300), 300)) == [
        [], [0], [0], [0, 1], [0, 1, 2, 3, 4],
    ]  # fmt: skip
    lists = blocks_left_padding(ints(300, 300, 128, 10), ints(0, 64, 127, 63), 300)
    assert named(lists) == [[0, 1, 2, 3, 4], [1, 2, 3, 4], [1], [0]]


def test_near_window() -> None:
    start, length, seqlens = ints(0, 128, 130, 250), ints(8, 64, 8, 50), ints(300, 300, 300, 300)
    for num_after, expected in (
        (0, [[0], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3, 4]]),
        (1, [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]),
        (9, [[0, 1, 2, 3, 4]] * 4),
    ):
        assert named(blocks_near_window(start, length, seqlens, 300, num_after)) == expected
    padded = blocks_near_window(start, length, seqlens, 300, 0, cache_leftpad=ints(0, 64, 130, 1))
    assert named(padded) == [[0], [1, 2], [2], [0, 1, 2, 3, 4]]


def test_top_k_breaks_ties_downwards_and_skips_nan() -> None:
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [-inf, nan, 0.0, -inf, -1.0]], device=DEVICE)
    assert named(blocks_top_k(scores, 2)) == [[1, 2], [2, 4]]
    assert named(blocks_top_k(scores, 4)) == [[1, 2, 3, 4], [2, 4]]
    assert named(blocks_top_k(scores, 9)) == [[0, 1, 2, 3, 4], [2, 4]]
    assert named(blocks_top_k(scores, 0)) == [[], []]
    assert named(blocks_top_k(scores, 2, ints(100, 129))) == [[0, 1], [2]]
    heads = torch.stack([scores, -scores], 1)
    assert named(blocks_top_k(heads, 1)) == [[[1], [0]], [[2], [0]]]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4))
def test_layout_is_flex_attentions(visited: list[list[bool]]) -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    mask = torch.tensor(visited, device=DEVICE)
    num, indices = lists_of(mask)
    expected_num, expected = flex._dense_to_ordered(mask[:, None, None].int())
    assert torch.equal(num, expected_num[:, 0, 0])
    assert torch.equal(indices, expected[:, 0, 0])


def test_lists_compile_without_a_graph_break() -> None:
    near = torch.compile(blocks_near_window, fullgraph=True, backend="aot_eager")
    arguments = (ints(128), ints(64), ints(300), 300, 1)
    assert named(near(*arguments)) == named(blocks_near_window(*arguments))
    best = torch.compile(blocks_top_k, fullgraph=True, backend="aot_eager")
    scores = torch.tensor([[1.0, 3.0, 3.0]], device=DEVICE)
    assert named(best(scores, 1)) == [[1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: blocks_all(torch.zeros(2), 300), "cache_seqlens has dtype float32"),
        (lambda: blocks_all([1, 2], 300), "cache_seqlens is list"),
        (lambda: blocks_all(ints(1), 0), "capacity=0: accepted is at least 1"),
        (lambda: blocks_all(ints(1), 9, 0), "block_size=0: accepted is at least 1"),
        (lambda: blocks_left_padding(ints(1), ints(1, 2), 9), "cache_leftpad has shape"),
        (lambda: blocks_near_window(ints(1), ints(1), ints(9), 9, -1), "num_after=-1: accepted is"),
        (lambda: blocks_top_k(torch.zeros(3), 1), r"scores has shape \(3,\)"),
        (lambda: blocks_top_k([0.5], 1), "scores is list"),
        (lambda: blocks_top_k(torch.zeros(1, 3), -1), "k=-1: accepted is at least 0"),
        (lambda: blocks_top_k(torch.zeros(1, 3).int(), 1), "scores has dtype int32"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    error = TypeError if "dtype" in message or " is list" in message else ValueError
    with pytest.raises(error, match=f"block lists: {message}"):
        call()
