"""Bytes that the kernels must move, and those that they do, at the models' real shapes.

The interpreter's loads and stores are counted with the production launch geometry, and what shares
nothing is run once and multiplied. One candidate of `token_confidence` stands for all; of
`lm_head_confidence` one share of the vocabulary and an eighth of the hidden size, since shares have
only the hidden states in common; of the linear ops two tiles of features, or 256 input features; of
attention one KV head.

`must` counts each input that matters once, and each output once. `touched` counts distinct bytes
that are read or written at all, which memory has to move. `asked` counts the bytes of all loads of
the large inputs; what exceeds `touched` comes from the caches. `partials` counts the bytes of
partial results (states, splits), which are written once and read once.

Up to 32 tokens, all that the linear ops move is within 1.1 of what must move. From 64 tokens on,
the partial sums of the output projection are more than that; they are at most 8.4 MB at a time,
which stay in the L2 cache. Why attention's partial results are as large as they are is said in
docs/tuning.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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
from tests.mutations import DEVICE, kernels
from tools.compile_report.cases.commit import LLADA as SPEC

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="counts in the interpreter")
HALF = torch.float16
zeros = torch.zeros
L2_BYTES = 50e6  # of an H100


@dataclass
class Traffic:
    """Addresses that each load and store had, with repetitions, and the bytes of an element."""

    loads: list[tuple[np.ndarray, int]] = field(default_factory=list)
    stores: list[tuple[np.ndarray, int]] = field(default_factory=list)

    def asked(self, *tensors: Tensor) -> int:
        """Bytes of loads and stores in the tensors' memory."""
        accesses = self.loads + self.stores
        return sum(self._inside(t, a).size * n for t in tensors for a, n in accesses)

    def touched(self, *tensors: Tensor) -> int:
        """Distinct bytes loaded plus distinct bytes stored in the tensors' memory."""
        total = 0
        for tensor, accesses in itertools.product(tensors, (self.loads, self.stores)):
            inside = [self._inside(tensor, a) for a, _ in accesses]
            total += np.unique(np.concatenate(inside)).size * tensor.element_size() if inside else 0
        return total

    def asked_elsewhere(self, *tensors: Tensor) -> int:
        """Bytes in none of the tensors' memory: partial results."""
        return sum(a.size * n for a, n in self.loads + self.stores) - self.asked(*tensors)

    @staticmethod
    def _inside(tensor: Tensor, addresses: np.ndarray) -> np.ndarray:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        assert sum((n - 1) * step for n, step in steps) == tensor.numel() - 1  # dense
        low = tensor.data_ptr()
        return addresses[(addresses >= low) & (addresses < low + tensor.nbytes)]


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Run kernels in the interpreter and record what they load and store."""
    from triton.runtime.interpreter import interpreter_builder

    builder, traffic = type(interpreter_builder), Traffic()
    load, store = builder.create_masked_load, builder.create_masked_store

    def addresses(ptrs, mask):
        size = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        return np.atleast_1d(ptrs.data[mask.data]).ravel(), size

    def recorded_load(self, ptrs, mask, *rest):
        traffic.loads.append(addresses(ptrs, mask))
        return load(self, ptrs, mask, *rest)

    def recorded_store(self, ptrs, value, mask, *rest):
        traffic.stores.append(addresses(ptrs, mask))
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = recorded_load, recorded_store
    try:
        with kernels():
            yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def table(quick: list[tuple], others: dict[Any, tuple[int, ...]]) -> list:
    """Quick cases, and slow ones: those of one model or layer with several sizes each. What runs in
    the interpreter repeats itself where neither the configuration nor what is ragged changes."""
    slow = [(name, size) for name, sizes in others.items() for size in sizes]
    return quick + [pytest.param(*each, marks=pytest.mark.slow) for each in slow]


def check(*, must: int, touched: int, asked: int, partials: int = 0) -> None:
    """The bytes of one call."""
    assert touched <= 1.1 * must
    assert asked + partials <= 1.1 * must


# --- scoring ----------------------------------------------------------------------------------

VOCABULARIES = {"LLaDA-8B": 126464, "iLLaDA-8B": 155136, "Dream-7B": 152064}
HIDDEN = {"LLaDA-8B": 4096, "iLLaDA-8B": 4096, "Dream-7B": 3584}


@pytest.mark.parametrize(
    ("model", "candidates"),
    table(
        [("LLaDA-8B", 32), ("LLaDA-8B", 1024)],
        {"LLaDA-8B": (256,), "iLLaDA-8B": (64, 1024), "Dream-7B": (32, 256)},
    ),
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
    check(
        must=V * 2 + 8 + 4,
        touched=traffic.touched(logits) + outputs + partials,
        asked=traffic.asked(logits) + outputs,
        partials=partials,
    )


def test_ineligible_candidates_are_not_read():
    logits = zeros(3, 9000, dtype=HALF)
    with counted() as traffic:
        token_confidence(logits, eligible=torch.tensor([True, False, False]))
    assert traffic.touched(logits) == traffic.asked(logits) == 9000 * 2


@pytest.mark.parametrize(
    ("model", "candidates"),
    table(
        [("LLaDA-8B", 32)],
        {"LLaDA-8B": (16, 64, 128), "iLLaDA-8B": (32, 128), "Dream-7B": (16, 128)},
    ),
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
    check(
        must=V * E * 2 + small - partials,
        touched=round(shares * traffic.touched(weight)) * slices + small,
        asked=round(shares * traffic.asked(weight)) * slices,
        partials=partials,
    )


# --- linear ops -------------------------------------------------------------------------------

# Output and input features of layers, and whether they are gated.
QKV = (12288, 4096, False)  # of LLaDA-8B
ILLADA_QKV, DREAM_QKV = (6144, 4096, False), (4608, 3584, False)
GATE_UP, DREAM_GATE_UP = (12288, 4096, True), (18944, 3584, True)  # iLLaDA-8B's is LLaDA-8B's
OUT, DOWN = (4096, 4096), (4096, 12288)
DREAM_OUT, DREAM_DOWN = (3584, 3584), (3584, 18944)
COLUMNS = 256  # input features that are run


@pytest.mark.parametrize(
    ("layer", "tokens"),
    table(
        [(QKV, 32), (GATE_UP, 32)],
        dict.fromkeys((QKV, GATE_UP), (16, 64, 128))
        | dict.fromkeys((ILLADA_QKV, DREAM_QKV, DREAM_GATE_UP), (32, 128)),
    ),
)
def test_window_linear_reads_every_weight_once(layer, tokens):
    """Two of the tiles of features."""
    F, E, gated = layer
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
    check(
        must=round((weight.nbytes * parts + out.nbytes) / share) + x.nbytes * parts,
        touched=round(touched / share) + x.nbytes * parts,
        asked=round(traffic.asked(weight) * parts / share),
    )


@pytest.mark.parametrize(
    ("layer", "tokens"),
    table(
        [(DREAM_OUT, 32)],
        {DREAM_OUT: (16, 64, 128)} | dict.fromkeys((DREAM_DOWN, OUT, DOWN), (32, 128)),
    ),
)
def test_linear_add_norm_reads_every_weight_once(layer, tokens):
    """All output features, with the splits of the whole."""
    F, E = layer
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
    if tokens > 32:  # the partial sums stay in the L2 cache
        assert partials / 2 < 10e6 < L2_BYTES / 4
        partials = 0
    check(
        must=(weight.nbytes + x.nbytes) * parts + 3 * residual.nbytes + gain.nbytes,
        touched=traffic.touched(weight, x) * parts + traffic.touched(residual, gain, out),
        asked=traffic.asked(weight) * parts,
        partials=partials,
    )


# --- window_attention -----------------------------------------------------------------------------

SMS = 132  # of an H100
LLADA, ILLADA, DREAM = (1, 32), (4, 8), (7, 4)  # query heads of a KV head, KV heads


def attention_traffic(
    group: int, kv_heads: int, W: int, C: int = 4096, in_cache: bool = True
) -> float:
    """What all KV heads move at batch 1 if the partial results leave the L2 cache, as a share of
    what must move."""
    D, stored, start = 128, C - 100, C // 2 + 7
    q = zeros(1, group, W, D, dtype=HALF)
    kc, vc = zeros(2, 1, 1, C, D, dtype=HALF)
    kw, vw = zeros(2, 1, 1, W, D, dtype=HALF)
    tiles = -(-group * W // tile_of(group * W, D, q.dtype, "sm_90").blocks["BLOCK_M"])
    splits = choose_splits(kv_heads * tiles, SMS)
    where = {"window_start": ints(start), "window_length": ints(W), "cache_seqlens": ints(stored)}
    with counted() as traffic:
        window = (None, None) if in_cache else (kw, vw)
        out = window_attention(q, *window, kc, vc, **where, num_splits=splits)
    named = (q, kc, vc, kw, vw, out)
    keys_and_values = 2 * stored * D * 2
    # A tile of queries asks for K/V once, whatever the splits; up to 128 queries are one tile.
    assert traffic.asked(kc, vc, kw, vw) <= 1.1 * keys_and_values * tiles
    must, touched = keys_and_values + 2 * group * W * D * 2, traffic.touched(*named)
    assert touched <= 1.1 * must
    # The partial results of a launch stay within the L2 cache until they are combined.
    partials = traffic.asked_elsewhere(*named, *where.values())
    assert partials * kv_heads / 2 < L2_BYTES / 2
    assert (partials > 0) == (splits > 1)
    return (touched + partials) / must


@pytest.mark.parametrize("heads", [LLADA, DREAM])
def test_attention_reads_the_windows_own_keys_and_values_once(heads):
    attention_traffic(*heads, 32, 1024, in_cache=False)


@pytest.mark.slow
def test_a_longer_cache_is_read_once():
    """The splits are those of any other length: the partial results are a smaller share."""
    attention_traffic(*LLADA, 64, 16384)


def test_listed_blocks_are_all_that_is_read():
    k, v = zeros(2, 1, 1, 1024, 128, dtype=HALF)
    q = zeros(1, 4, 8, 128, dtype=HALF)
    lists = {"kv_num_blocks": ints(2), "kv_indices": ints(3, 9, 1, 1)[None]}
    where = {"window_start": ints(0), "window_length": ints(8), "cache_seqlens": ints(1024)}
    with counted() as traffic:
        window_attention(q, None, None, k, v, **where, **lists, num_splits=2)
    assert traffic.touched(k) == traffic.asked(k) == (2 * 64 + 8) * 128 * 2


@pytest.mark.parametrize(
    ("heads", "W"),
    table(
        [(LLADA, 32), (LLADA, 64), (LLADA, 128)],
        {LLADA: (256,)} | dict.fromkeys((ILLADA, DREAM), (32, 64, 128)),
    ),
)
def test_with_its_partial_results_attention_moves_little_more(heads, W):
    """Where each head has its own keys; a group that shares them has more queries for each key."""
    share = attention_traffic(*heads, W)
    assert share <= (1.1 if W <= 64 else 1.15) or heads != LLADA


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
    spec = dataclasses.replace(SPEC, block_length=K, max_block_length=K, mask_id=mask, eos_ids=(3,))
    canvas = torch.full((1, P + G), mask)
    canvas[:, :P] = 1
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
