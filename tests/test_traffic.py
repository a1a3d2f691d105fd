"""Bytes that the kernels must move, and those that they do, at the models' real shapes.

The interpreter's loads and stores are counted with the production launch geometry, and what shares
nothing is run once and multiplied. One candidate of `token_confidence` stands for all; of
`lm_head_confidence` one share of the vocabulary and an eighth of the hidden size, since shares have
only the hidden states in common; of the linear ops two tiles of features, or 256 input features; of
attention one KV head. `python -m pytest -s tests/test_traffic.py -m slow` prints a table.

Up to 32 tokens, all that the linear ops move is within 1.1 of what must move. From 64 tokens on,
the partial sums of the output projection are more than that; they are at most 8.4 MB at a time,
which stay in the L2 cache. Why attention's partial results are as large as they are is said in
docs/tuning.md.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsb_kernels import _configs as tuning
from dsb_kernels import linear, lm_head
from dsb_kernels.attention import window_attention
from dsb_kernels.attention_kernel import choose_splits, tile_of
from dsb_kernels.commit import initial_rows, unmask_and_slide
from dsb_kernels.rope_kv import rope_write_kv
from dsb_kernels.token_confidence import launch_of, token_confidence
from tests.mutations import DEVICE
from tests.traffic import L2_BYTES, Moved, counted
from tools.compile_report.cases.commit import LLADA as SPEC

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="counts in the interpreter")
HALF = torch.float16
zeros = torch.zeros


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def table(quick: set[tuple], *axes: Iterable[Any]) -> list:
    """Every combination; all but those that are named are slow tests."""
    slow = pytest.mark.slow
    return [pytest.param(*x, marks=() if x in quick else slow) for x in itertools.product(*axes)]


def check(moved: Moved) -> None:
    print(moved.line())
    assert moved.touched <= 1.1 * moved.must
    assert moved.asked + moved.partials <= 1.1 * moved.must


# --- scoring ----------------------------------------------------------------------------------

VOCABULARIES = {"LLaDA-8B": 126464, "iLLaDA-8B": 155136, "Dream-7B": 152064}
HIDDEN = {"LLaDA-8B": 4096, "iLLaDA-8B": 4096, "Dream-7B": 3584}


@pytest.mark.parametrize(
    ("model", "candidates"),
    table({("LLaDA-8B", 32), ("LLaDA-8B", 1024)}, VOCABULARIES, (32, 64, 256, 1024)),
)
def test_token_confidence_reads_logits_once(model, candidates, monkeypatch):
    """One candidate, in the launch configuration of all."""
    V = VOCABULARIES[model]
    launch = launch_of(candidates, V, "sm_90", sample=False)
    config = tuning.Config(launch.blocks, launch.num_warps, launch.num_stages)
    monkeypatch.setitem(tuning.CONFIGS, ("token_confidence", "any"), {1: config})
    logits = zeros(1, V, dtype=HALF)
    with counted() as traffic:
        token, c = token_confidence(logits, banned=(V - 128,))
    outputs = traffic.touched(token, c)
    partials = traffic.asked_elsewhere(logits, token, c)
    assert partials == 2 * 6 * 4 * launch.grid[1] - 4 * launch.grid[1]  # one plane is not read
    moved = Moved(
        name=f"token_confidence {model} {candidates} candidates",
        must=candidates * (V * 2 + 8 + 4),
        touched=candidates * (traffic.touched(logits) + outputs + partials),
        asked=candidates * (traffic.asked(logits) + outputs),
        partials=candidates * partials,
    )
    check(moved)


def test_ineligible_candidates_are_not_read():
    logits = zeros(3, 9000, dtype=HALF)
    with counted() as traffic:
        token_confidence(logits, eligible=torch.tensor([True, False, False]))
    assert traffic.touched(logits) == traffic.asked(logits) == 9000 * 2


@pytest.mark.parametrize(
    ("model", "candidates"), table({("LLaDA-8B", 32)}, VOCABULARIES, (16, 32, 64, 128))
)
def test_lm_head_reads_every_weight_once(model, candidates, monkeypatch):
    """One program's share of the vocabulary; there are as many as its launch has."""
    V, E = VOCABULARIES[model], HIDDEN[model]
    launch = lm_head.launch_of(candidates, V, HALF, "sm_90", sample=False)
    config = tuning.Config(launch.blocks | {"PROGRAMS": 1}, launch.num_warps)
    monkeypatch.setitem(tuning.CONFIGS, ("lm_head_confidence", "any"), {tuning.INFINITY: config})
    columns = E // 8
    weight, hidden = (zeros(n, columns, dtype=HALF) for n in (launch.share, candidates))
    with counted() as traffic:
        token, c = lm_head.lm_head_confidence(hidden, weight)
    partials = traffic.asked_elsewhere(weight, hidden, token, c)
    assert traffic.touched(hidden) == hidden.nbytes  # once from memory, then from the L2 cache:
    assert hidden.nbytes * 8 + launch.grid[0] * partials < L2_BYTES / 2
    shares, slices = V / launch.share, E // columns  # the last share may be smaller
    partials = round(shares * partials)
    small = hidden.nbytes * slices + traffic.touched(token, c) + partials
    moved = Moved(
        name=f"lm_head_confidence {model} {candidates} candidates",
        must=V * E * 2 + small - partials,
        touched=round(shares * traffic.touched(weight)) * slices + small,
        asked=round(shares * traffic.asked(weight)) * slices,
        partials=partials,
    )
    check(moved)


# --- linear ops -------------------------------------------------------------------------------

LINEARS = [  # model, name, output and input features, gated
    ("LLaDA-8B", "qkv", 12288, 4096, False), ("LLaDA-8B", "gate_up", 12288, 4096, True),
    ("iLLaDA-8B", "qkv", 6144, 4096, False), ("iLLaDA-8B", "gate_up", 12288, 4096, True),
    ("Dream-7B", "qkv", 4608, 3584, False), ("Dream-7B", "gate_up", 18944, 3584, True),
]  # fmt: skip
ADDED = [
    ("LLaDA-8B", "out", 4096, 4096), ("LLaDA-8B", "down", 4096, 12288),
    ("Dream-7B", "out", 3584, 3584), ("Dream-7B", "down", 3584, 18944),
]  # fmt: skip
COLUMNS = 256  # input features that are run
TOKENS = (16, 32, 64, 128)


@pytest.mark.parametrize(
    ("layer", "tokens"), table({(x, 32) for x in LINEARS[:2]}, LINEARS, TOKENS)
)
def test_window_linear_reads_every_weight_once(layer, tokens):
    """Two of the tiles of features."""
    model, name, F, E, gated = layer
    launch = linear.linear_launch(tokens, F, HALF, "sm_90", gated=gated)
    share = 2 * launch.blocks["BLOCK_V"] / F
    assert 1 / share * 2 == launch.grid[0]  # nothing ragged: every tile is like these
    x, weight = (zeros(n, COLUMNS, dtype=HALF) for n in (tokens, round(F * share) * (1 + gated)))
    parts = E // COLUMNS
    with counted() as traffic:
        out = linear.window_linear(x, weight, gated=gated)
    assert traffic.asked_elsewhere(x, weight, out) == 0
    assert traffic.touched(x) == x.nbytes < L2_BYTES / 2  # once from memory
    assert traffic.asked(out) == out.nbytes  # every element written, once
    touched = traffic.touched(weight) * parts + traffic.touched(out)
    moved = Moved(
        name=f"window_linear {model} {name} {tokens} tokens",
        must=round((weight.nbytes * parts + out.nbytes) / share) + x.nbytes * parts,
        touched=round(touched / share) + x.nbytes * parts,
        asked=round(traffic.asked(weight) * parts / share),
    )
    check(moved)


@pytest.mark.parametrize(("layer", "tokens"), table({(ADDED[2], 32)}, ADDED, TOKENS))
def test_linear_add_norm_reads_every_weight_once(layer, tokens):
    """All output features, with the splits of the whole."""
    model, name, F, E = layer
    launch = linear.split_launch(tokens, E, F, HALF, "sm_90")
    splits = launch.grid[1]
    assert splits * launch.share == E
    x, weight = (zeros(n, COLUMNS, dtype=HALF) for n in (tokens, F))
    parts = E // COLUMNS
    residual, gain = zeros(tokens, F, dtype=HALF), torch.ones(F, dtype=HALF)
    assert linear.split_launch(tokens, COLUMNS, F, HALF, "sm_90").grid[1] == splits
    with counted() as traffic:
        out = linear.linear_add_norm(x, weight, residual, gain, 1e-5)
    partials = traffic.asked_elsewhere(x, weight, residual, gain, out)
    assert partials == 2 * splits * tokens * F * 4
    assert traffic.asked(residual) == 2 * residual.nbytes and traffic.asked(out) == out.nbytes
    moved = Moved(
        name=f"linear_add_norm {model} {name} {tokens} tokens",
        must=(weight.nbytes + x.nbytes) * parts + 3 * residual.nbytes + gain.nbytes,
        touched=traffic.touched(weight, x) * parts + traffic.touched(residual, gain, out),
        asked=traffic.asked(weight) * parts,
        partials=partials,
    )
    if tokens > 32:  # the partial sums stay in the L2 cache
        assert moved.partials / 2 < 10e6 < L2_BYTES / 4
        moved.partials = 0
    check(moved)


# --- window_attention -----------------------------------------------------------------------------

SMS = 132  # of an H100
LLADA = ("LLaDA-8B", 1, 32)  # name, query heads of a KV head, KV heads
MODELS = [LLADA, ("iLLaDA-8B", 4, 8), ("Dream-7B", 7, 4)]
CAPACITIES = (4096, 16384)
QUICK = {(LLADA, W, 4096) for W in (32, 64, 128)}


def attention_traffic(
    name: str, group: int, kv_heads: int, W: int, C: int, in_cache: bool = True
) -> tuple[Moved, int]:
    """What all KV heads move at batch 1, and the programs before they are split."""
    D, stored, start = 128, C - 100, C // 2 + 7
    q = zeros(1, group, W, D, dtype=HALF)
    kc, vc = zeros(2, 1, 1, C, D, dtype=HALF)
    kw, vw = zeros(2, 1, 1, W, D, dtype=HALF)
    tiles = -(-group * W // tile_of(group * W, D, q.dtype, "sm_90").blocks["BLOCK_M"])
    splits = choose_splits(kv_heads * tiles, SMS, group * W)
    where = {"window_start": ints(start), "window_length": ints(W), "cache_seqlens": ints(stored)}
    with counted() as traffic:
        window = (None, None) if in_cache else (kw, vw)
        out = window_attention(q, *window, kc, vc, **where, num_splits=splits)
    named = (q, kc, vc, kw, vw, out)
    keys_and_values = 2 * stored * D * 2
    # A tile of queries asks for K/V once, whatever the splits; up to 128 queries are one tile.
    asked = traffic.asked(kc, vc, kw, vw)
    assert asked <= 1.1 * keys_and_values * tiles
    moved = Moved(
        name=f"window_attention {name} W={W} C={C} {splits} splits",
        must=(keys_and_values + 2 * group * W * D * 2) * kv_heads,
        touched=traffic.touched(*named) * kv_heads,
        asked=asked * kv_heads,
        partials=traffic.asked_elsewhere(*named, *where.values()) * kv_heads,
    )
    print(moved.line())
    assert moved.touched <= 1.1 * moved.must
    # The partial results of a launch stay within the L2 cache until they are combined.
    assert moved.partials / 2 < L2_BYTES / 2
    return moved, kv_heads * tiles


@pytest.mark.parametrize("in_cache", [False, True], ids=["fresh", "in_cache"])
def test_attention_reads_keys_and_values_once(in_cache):
    for shape in (("small", 1, 32, 32, 1024), ("small", 7, 4, 32, 1024)):
        attention_traffic(*shape, in_cache=in_cache)


def test_listed_blocks_are_all_that_is_read():
    k, v = zeros(2, 1, 1, 1024, 128, dtype=HALF)
    q = zeros(1, 4, 8, 128, dtype=HALF)
    lists = {"kv_num_blocks": ints(2), "kv_indices": ints(3, 9, 1, 1)[None]}
    where = {"window_start": ints(0), "window_length": ints(8), "cache_seqlens": ints(1024)}
    with counted() as traffic:
        window_attention(q, None, None, k, v, **where, **lists, num_splits=2)
    assert traffic.touched(k) == traffic.asked(k) == (2 * 64 + 8) * 128 * 2


@pytest.mark.parametrize(
    ("model", "W", "C"),
    table(QUICK, MODELS, (32, 64, 128), CAPACITIES) + table(set(), [LLADA], [256], CAPACITIES),
)
def test_with_its_partial_results_attention_moves_a_tenth_more_at_most(model, W, C):
    """More only where splits for a tenth of K and V at 4096 positions would idle the SMs."""
    moved, programs = attention_traffic(*model, W, C)
    allowed = max(1, 4096 // (10 * model[1] * W))
    usual = model is LLADA and W <= 128
    assert moved.partials > 0 or not usual
    assert moved.all_to_memory <= 1.1 or (programs * allowed < 0.65 * SMS and not usual)


# --- rope_write_kv --------------------------------------------------------------------------------


def test_rotary_writes_move_every_byte_once():
    H, H_kv, W, C, D, length = 4, 2, 32, 256, 128, 30
    q = zeros(1, H, W, D, dtype=HALF)
    k, v, kc, vc = (zeros(1, H_kv, n, D, dtype=HALF) for n in (W, W, C, C))
    cos_sin = zeros(C, D)
    with counted() as traffic:
        out = rope_write_kv(
            q, k, v, cos_sin, kc, vc, window_start=ints(100), window_length=ints(length)
        )
    head = D * 2  # bytes of one token's
    must = (H * (length + W) + 4 * H_kv * length) * head + length * D * 4
    tensors = (q, k, v, kc, vc, out)
    assert traffic.touched(*tensors, cos_sin) <= 1.1 * must
    # A head's part of the table comes from the L2 cache: every head asks for them.
    assert traffic.asked(*tensors) <= 1.1 * must
    assert traffic.touched(cos_sin) == length * D * 4


# --- unmask_and_slide -----------------------------------------------------------------------------


def test_unmasking_reads_the_response_twice_at_most():
    """Once for the first mask and EOS, once, from the first mask on, for the candidates."""
    P, G, K, mask = 1000, 1024, 32, 99
    spec = dataclasses.replace(
        SPEC, prompt_length=P, block_length=K, max_block_length=K, mask_id=mask, eos_ids=(3,)
    )
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
