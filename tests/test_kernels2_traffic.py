"""Bytes that attention, rotary writes and unmasking must move, and those that they do.

The interpreter's loads and stores are counted address by address, at the models' real sizes for
one KV head and one row (heads and rows do not share anything, so that bytes scale with them).
`python -m pytest -s tests/test_kernels2_traffic.py -k table` prints the table.

    must      each input that matters once, each output once
    touched   distinct bytes that are read or written at all: what memory has to move
    asked     bytes of every load of K/V: the row tiles of a KV head run together, and all but the
              first get it from the L2 cache
    partials  bytes of the splits' results, written and read again at once, in the L2 cache; the
              log-sum-exp is read twice

Split-KV's partial results are (query rows of a KV head) x splits / positions of the bytes of K and
V. Where every query head has its own K and V (LLaDA) they are counted as if they went to memory,
and all is within 1.1 of what must move. Where G query heads share them there are G times the rows,
and G times fewer programs, which need G times the splits: a tenth would leave most SMs idle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from dsb_kernels.attention import window_attention
from dsb_kernels.attention_kernel import choose_splits, tile_of
from dsb_kernels.commit import initial_state, unmask_and_slide
from dsb_kernels.rope_kv import rope_write_kv
from dsb_kernels.rows import UnmaskSpec
from tests.mutations import DEVICE, kernels

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="counts in the interpreter")
L2_BYTES = 50e6  # of an H100


@dataclass
class Traffic:
    """Addresses that each load and store had, with repetitions, and the bytes of an element."""

    loads: list[tuple[np.ndarray, int]] = field(default_factory=list)
    stores: list[tuple[np.ndarray, int]] = field(default_factory=list)

    def asked(self, tensor: Tensor) -> int:
        """Bytes of loads and stores in a tensor's memory."""
        return sum(self._inside(tensor, a).size * n for a, n in self.loads + self.stores)

    def touched(self, tensor: Tensor) -> int:
        """Distinct bytes loaded plus distinct bytes stored in a tensor's memory."""
        distinct = 0
        for accesses in (self.loads, self.stores):
            inside = [self._inside(tensor, a) for a, _ in accesses]
            distinct += np.unique(np.concatenate(inside)).size if inside else 0
        return distinct * tensor.element_size()

    def asked_elsewhere(self, *tensors: Tensor) -> int:
        """Bytes in none of the tensors' memory: partial results."""
        total = 0
        for addresses, size in self.loads + self.stores:
            known = sum(self._inside(t, addresses).size for t in tensors)
            total += (addresses.size - known) * size
        return total

    @staticmethod
    def _inside(tensor: Tensor, addresses: np.ndarray) -> np.ndarray:
        assert tensor.is_contiguous()
        low = tensor.data_ptr()
        high = low + tensor.numel() * tensor.element_size()
        return addresses[(addresses >= low) & (addresses < high)]


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


# --- window_attention -----------------------------------------------------------------------------

SMS = 132  # of an H100
LLADA = ("LLaDA-8B", 1, 32)  # name, query heads of a KV head, KV heads
MODELS = [LLADA, ("iLLaDA-8B", 4, 8), ("Dream-7B", 7, 4)]
# model, window rows, positions
SHAPES = [(*m, W, C) for m in MODELS for C in (4096, 16384) for W in (32, 64, 128)]
SHAPES += [(*LLADA, 256, C) for C in (4096, 16384)]


@dataclass
class AttentionTraffic:
    """Bytes of all KV heads at batch 1."""

    name: str
    rows: int  # query rows of a KV head
    must: int
    touched: int
    asked: int
    keys_and_values: int
    partials: int
    tiles: int
    programs: int  # before they are split
    splits: int

    @property
    def all_to_memory(self) -> float:
        """What would move if the partial results left the L2 cache, as a share of `must`."""
        return (self.touched + self.partials) / self.must


def attention_traffic(
    name: str, group: int, kv_heads: int, W: int, C: int, in_cache: bool = True
) -> AttentionTraffic:
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
    keys_and_values = 2 * (stored * D * 2)
    must = keys_and_values + 2 * group * W * D * 2
    partials = traffic.asked_elsewhere(*named, *metadata.values())
    return AttentionTraffic(
        name=f"{name} W={W} C={C}",
        rows=group * W,
        must=must * kv_heads,
        touched=sum(traffic.touched(t) for t in named) * kv_heads,
        asked=sum(traffic.asked(t) for t in (kc, vc, kw, vw)) * kv_heads,
        keys_and_values=keys_and_values * kv_heads,
        partials=partials * kv_heads,
        tiles=tiles,
        programs=kv_heads * tiles,
        splits=splits,
    )


def check_attention(found: AttentionTraffic) -> None:
    assert found.touched <= 1.1 * found.must
    # A tile of rows asks for K/V once, whatever the splits; up to 128 rows are one tile.
    assert found.asked <= 1.1 * found.keys_and_values * found.tiles
    # The partial results of a launch stay within the L2 cache until they are combined.
    assert found.partials / 2 < L2_BYTES / 2


@pytest.mark.parametrize("in_cache", [False, True], ids=["fresh", "in_cache"])
def test_attention_reads_keys_and_values_once(in_cache: bool) -> None:
    for shape in (("small", 1, 32, 32, 1024), ("small", 7, 4, 32, 1024)):
        check_attention(attention_traffic(*shape, in_cache=in_cache))


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
    found = attention_traffic(*LLADA, W, C)
    assert found.partials > 0
    assert found.all_to_memory <= 1.1


@pytest.mark.slow
def test_attention_table() -> None:
    print(f"\n{'shape':26} splits   must  touched / must  with partials  asked / K, V  partials")
    for shape in SHAPES:
        t = attention_traffic(*shape)
        print(
            f"{t.name:26} {t.splits:6} {t.must / 1e6:6.1f}  {t.touched / t.must:14.3f}"
            f"  {t.all_to_memory:13.3f}  {t.asked / t.keys_and_values:12.3f}"
            f"  {t.partials / 1e6:5.1f} MB"
        )
        check_attention(t)
        # More only where splits for a tenth of K and V at 4096 positions would idle the SMs.
        allowed = max(1, 4096 // (10 * t.rows))
        assert t.all_to_memory <= 1.1 or t.programs * allowed < 0.65 * SMS


# --- rope_write_kv --------------------------------------------------------------------------------


@pytest.mark.parametrize("is_neox", [True, False])
def test_rotary_writes_move_every_byte_once(is_neox: bool) -> None:
    H, H_kv, W, C, D, length = 4, 2, 32, 256, 128, 30
    dtype = torch.float16
    q = torch.zeros(1, H, W, D, dtype=dtype)
    k, v, kc, vc = (torch.zeros(1, H_kv, n, D, dtype=dtype) for n in (W, W, C, C))
    table = torch.zeros(C, D)
    with counted() as traffic:
        out = rope_write_kv(
            q, k, v, table, kc, vc, window_start=ints(100), window_length=ints(length),
            is_neox=is_neox,
        )  # fmt: skip
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
        P, K, K, "dsb", "dsb", 24, 0, "threshold", 0.9, 0, "select", mask, (3,), True
    )  # fmt: skip
    canvas = torch.full((1, P + G), mask)
    state = initial_state(canvas, ints(0), spec)
    token, confidence = torch.full((1, K), 5), torch.full((1, K), 0.95)
    active = torch.ones(1, dtype=torch.bool)
    with counted() as traffic:
        unmask_and_slide(canvas, token, confidence, state, active, ints(0), spec)
    must = (G + K) * 8  # the response, and what is committed
    assert traffic.touched(canvas) <= 1.1 * must
    window = 2 * K * 8  # of the candidates, selected twice, and of the next window
    assert traffic.asked(canvas) <= 1.1 * (must + 2 * window)
