"""lm_head_confidence: from hidden states to a proposed token and its confidence.

The result is that of `token_confidence` for the logits `hidden @ weight.T + bias`, but the kernel
never writes these logits to memory. This is FlashSampling (arXiv 2603.15854), applied to proposing
and scoring. `lm_head_partial` does the same for a shard of the vocabulary, and returns a state that
`combine_partials` takes.

Shapes: V vocabulary entries, N candidates, E hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from dsb_kernels._check import FLOATS, check_stride, check_tensor
from dsb_kernels._configs import Launch, architecture_of, configuration, largest_block, of_dtype
from dsb_kernels._launch import prefetch_rows, wait_for_previous, wrap_triton
from dsb_kernels._op import jit, op, tl, triton
from dsb_kernels.noise import gumbel
from dsb_kernels.score import (
    NO_TOKEN,
    PLANES,
    capped,
    check_scoring,
    launch_combine,
    launch_merge,
    state_of,
    store_state,
    weigh,
)
from dsb_kernels.token_confidence import score_in_place

TILE_ENTRIES = largest_block("lm_head_confidence", "BLOCK_V")  # that a program scores at once

# --- definition -------------------------------------------------------------------------------


def lm_head_confidence_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eligible: Tensor | None = None,
    banned: Sequence[int] = (),
    excluded: Sequence[int] = (),
    excluding: Tensor | None = None,
    temperature: float = 0.0,
    seed: Tensor | None = None,
    noise_ids: Tensor | None = None,
    confidence: str = "probability",
) -> tuple[Tensor, Tensor]:
    """Propose and score a token for every hidden state (see `token_confidence`).

    Args:
        hidden: (N, E) float32, float16 or bfloat16, last dimension of stride 1.
        weight: (V, E), the LM head, of the same dtype, last dimension of stride 1, first one of at
            most 2**24.
        bias: (V,) of the same dtype, or None.
        eligible, banned, excluded, excluding, temperature, seed, noise_ids, confidence: as in
            `token_confidence`, with (N,) in place of (...).

    Returns:
        token (N,) int64 and confidence (N,) float32. The kernel accumulates the logits in float32
        and scores them so; the definition scores logits that are rounded to the dtype of `hidden`.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device, stride or value.
    """
    logits = linear(hidden, weight, bias)
    return score_in_place(
        logits if logits.dtype == torch.float64 else logits.float(), eligible=eligible,
        banned=banned, excluded=excluded, excluding=excluding, temperature=temperature, seed=seed,
        noise_ids=noise_ids, confidence=confidence,
    )  # fmt: skip


def lm_head_partial_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    vocab_start: int = 0,
    vocab_end: int | None = None,
    eligible: Tensor | None = None,
    banned: Sequence[int] = (),
    excluded: Sequence[int] = (),
    excluding: Tensor | None = None,
    temperature: float = 0.0,
    seed: Tensor | None = None,
    noise_ids: Tensor | None = None,
    confidence: str = "probability",
) -> Tensor:
    """The states of candidates over a shard of the vocabulary, for `combine_partials`.

    Args:
        hidden, bias, eligible, excluding, temperature, seed, noise_ids, confidence: as in
            `lm_head_confidence`.
        weight: (V, E), the shard of the LM head.
        vocab_start: the global id of the shard's first token. That of its last one is below 2**24.
        vocab_end: one past the global id of the shard's last token, for a shard that is padded with
            weights beyond the vocabulary. None means that no weights are padding.
        banned, excluded: global token ids, which may belong to other shards.

    Returns:
        (6, N) float32, the state of each candidate, with a global token id (`dsb_kernels.score`).
        The states of candidates that are not eligible are undefined.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device, stride or value.
    """
    V = len(weight) if vocab_end is None else vocab_end - vocab_start
    logits = linear(hidden, weight[:V], None if bias is None else bias[:V])
    return state_of(
        logits, banned=columns_of(banned, vocab_start, V),
        excluded=columns_of(excluded, vocab_start, V), excluding=excluding,
        temperature=temperature, seed=seed, noise_ids=noise_ids, confidence=confidence,
        vocab_start=vocab_start,
    )  # fmt: skip


def columns_of(tokens: Sequence[int], vocab_start: int, V: int) -> list[int]:
    """Those of the tokens that lie in a shard of V tokens, counted from its first token."""
    return [token - vocab_start for token in tokens if 0 <= token - vocab_start < V]


# --- kernel -----------------------------------------------------------------------------------
# A program scores a contiguous share of the vocabulary for BLOCK_N candidates, in tiles of BLOCK_V
# vocabulary entries. The weights are the M operand of the tensor cores, which want 64 of them; the
# candidates are the N operand. Each weight is read once for up to 128 candidates. A tile's logits
# stay in registers: the program writes only the candidates' states over the tile (see score.py),
# which are one part.


@jit
def _noise(key, token, noise_id):
    """The Gumbel noise of every token (BLOCK_V,) for every candidate (BLOCK_N,). `key` is one for
    all candidates, or (1, BLOCK_N)."""
    counter = (token // 4).to(tl.uint32)[:, None]
    id_low = (noise_id & 0xFFFFFFFF).to(tl.uint32)[None, :]
    id_high = ((noise_id >> 32) & 0xFFFFFFFF).to(tl.uint32)[None, :]
    counter, id_low = tl.broadcast(counter, id_low)
    counter, id_high = tl.broadcast(counter, id_high)
    w0, w1, w2, w3 = tl.philox(key, counter, id_low, id_high, tl.zeros_like(counter))
    # One Philox call has the words of four tokens, but these are in different threads here, and
    # each thread makes the call.
    which = (token % 4)[:, None]
    return gumbel(tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3)))


@jit
def _store_states(
    x, first, last, first_candidate, num_candidates, part_ptr, excluding_ptr, seed_ptr,
    noise_ids_ptr, token_base, temperature,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, BANNED: tl.constexpr,
    EXCLUDED: tl.constexpr, SAMPLE: tl.constexpr, CONFIDENCE: tl.constexpr, SEEDS: tl.constexpr,
):  # fmt: skip
    """Score a tile of logits `x` (BLOCK_V, BLOCK_N), at most COLUMNS candidates at a time.

    A thread keeps values of all these candidates in its registers, which are too few for 128.
    """
    if BLOCK_N > COLUMNS:
        halves = tl.permute(tl.reshape(x, (BLOCK_V, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _store_states(
            left, first, last, first_candidate, num_candidates, part_ptr, excluding_ptr, seed_ptr,
            noise_ids_ptr, token_base, temperature, BLOCK_V, BLOCK_N // 2, COLUMNS,
            BANNED, EXCLUDED, SAMPLE, CONFIDENCE, SEEDS,
        )  # fmt: skip
        _store_states(
            right, first, last, first_candidate + BLOCK_N // 2, num_candidates, part_ptr,
            excluding_ptr, seed_ptr, noise_ids_ptr, token_base, temperature, BLOCK_V, BLOCK_N // 2,
            COLUMNS, BANNED, EXCLUDED, SAMPLE, CONFIDENCE, SEEDS,
        )  # fmt: skip
    else:
        token = first + tl.arange(0, BLOCK_V)
        candidate = first_candidate + tl.arange(0, BLOCK_N)
        x = tl.where(token[:, None] < last, x, -float("inf"))
        for i in tl.static_range(len(EXCLUDED)):
            if (EXCLUDED[i] >= first) & (EXCLUDED[i] < first + BLOCK_V):
                excluding = candidate < num_candidates
                if excluding_ptr is not None:
                    excluding = tl.load(excluding_ptr + candidate, mask=excluding, other=0) != 0
                is_excluded = (token == EXCLUDED[i])[:, None] & excluding[None, :]
                x = tl.where(is_excluded, -float("inf"), x)
        maximum = tl.max(x, 0)
        distance, e = weigh(x, maximum[None, :])
        e = capped(e)
        total = tl.sum(e, 0)
        extra = tl.zeros_like(total)
        if CONFIDENCE == "entropy":
            finite = (e > 0) & (distance < float("inf"))
            extra = tl.sum(tl.where(finite, e * distance, 0.0), 0)

        score = maximum
        for i in tl.static_range(len(BANNED)):
            if (BANNED[i] >= first) & (BANNED[i] < first + BLOCK_V):
                x = tl.where(token[:, None] == BANNED[i], -float("inf"), x)
                score = tl.max(x, 0)
        scores = x
        if SAMPLE:
            mine = tl.minimum(candidate, num_candidates - 1)
            noise_id = tl.load(noise_ids_ptr + mine)
            key = tl.load(seed_ptr + mine)[None, :] if SEEDS else tl.load(seed_ptr)
            scores = x / temperature + _noise(key, token + token_base, noise_id)
            score = tl.max(scores, 0)
        index = tl.min(tl.where(scores == score[None, :], token[:, None], NO_TOKEN), 0)
        logit = score
        if SAMPLE:
            logit = tl.max(tl.where(token[:, None] == index[None, :], x, -float("inf")), 0)
        if CONFIDENCE == "margin":
            logit = tl.max(x, 0)
            best = tl.min(tl.where(x == logit[None, :], token[:, None], NO_TOKEN), 0)
            extra = tl.max(tl.where(token[:, None] == best[None, :], -float("inf"), x), 0)
        index = tl.where(score == -float("inf"), NO_TOKEN, index)
        store_state(
            part_ptr + candidate, num_candidates, candidate < num_candidates,
            maximum, total, score, logit, extra, index, token_base,
        )  # fmt: skip


@jit
def _lm_head_kernel(
    weight_ptr, hidden_ptr, bias_ptr, eligible_ptr, excluding_ptr, seed_ptr, noise_ids_ptr,
    partial_ptr, stride_wv, stride_hn, num_candidates, V, E, share, token_base, temperature,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    COLUMNS: tl.constexpr, BANNED: tl.constexpr, EXCLUDED: tl.constexpr, SAMPLE: tl.constexpr,
    CONFIDENCE: tl.constexpr, SEEDS: tl.constexpr = False, PDL: tl.constexpr = False,
):  # fmt: skip
    """Program (share, block of candidates): the states of these candidates over each tile of one
    share of the vocabulary."""
    program = tl.program_id(0)
    first = program * share
    last = tl.minimum(first + share, V)
    prefetch_rows(weight_ptr, first + tl.arange(0, BLOCK_V), last, stride_wv, 0, E, PDL)
    wait_for_previous(PDL)
    first_candidate = tl.program_id(1) * BLOCK_N
    candidate = first_candidate + tl.arange(0, BLOCK_N)
    present = candidate < num_candidates
    if eligible_ptr is not None:
        eligible = tl.load(eligible_ptr + candidate, mask=present, other=0)
        if tl.max(eligible.to(tl.int32), 0) == 0:
            return
    temperature = tl.cast(temperature, tl.float32)  # Inductor passes scalars as float64
    k = tl.arange(0, BLOCK_K)
    # Unsigned 32 bits take half the registers of addresses, and a tile's are all alike. They
    # suffice for every stride that `check_stride` accepts.
    weight_offset = tl.arange(0, BLOCK_V)[:, None] * stride_wv + k[None, :]
    weight_offset = weight_offset.to(tl.uint32).to(tl.uint64)
    hidden_ptrs = hidden_ptr + candidate.to(tl.int64)[None, :] * stride_hn + k[:, None]
    # A mask covers whole hidden states, never parts of one, so that loads stay wide and fetch
    # nothing twice.
    hidden_mask = present[None, :]

    part = program.to(tl.int64) * tl.cdiv(share, BLOCK_V)
    part_ptr = partial_ptr + part * num_candidates * 6
    # The loops are flattened, so that the next tile's first loads run while a tile is scored.
    for tile in tl.range(first, last, BLOCK_V, flatten=True):
        token = tile + tl.arange(0, BLOCK_V)
        tile_ptr = weight_ptr + tl.cast(tile, tl.int64) * stride_wv
        weight_mask = (token < last)[:, None]
        x = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)
        for offset in range(0, E, BLOCK_K):
            if EVEN_K:
                w = tl.load(tile_ptr + offset + weight_offset, mask=weight_mask, other=0.0)
                h = tl.load(hidden_ptrs + offset, mask=hidden_mask, other=0.0)
            else:
                inside = offset + k < E
                mask = weight_mask & inside[None, :]
                w = tl.load(tile_ptr + offset + weight_offset, mask=mask, other=0.0)
                h = tl.load(hidden_ptrs + offset, mask=hidden_mask & inside[:, None], other=0.0)
            x = tl.dot(w, h, x, input_precision="ieee")
        if bias_ptr is not None:
            x += tl.load(bias_ptr + token, mask=token < last, other=0.0).to(tl.float32)[:, None]
        _store_states(
            x, tile, last, first_candidate, num_candidates, part_ptr, excluding_ptr, seed_ptr,
            noise_ids_ptr, token_base, temperature, BLOCK_V, BLOCK_N,
            # Margins, entropies and excluded tokens need more registers for each candidate.
            COLUMNS if CONFIDENCE == "probability" and len(EXCLUDED) == 0 else COLUMNS // 2,
            BANNED, EXCLUDED, SAMPLE, CONFIDENCE, SEEDS,
        )  # fmt: skip
        part_ptr += num_candidates * 6


# --- op ---------------------------------------------------------------------------------------


def launch_of(
    num_candidates: int, V: int, dtype: torch.dtype, architecture: str, *, sample: bool
) -> Launch:
    """The launch of the kernel, whose grid is (shares of the vocabulary, blocks of candidates).
    `parts` counts the tiles of all shares."""
    op = of_dtype("lm_head_confidence" + " sampled" * sample, dtype)
    config = configuration(op, num_candidates, architecture)
    blocks = {name: value for name, value in config.blocks.items() if name != "PROGRAMS"}
    share = triton.cdiv(triton.cdiv(V, config.blocks["PROGRAMS"]), 8) * 8
    programs = triton.cdiv(V, share)
    last_share = V - (programs - 1) * share  # the only one that may be smaller
    tiles = [triton.cdiv(tokens, blocks["BLOCK_V"]) for tokens in (share, last_share)]
    grid = (programs, triton.cdiv(num_candidates, blocks["BLOCK_N"]))
    parts = (programs - 1) * tiles[0] + tiles[1]
    return Launch(blocks, config.num_warps, config.num_stages, grid=grid, share=share, parts=parts)


def launch_states(a: Any, V: int, vocab_start: int) -> Tensor:
    """Compute the states over each tile of the vocabulary: (tiles, 6, N)."""
    banned, excluded = (tuple(columns_of(x, vocab_start, V)) for x in (a.banned, a.excluded))
    (N, E), sample = a.hidden.shape, a.temperature > 0
    launch = launch_of(N, V, a.hidden.dtype, architecture_of(a.hidden.device), sample=sample)
    partials = a.hidden.new_empty((launch.parts, PLANES, N), dtype=torch.float32)
    if N:
        wrap_triton(_lm_head_kernel)[launch.grid](
            a.weight, a.hidden, a.bias, a.eligible, a.excluding, a.seed, a.noise_ids, partials,
            a.weight.stride(0), a.hidden.stride(0), N, V, E, launch.share, vocab_start,
            a.temperature, EVEN_K=E % launch.blocks["BLOCK_K"] == 0, BANNED=banned,
            EXCLUDED=excluded, SAMPLE=sample, CONFIDENCE=a.confidence,
            SEEDS=sample and a.seed.ndim > 0, **launch.options(),
        )  # fmt: skip
    return partials


def _launch(a: Any) -> tuple[Tensor, Tensor]:
    partials = launch_states(a, len(a.weight), vocab_start=0)
    return launch_combine(partials, a.eligible, a.banned, a.confidence)


def _launch_partial(a: Any) -> Tensor:
    V = len(a.weight) if a.vocab_end is None else a.vocab_end - a.vocab_start
    return launch_merge(launch_states(a, V, a.vocab_start), a.eligible, a.confidence)


def check_matmul(name: str, a: Any) -> None:
    check = functools.partial(check_tensor, name, unit_stride=True)
    check("hidden", a.hidden, dtype=FLOATS, shape=("N", "E"))
    dtype, device, E = a.hidden.dtype, a.hidden.device, a.hidden.shape[1]
    check("weight", a.weight, dtype=dtype, device=device, shape=("V", E))
    check_stride(name, "weight", a.weight, 0, TILE_ENTRIES)
    if a.bias is not None:
        check("bias", a.bias, dtype=dtype, device=device, shape=a.weight.shape[:1])


def _check(a: Any) -> None:
    check_matmul("lm_head_confidence", a)
    N, V = len(a.hidden), len(a.weight)
    check_scoring("lm_head_confidence", a, (N,), V, a.hidden.device)


def _check_partial(a: Any) -> None:
    name = "lm_head_partial"
    check_matmul(name, a)
    size = len(a.weight)
    V = size if a.vocab_end is None else a.vocab_end - a.vocab_start
    if a.vocab_start < 0:
        raise ValueError(f"{name}: vocab_start={a.vocab_start}: accepted is at least 0")
    if not 1 <= V <= size:
        raise ValueError(
            f"{name}: vocab_end={a.vocab_end} with vocab_start={a.vocab_start}: accepted are "
            f"{a.vocab_start + 1} to {a.vocab_start + size}"
        )
    check_scoring(name, a, (len(a.hidden),), a.vocab_start + V, a.hidden.device, shard=True)


lm_head_confidence = op(lm_head_confidence_reference, launch=_launch, check=_check)
lm_head_partial = op(lm_head_partial_reference, launch=_launch_partial, check=_check_partial)
