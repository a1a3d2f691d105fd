"""Bytes that the kernels must move, and those that they do, at the models' real shapes.

The interpreter's loads and stores are counted with the production launch geometry, and what shares
nothing is run once and multiplied. One candidate of `token_confidence` stands for all; of
`lm_head_confidence` one share of the vocabulary and an eighth of the hidden size, since shares have
only the hidden states in common; of the linear ops two tiles of features, or 256 input features; of
attention one KV head. `python -m pytest -s tests/test_traffic.py -m slow` prints the tables.

Up to 32 tokens, all that the linear ops move is within 1.1 of what must move. From 64 tokens on,
the partial sums of the output projection are more than that; they are at most 8.4 MB at a time,
which stay in the L2 cache. Why attention's partial results are as large as they are is said in
docs/tuning.md.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dsb_kernels import _configs as tuning
from dsb_kernels import linear, lm_head
from dsb_kernels.attention import window_attention
from dsb_kernels.attention_kernel import choose_splits, tile_of
from dsb_kernels.commit import initial_rows, unmask_and_slide
from dsb_kernels.rope_kv import rope_write_kv
from dsb_kernels.rows import UnmaskSpec
from dsb_kernels.token_confidence import launch_of, token_confidence
from tests.mutations import DEVICE
from tests.traffic import HEADING, L2_BYTES, Moved, counted

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="counts in the interpreter")


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- scoring ----------------------------------------------------------------------------------

VOCABULARIES = {"LLaDA-8B": 126464, "iLLaDA-8B": 155136, "Dream-7B": 152064}
HIDDEN = {"LLaDA-8B": 4096, "iLLaDA-8B": 4096, "Dream-7B": 3584}


def check_scoring(moved: Moved) -> None:
    assert moved.touched <= 1.1 * moved.must
    assert moved.asked + moved.partials <= 1.1 * moved.must


def token_confidence_traffic(model: str, rows: int, monkeypatch) -> Moved:
    """One row of `rows`, in their launch configuration."""
    V = VOCABULARIES[model]
    launch = launch_of(rows, V, "sm_90", sample=False)
    config = tuning.Config(launch.blocks, launch.num_warps, launch.num_stages)
    monkeypatch.setitem(tuning.CONFIGS, ("token_confidence", "any"), {1: config})
    logits = torch.zeros(1, V, dtype=torch.float16)
    with counted() as traffic:
        token, c = token_confidence(logits, banned=(V - 128,))
    outputs = traffic.touched(token) + traffic.touched(c)
    partials = traffic.asked_elsewhere(logits, token, c)
    assert partials == 2 * 6 * 4 * launch.grid[1] - 4 * launch.grid[1]  # one plane is not read
    return Moved(
        name=f"token_confidence {model} {rows} rows",
        must=rows * (V * 2 + 8 + 4),
        touched=rows * (traffic.touched(logits) + outputs + partials),
        asked=rows * (traffic.asked(logits) + outputs),
        partials=rows * partials,
    )


def lm_head_traffic(model: str, rows: int, monkeypatch) -> Moved:
    """One program's share of the vocabulary; there are as many as its launch has."""
    V, E = VOCABULARIES[model], HIDDEN[model]
    launch = lm_head.launch_of(rows, V, torch.float16, "sm_90", sample=False)
    share, programs = launch.share, launch.grid[0]
    config = tuning.Config(launch.blocks | {"PROGRAMS": 1}, launch.num_warps)
    monkeypatch.setitem(tuning.CONFIGS, ("lm_head_confidence", "any"), {tuning.INFINITY: config})
    columns = E // 8
    weight = torch.zeros(share, columns, dtype=torch.float16)
    hidden = torch.zeros(rows, columns, dtype=torch.float16)
    with counted() as traffic:
        token, c = lm_head.lm_head_confidence(hidden, weight)
    outputs = traffic.touched(token) + traffic.touched(c)
    partials = traffic.asked_elsewhere(weight, hidden, token, c)
    assert traffic.touched(hidden) == hidden.nbytes  # once from memory, then from the L2 cache:
    assert hidden.nbytes * 8 + programs * partials < L2_BYTES / 2
    shares, slices = V / share, E // columns  # the last share may be smaller
    partials = round(shares * partials)
    small = hidden.nbytes * slices + outputs + partials
    return Moved(
        name=f"lm_head_confidence {model} {rows} rows",
        must=V * E * 2 + small - partials,
        touched=round(shares * traffic.touched(weight)) * slices + small,
        asked=round(shares * traffic.asked(weight)) * slices,
        partials=partials,
    )


# Name, output and input features, gated.
LINEARS = {
    "LLaDA-8B": [("qkv", 12288, 4096, False), ("gate_up", 12288, 4096, True)],
    "iLLaDA-8B": [("qkv", 6144, 4096, False), ("gate_up", 12288, 4096, True)],
    "Dream-7B": [("qkv", 4608, 3584, False), ("gate_up", 18944, 3584, True)],
}
ADDED = {
    "LLaDA-8B": [("out", 4096, 4096), ("down", 4096, 12288)],
    "Dream-7B": [("out", 3584, 3584), ("down", 3584, 18944)],
}
COLUMNS = 256  # input features that are run


def window_linear_traffic(model: str, rows: int, name: str, F: int, E: int, gated: bool) -> Moved:
    """Two of the tiles of features."""
    launch = linear.linear_launch(rows, F, torch.float16, "sm_90", gated=gated)
    share = 2 * launch.blocks["BLOCK_V"] / F
    assert 1 / share * 2 == launch.grid[0]  # nothing ragged: every tile is like these
    x = torch.zeros(rows, COLUMNS, dtype=torch.float16)
    weight = torch.zeros(round(F * share) * (2 if gated else 1), COLUMNS, dtype=torch.float16)
    parts = E // COLUMNS
    with counted() as traffic:
        out = linear.window_linear(x, weight, gated=gated)
    assert traffic.asked_elsewhere(x, weight, out) == 0
    assert traffic.touched(x) == x.nbytes < L2_BYTES / 2  # once from memory
    assert traffic.asked(out) == out.nbytes  # every element written, once
    return Moved(
        name=f"window_linear {model} {name} {rows} rows",
        must=round((weight.nbytes * parts + out.nbytes) / share) + x.nbytes * parts,
        touched=round((traffic.touched(weight) * parts + traffic.touched(out)) / share)
        + traffic.touched(x) * parts,
        asked=round(traffic.asked(weight) * parts / share),
        partials=0,
    )


def linear_add_norm_traffic(model: str, rows: int, name: str, E: int, F: int) -> Moved:
    """All output features, with the splits of the whole."""
    launch = linear.split_launch(rows, F, E, torch.float16, "sm_90")
    splits = launch.grid[1]
    assert splits * launch.share == F
    x, weight = (torch.zeros(n, COLUMNS, dtype=torch.float16) for n in (rows, E))
    parts = F // COLUMNS
    residual, gain = torch.zeros(rows, E, dtype=torch.float16), torch.ones(E, dtype=torch.float16)
    assert linear.split_launch(rows, COLUMNS, E, torch.float16, "sm_90").grid[1] == splits
    with counted() as traffic:
        out = linear.linear_add_norm(x, weight, residual, gain, 1e-5)
    named = (x, weight, residual, gain, out)
    partials = traffic.asked_elsewhere(*named)
    assert partials == 2 * splits * rows * E * 4
    assert traffic.asked(residual) == 2 * residual.nbytes and traffic.asked(out) == out.nbytes
    small = traffic.touched(residual) + traffic.touched(gain) + traffic.touched(out)
    return Moved(
        name=f"linear_add_norm {model} {name} {rows} rows",
        must=(weight.nbytes + x.nbytes) * parts + 3 * residual.nbytes + gain.nbytes,
        touched=(traffic.touched(weight) + traffic.touched(x)) * parts + small,
        asked=traffic.asked(weight) * parts,
        partials=partials,
    )


def linear_traffic(model: str, rows: int) -> list[Moved]:
    moved = [window_linear_traffic(model, rows, *layer) for layer in LINEARS[model]]
    return moved + [linear_add_norm_traffic(model, rows, *shape) for shape in ADDED.get(model, ())]


def check_linear(moved: Moved, rows: int) -> None:
    if rows <= 32 or not moved.partials:
        check_scoring(moved)
    else:
        assert moved.touched <= 1.1 * moved.must and moved.asked <= 1.1 * moved.must
        assert moved.partials / 2 < 10e6 < L2_BYTES / 4


def test_linear_layers_read_every_weight_once():
    for layer in LINEARS["LLaDA-8B"]:
        check_linear(window_linear_traffic("LLaDA-8B", 32, *layer), 32)
    check_linear(linear_add_norm_traffic("Dream-7B", 32, *ADDED["Dream-7B"][0]), 32)


@pytest.mark.slow
def test_linear_table():
    print(HEADING)
    for model in LINEARS:
        for rows in (16, 32, 64, 128):
            for moved in linear_traffic(model, rows):
                print(moved.line())
                check_linear(moved, rows)


@pytest.mark.parametrize("rows", [32, 1024])
def test_token_confidence_reads_logits_once(rows, monkeypatch):
    check_scoring(token_confidence_traffic("LLaDA-8B", rows, monkeypatch))


def test_ineligible_candidates_are_not_read():
    logits = torch.zeros(3, 9000, dtype=torch.float16)
    with counted() as traffic:
        token_confidence(logits, eligible=torch.tensor([True, False, False]))
    assert traffic.touched(logits) == traffic.asked(logits) == 9000 * 2


def test_lm_head_reads_every_weight_once(monkeypatch):
    check_scoring(lm_head_traffic("LLaDA-8B", 32, monkeypatch))


@pytest.mark.slow
def test_scoring_table(monkeypatch):
    print(HEADING)
    for traffic, sizes in (
        (token_confidence_traffic, (32, 64, 256, 1024)),
        (lm_head_traffic, (16, 32, 64, 128)),
    ):
        for model, rows in itertools.product(VOCABULARIES, sizes):
            moved = traffic(model, rows, monkeypatch)
            monkeypatch.undo()
            print(moved.line())
            check_scoring(moved)


# --- window_attention -----------------------------------------------------------------------------

SMS = 132  # of an H100
LLADA = ("LLaDA-8B", 1, 32)  # name, query heads of a KV head, KV heads
MODELS = [LLADA, ("iLLaDA-8B", 4, 8), ("Dream-7B", 7, 4)]
# model, window, positions
SHAPES = [(*m, W, C) for m in MODELS for C in (4096, 16384) for W in (32, 64, 128)]
SHAPES += [(*LLADA, 256, C) for C in (4096, 16384)]


def attention_traffic(
    name: str, group: int, kv_heads: int, W: int, C: int, in_cache: bool = True
) -> tuple[Moved, int, int]:
    """What all KV heads move at batch 1, the tiles of a head's queries, and the programs before
    they are split."""
    D, stored, start = 128, C - 100, C // 2 + 7
    q = torch.zeros(1, group, W, D, dtype=torch.float16)
    kc, vc = torch.zeros(2, 1, 1, C, D, dtype=torch.float16)
    kw, vw = torch.zeros(2, 1, 1, W, D, dtype=torch.float16)
    tiles = -(-group * W // tile_of(group * W, D, q.dtype, "sm_90").blocks["BLOCK_M"])
    splits = choose_splits(kv_heads * tiles, SMS, group * W)
    metadata = {
        "window_start": ints(start), "window_length": ints(W), "cache_seqlens": ints(stored)
    }  # fmt: skip
    with counted() as traffic:
        window = (None, None) if in_cache else (kw, vw)
        out = window_attention(q, *window, kc, vc, **metadata, num_splits=splits)
    named = (q, kc, vc, kw, vw, out)
    keys_and_values = 2 * stored * D * 2
    # A tile of queries asks for K/V once, whatever the splits; up to 128 queries are one tile.
    asked = sum(traffic.asked(t) for t in (kc, vc, kw, vw))
    assert asked <= 1.1 * keys_and_values * tiles
    moved = Moved(
        name=f"window_attention {name} W={W} C={C} {splits} splits",
        must=(keys_and_values + 2 * group * W * D * 2) * kv_heads,
        touched=sum(traffic.touched(t) for t in named) * kv_heads,
        asked=asked * kv_heads,
        partials=traffic.asked_elsewhere(*named, *metadata.values()) * kv_heads,
    )
    assert moved.touched <= 1.1 * moved.must
    # The partial results of a launch stay within the L2 cache until they are combined.
    assert moved.partials / 2 < L2_BYTES / 2
    return moved, tiles, kv_heads * tiles


@pytest.mark.parametrize("in_cache", [False, True], ids=["fresh", "in_cache"])
def test_attention_reads_keys_and_values_once(in_cache: bool) -> None:
    for shape in (("small", 1, 32, 32, 1024), ("small", 7, 4, 32, 1024)):
        attention_traffic(*shape, in_cache=in_cache)


def test_listed_blocks_are_all_that_is_read() -> None:
    k, v = torch.zeros(2, 1, 1, 1024, 128, dtype=torch.float16)
    q = torch.zeros(1, 4, 8, 128, dtype=torch.float16)
    lists = {"kv_num_blocks": ints(2), "kv_indices": ints(3, 9, 1, 1)[None]}
    where = {"window_start": ints(0), "window_length": ints(8), "cache_seqlens": ints(1024)}
    with counted() as traffic:
        window_attention(q, None, None, k, v, **where, **lists, num_splits=2)
    assert traffic.touched(k) == traffic.asked(k) == (2 * 64 + 8) * 128 * 2


@pytest.mark.parametrize("C", [4096, pytest.param(16384, marks=pytest.mark.slow)])
@pytest.mark.parametrize("W", [32, 64, 128])
def test_with_its_partial_results_attention_moves_a_tenth_more_at_most(W: int, C: int) -> None:
    moved, _, _ = attention_traffic(*LLADA, W, C)
    assert moved.partials > 0
    assert moved.all_to_memory <= 1.1


@pytest.mark.slow
def test_attention_table() -> None:
    print(HEADING)
    for shape in SHAPES:
        moved, _, programs = attention_traffic(*shape)
        print(moved.line())
        # More only where splits for a tenth of K and V at 4096 positions would idle the SMs.
        _, group, _, W, _ = shape
        allowed = max(1, 4096 // (10 * group * W))
        assert moved.all_to_memory <= 1.1 or programs * allowed < 0.65 * SMS


# --- rope_write_kv --------------------------------------------------------------------------------


def test_rotary_writes_move_every_byte_once() -> None:
    H, H_kv, W, C, D, length = 4, 2, 32, 256, 128, 30
    dtype = torch.float16
    q = torch.zeros(1, H, W, D, dtype=dtype)
    k, v, kc, vc = (torch.zeros(1, H_kv, n, D, dtype=dtype) for n in (W, W, C, C))
    table = torch.zeros(C, D)
    with counted() as traffic:
        out = rope_write_kv(
            q, k, v, table, kc, vc, window_start=ints(100), window_length=ints(length)
        )
    row = D * 2
    must = (H * (length + W) + 4 * H_kv * length) * row + length * D * 4
    tensors = (q, k, v, kc, vc, out)
    assert sum(traffic.touched(t) for t in (*tensors, table)) <= 1.1 * must
    # A head's table rows come from the L2 cache: every head asks for them.
    assert sum(traffic.asked(t) for t in tensors) <= 1.1 * must
    assert traffic.touched(table) == length * D * 4


# --- unmask_and_slide -----------------------------------------------------------------------------


def test_unmasking_reads_the_response_twice_at_most() -> None:
    """Once for the first mask and EOS, once, from the first mask on, for the candidates."""
    P, G, K, mask = 1000, 1024, 32, 99
    spec = UnmaskSpec(
        prompt_length=P, block_length=K, max_block_length=K, schedule="dsb", cache="dsb",
        prefix_window=24, min_prefix=0, rule="threshold", rule_value=0.9, steps=0,
        refresh_commit="select", mask_id=mask, eos_ids=(3,), stop_at_eos=True,
    )  # fmt: skip
    canvas = torch.full((1, P + G), mask)
    table, position = initial_rows(canvas, ints(0), spec)
    scored = {"token": torch.full((1, K), 5), "confidence": torch.full((1, K), 0.95)}
    with counted() as traffic:
        unmask_and_slide(
            canvas, table, position, commit=torch.zeros(1, K, dtype=torch.bool),
            candidate_confidence=torch.zeros(1, K), **scored,
            active=torch.ones(1, dtype=torch.bool), rows=None, spec=spec,
        )  # fmt: skip
    must = (G + K) * 8  # the response, and what is committed
    assert traffic.touched(canvas) <= 1.1 * must
    window = 2 * K * 8  # of the candidates, selected twice, and of the next window
    assert traffic.asked(canvas) <= 1.1 * (must + 2 * window)
