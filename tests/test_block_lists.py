"""Block lists: what they name, and that they are FlexAttention's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsb_kernels import attention_kernel
from dsb_kernels.attention import window_attention
from dsb_kernels.block_lists import (
    blocks_all,
    blocks_left_padding,
    blocks_near_window,
    blocks_top_k,
    blocks_visible,
    lists_of,
)
from tests.mutations import DEVICE, kernels
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


def test_visible_outside_the_window() -> None:
    visible = torch.zeros(4, 300, dtype=torch.bool, device=DEVICE)
    visible[0, [63, 64, 299]] = visible[2, 100:200] = True
    visible[1] = visible[3] = True
    start, length = ints(0, 0, 128, 64), ints(0, 300, 72, 128)
    assert named(blocks_visible(visible, start, length)) == [[0, 1, 4], [], [1], [0, 3, 4]]
    assert named(blocks_visible(visible[:, :65], start, length, 16))[0] == [3, 4]


@st.composite
def sparse_calls(draw: st.DrawFn) -> dict[str, Tensor]:
    """A window in a cache of which few positions are visible: the arguments of window_attention."""
    B, C = draw(st.integers(1, 3)), draw(st.integers(1, 200))
    W = draw(st.integers(1, min(C, 20)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def below(*high: int) -> Tensor:
        values = [torch.randint(0, n, (), generator=generator) for n in high]
        return torch.stack(values).int().to(DEVICE)

    length = below(*[W + 1] * B)
    visible = torch.rand(B, C, generator=generator) < draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    return {
        "q": torch.randn(B, 4, W, 16, generator=generator).to(DEVICE),
        "k_cache": torch.randn(B, 2, C, 16, generator=generator).to(DEVICE),
        "v_cache": torch.randn(B, 2, C, 16, generator=generator).to(DEVICE),
        "window_start": below(*(C - length + 1).tolist()), "window_length": length,
        "cache_leftpad": below(*[C] * B) if draw(st.booleans()) else None,
        "kv_visible": visible.to(DEVICE),
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(call=sparse_calls(), size=st.sampled_from([16, 32, 64]))
def test_lists_of_visible_blocks_hide_nothing(call: dict, size: int) -> None:
    num, indices = blocks_visible(
        call["kv_visible"], call["window_start"], call["window_length"], size
    )
    lists = {"kv_num_blocks": num, "kv_indices": indices, "kv_block_size": size}
    q, k, v = (call.pop(name) for name in ("q", "k_cache", "v_cache"))
    assert torch.equal(
        window_attention(q, None, None, k, v, **call, **lists),
        window_attention(q, None, None, k, v, **call),
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts in the interpreter")
def test_the_kernel_skips_blocks_without_a_visible_position(monkeypatch) -> None:
    """Of six KV blocks 1 is visible, 4 in part, and the window lies in 3. NaN stands where nothing
    is visible."""
    visible = torch.zeros(1, 384, dtype=torch.bool)
    visible[:, 64:128] = visible[:, 200:208] = visible[:, 300] = True
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 64, generator=generator) for n in (8, 384, 384))
    k, v = (x.masked_fill(~visible[0, :, None], torch.nan) for x in (k, v))
    where = {"window_start": ints(200), "window_length": ints(8), "kv_visible": visible}
    expected = window_attention(q, None, None, k, v, **where)
    num, indices = blocks_visible(visible, where["window_start"], where["window_length"])
    visited: list[int] = []
    find_block = attention_kernel._find_block

    def counted(*args, **named):
        visited.append(1)
        return find_block(*args, **named)

    monkeypatch.setattr(attention_kernel, "_find_block", counted)
    # In float32 a tile has 16 keys, and each of the two heads is a program of its own.
    for lists, tiles in (({}, 24), ({"kv_num_blocks": num, "kv_indices": indices}, 4 + 4 + 1)):
        visited.clear()
        with kernels():
            actual = window_attention(q, None, None, k, v, num_splits=1, **where, **lists)
        torch.testing.assert_close(actual, expected)
        assert len(visited) == 2 * tiles


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
    visible = torch.compile(blocks_visible, fullgraph=True, backend="aot_eager")
    shown = torch.arange(300, device=DEVICE)[None] > 200
    assert named(visible(shown, *arguments[:2])) == [[3, 4]]
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
        (lambda: blocks_visible(torch.ones(1, 9), ints(1), ints(1)), "kv_visible has dtype"),
        (lambda: blocks_visible(torch.ones(2, 9).bool(), ints(1), ints(1)), "kv_visible has shape"),
        (lambda: blocks_visible(torch.ones(1, 9).bool(), ints(1), ints(1), 0), "block_size=0"),
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
