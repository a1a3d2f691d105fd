"""lm_head_confidence: proposed token and confidence straight from hidden states.

The same result as `token_confidence` of `hidden @ weight.T + bias`, without those logits ever
being in memory: FlashSampling (arXiv 2603.15854) for proposing and scoring. `V` = vocabulary,
`N` = rows, `E` = hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsb_kernels._check import FLOATS, check_tensor
from dsb_kernels._configs import (
    architecture_of,
    configuration,
    of_dtype,
)
from dsb_kernels._op import (
    jit,
    launch_options,
    register_op,
    takes_definition,
    tl,
    triton,
    use_triton,
    wrap_triton,
)
from dsb_kernels.score import (
    NO_TOKEN,
    PLANES,
    _combine_partials_op,
    capped,
    check_scoring,
    combine_kernel,
    combine_warps,
    gumbel,
    state_definition,
    store_state,
    weigh,
)
from dsb_kernels.token_confidence import token_confidence_definition

# --- definition -------------------------------------------------------------------------------


def lm_head_confidence_definition(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eligible: Tensor | None,
    banned: Sequence[int],
    temperature: float,
    seed: Tensor | None,
    noise_ids: Tensor | None,
    confidence: str,
) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return token_confidence_definition(
        logits, eligible, banned, temperature, seed, noise_ids, confidence
    )


# --- kernel -----------------------------------------------------------------------------------
# A program scores a contiguous share of the vocabulary for BLOCK_N rows, in tiles of BLOCK_V
# tokens: the weights are the M operand of the tensor cores, which want 64 rows of it, the window's
# rows are N. Each weight is read once for up to 128 rows. A tile's logits live in registers only
# and leave as the rows' states over the tile (row_state.py), one part each.


@jit
def _noise(key, token, noise_id):
    """Gumbel noise of every token (BLOCK_V,) for every row (BLOCK_N,)."""
    counter = (token // 4).to(tl.uint32)[:, None]
    id_low = (noise_id & 0xFFFFFFFF).to(tl.uint32)[None, :]
    id_high = ((noise_id >> 32) & 0xFFFFFFFF).to(tl.uint32)[None, :]
    counter, id_low = tl.broadcast(counter, id_low)
    counter, id_high = tl.broadcast(counter, id_high)
    w0, w1, w2, w3 = tl.philox(key, counter, id_low, id_high, tl.zeros_like(counter))
    # Four tokens share a call, but sit in different threads here: each computes it.
    which = (token % 4)[:, None]
    return gumbel(tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3)))


@jit
def _store_states(
    x, first, last, first_row, rows, part_ptr, seed_ptr, noise_ids_ptr, token_base, temperature,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
    BANNED: tl.constexpr, SAMPLE: tl.constexpr, CONFIDENCE: tl.constexpr,
):  # fmt: skip
    """Score a tile of logits `x` (BLOCK_V, BLOCK_N), at most COLUMNS rows at a time: what a
    column needs is held by every thread of its column, which would not fit for 128 of them."""
    if BLOCK_N > COLUMNS:
        halves = tl.permute(tl.reshape(x, (BLOCK_V, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _store_states(
            left, first, last, first_row, rows, part_ptr, seed_ptr, noise_ids_ptr, token_base,
            temperature, BLOCK_V, BLOCK_N // 2, COLUMNS, BANNED, SAMPLE, CONFIDENCE,
        )  # fmt: skip
        _store_states(
            right, first, last, first_row + BLOCK_N // 2, rows, part_ptr, seed_ptr, noise_ids_ptr,
            token_base, temperature, BLOCK_V, BLOCK_N // 2, COLUMNS, BANNED, SAMPLE, CONFIDENCE,
        )  # fmt: skip
    else:
        token = first + tl.arange(0, BLOCK_V)
        row = first_row + tl.arange(0, BLOCK_N)
        x = tl.where(token[:, None] < last, x, -float("inf"))
        maximum = tl.max(x, 0)
        distance, e = weigh(x, maximum[None, :])
        e = capped(e)
        total = tl.sum(e, 0)
        extra = tl.zeros_like(total)
        if CONFIDENCE == "neg_entropy":
            finite = (e > 0) & (distance < float("inf"))
            extra = tl.sum(tl.where(finite, e * distance, 0.0), 0)

        score = maximum
        for i in tl.static_range(len(BANNED)):
            if (BANNED[i] >= first) & (BANNED[i] < first + BLOCK_V):
                x = tl.where(token[:, None] == BANNED[i], -float("inf"), x)
                score = tl.max(x, 0)
        scores = x
        if SAMPLE:
            noise_id = tl.load(noise_ids_ptr + tl.minimum(row, rows - 1))
            scores = x / temperature + _noise(tl.load(seed_ptr), token + token_base, noise_id)
            score = tl.max(scores, 0)
        index = tl.min(tl.where(scores == score[None, :], token[:, None], NO_TOKEN), 0)
        logit = score
        if SAMPLE:
            logit = tl.max(tl.where(token[:, None] == index[None, :], x, -float("inf")), 0)
        if CONFIDENCE == "margin":
            logit = tl.max(x, 0)
            at = tl.min(tl.where(x == logit[None, :], token[:, None], NO_TOKEN), 0)
            extra = tl.max(tl.where(token[:, None] == at[None, :], -float("inf"), x), 0)
        index = tl.where(score == -float("inf"), NO_TOKEN, index)
        store_state(
            part_ptr + row, rows, row < rows, maximum, total, score, logit, extra, index,
            token_base,
        )  # fmt: skip


@jit
def _lm_head_kernel(
    weight_ptr, hidden_ptr, bias_ptr, eligible_ptr, seed_ptr, noise_ids_ptr, partial_ptr,
    stride_wv, stride_hn, rows, V, E, share, token_base, temperature,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    COLUMNS: tl.constexpr, BANNED: tl.constexpr, SAMPLE: tl.constexpr, CONFIDENCE: tl.constexpr,
):  # fmt: skip
    """Program (share, block of rows): the rows' states over one share of the vocabulary."""
    program = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if eligible_ptr is not None:  # noqa: SIM102 (a compile-time and a run-time condition)
        if tl.max(tl.load(eligible_ptr + row, mask=row < rows, other=0).to(tl.int32), 0) == 0:
            return
    temperature = tl.cast(temperature, tl.float32)  # Inductor passes scalars as float64
    k = tl.arange(0, BLOCK_K)
    # Unsigned 32 bits take half the registers of addresses, and a tile's are all alike.
    weight_offset = tl.arange(0, BLOCK_V)[:, None] * stride_wv + k[None, :]
    weight_offset = weight_offset.to(tl.uint32).to(tl.uint64)
    hidden_ptrs = hidden_ptr + row.to(tl.int64)[None, :] * stride_hn + k[:, None]
    # Whole rows are masked, never parts of one: the loads stay wide and fetch nothing twice.
    hidden_mask = (row < rows)[None, :]

    first = program * share
    last = tl.minimum(first + share, V)
    part = program.to(tl.int64) * tl.cdiv(share, BLOCK_V)
    part_ptr = partial_ptr + part * rows * 6
    # Flattened: the first loads of the next tile are under way while a tile is scored.
    for tile in tl.range(first, last, BLOCK_V, flatten=True):
        token = tile + tl.arange(0, BLOCK_V)
        tile_ptr = weight_ptr + tl.cast(tile, tl.int64) * stride_wv
        weight_mask = (token < last)[:, None]
        x = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)
        for at in range(0, E, BLOCK_K):
            if EVEN_K:
                w = tl.load(tile_ptr + at + weight_offset, mask=weight_mask, other=0.0)
                h = tl.load(hidden_ptrs + at, mask=hidden_mask, other=0.0)
            else:
                inside = at + k < E
                mask = weight_mask & inside[None, :]
                w = tl.load(tile_ptr + at + weight_offset, mask=mask, other=0.0)
                h = tl.load(hidden_ptrs + at, mask=hidden_mask & inside[:, None], other=0.0)
            x = tl.dot(w, h, x, input_precision="ieee")
        if bias_ptr is not None:
            x += tl.load(bias_ptr + token, mask=token < last, other=0.0).to(tl.float32)[:, None]
        _store_states(
            x, tile, last, tl.program_id(1) * BLOCK_N, rows, part_ptr, seed_ptr, noise_ids_ptr,
            token_base, temperature, BLOCK_V, BLOCK_N,
            # Margins and entropies hold more for a column.
            COLUMNS if CONFIDENCE == "probability" else COLUMNS // 2,
            BANNED, SAMPLE, CONFIDENCE,
        )  # fmt: skip
        part_ptr += rows * 6


# --- op ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Geometry of a call, from static shapes alone."""

    grid: tuple[int, int]  # (shares of the vocabulary, blocks of rows)
    share: int  # tokens of a share
    parts: int  # tiles of all shares
    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int


def launch_of(rows: int, V: int, dtype: torch.dtype, architecture: str, *, sample: bool) -> Launch:
    op = of_dtype("lm_head_confidence" + " sampled" * sample, dtype)
    config = configuration(op, rows, architecture)
    blocks = {name: value for name, value in config.blocks.items() if name != "PROGRAMS"}
    share = triton.cdiv(triton.cdiv(V, config.blocks["PROGRAMS"]), 8) * 8
    programs = triton.cdiv(V, share)
    last_share = V - (programs - 1) * share  # the only one that may be smaller
    tiles = [triton.cdiv(tokens, blocks["BLOCK_V"]) for tokens in (share, last_share)]
    return Launch(
        grid=(programs, triton.cdiv(rows, blocks["BLOCK_N"])),
        share=share,
        parts=(programs - 1) * tiles[0] + tiles[1],
        blocks=blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eligible: Tensor | None,
    banned: Sequence[int],
    temperature: float,
    seed: Tensor | None,
    noise_ids: Tensor | None,
    confidence: str,
    vocab_start: int,
) -> Tensor:
    """States over the vocabulary's tiles: (tiles, 6, N)."""
    rows, (V, E) = len(hidden), weight.shape
    architecture = architecture_of(hidden.device)
    launch = launch_of(rows, V, hidden.dtype, architecture, sample=temperature > 0)
    partials = hidden.new_empty((launch.parts, PLANES, rows), dtype=torch.float32)
    wrap_triton(_lm_head_kernel)[launch.grid](
        weight, hidden, bias, eligible, seed, noise_ids, partials,
        weight.stride(0), hidden.stride(0), rows, V, E, launch.share, vocab_start, temperature,
        EVEN_K=E % launch.blocks["BLOCK_K"] == 0, BANNED=tuple(banned), SAMPLE=temperature > 0,
        CONFIDENCE=confidence, **launch.blocks,
        **launch_options(launch.num_warps, launch.num_stages),
    )  # fmt: skip
    return partials


@register_op("lm_head_confidence")
def _lm_head_confidence_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eligible: Tensor | None,
    banned: list[int],
    temperature: float,
    seed: Tensor | None,
    noise_ids: Tensor | None,
    confidence: str,
) -> tuple[Tensor, Tensor]:
    if not use_triton(hidden, weight):
        token, c = lm_head_confidence_definition(
            hidden, weight, bias, eligible, banned, temperature, seed, noise_ids, confidence
        )
        return token, c.float()
    partials = _launch(
        hidden, weight, bias, eligible, banned, temperature, seed, noise_ids, confidence, 0
    )
    return _combine_partials_op(partials, eligible, banned, confidence)


@register_op("lm_head_partial")
def _lm_head_partial_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eligible: Tensor | None,
    banned: list[int],
    temperature: float,
    seed: Tensor | None,
    noise_ids: Tensor | None,
    confidence: str,
    vocab_start: int,
) -> Tensor:
    if not use_triton(hidden, weight):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return state_definition(
            logits, banned, temperature, seed, noise_ids, confidence, vocab_start
        )
    partials = _launch(
        hidden, weight, bias, eligible, banned, temperature, seed, noise_ids, confidence,
        vocab_start,
    )  # fmt: skip
    parts, _, rows = partials.shape
    state = partials.new_empty((PLANES, rows))
    wrap_triton(combine_kernel)[(rows,)](
        partials, eligible, None, None, state, rows, parts, 0,
        PARTS=triton.next_power_of_2(parts), CONFIDENCE=confidence,
        **launch_options(combine_warps(parts), 1),
    )  # fmt: skip
    return state


def lm_head_confidence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eligible: Tensor | None = None,
    banned: Sequence[int] = (),
    temperature: float = 0.0,
    seed: Tensor | None = None,
    noise_ids: Tensor | None = None,
    confidence: str = "probability",
    vocab_start: int = 0,
    vocab_end: int | None = None,
    partial: bool = False,
) -> tuple[Tensor, Tensor] | Tensor:
    """Propose and score a token for every row of hidden states (see `token_confidence`).

    Args:
        hidden: (N, E) float32, float16 or bfloat16, last dimension of stride 1.
        weight: (V, E), the LM head, of the same dtype, last dimension of stride 1.
        bias: (V,) of the same dtype, or None.
        eligible, banned, temperature, seed, noise_ids, confidence: as in `token_confidence`, with
            (N,) in place of (...); `banned` are global token ids.
        vocab_start: global id of the token of weight row 0; not 0 only with `partial`.
        vocab_end: one past the global id of the last token, for a shard padded with weight rows
            beyond the vocabulary; None takes every row.
        partial: return the shard's state for `combine_partials` instead of a result.

    Returns:
        token (N,) int64 and confidence (N,) float32; with `partial` a state (6, N) float32:
        maximum, total, best score, logit, extra and global token id (`row_state`). Logits are
        accumulated and scored in float32 by the kernel, and rounded to the dtype of `hidden`
        before they are scored by the definition, which is `F.linear`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device, stride or value.
    """
    op = "lm_head_confidence"
    check_tensor(op, "hidden", hidden, dtype=FLOATS, shape=("N", "E"), unit_stride=True)
    rows, E = hidden.shape
    dtype, device = hidden.dtype, hidden.device
    check_tensor(op, "weight", weight, dtype=dtype, shape=("V", E), device=device, unit_stride=True)
    if bias is not None:
        shape = weight.shape[:1]
        check_tensor(op, "bias", bias, dtype=dtype, shape=shape, device=device, contiguous=True)
    V = len(weight) if vocab_end is None else vocab_end - vocab_start
    if not 1 <= V <= len(weight):
        raise ValueError(
            f"{op}: vocab_end={vocab_end} with vocab_start={vocab_start}: accepted are "
            f"{vocab_start + 1} to {vocab_start + len(weight)}"
        )
    if vocab_start < 0 or (vocab_start > 0 and not partial):
        raise ValueError(f"{op}: vocab_start={vocab_start}: accepted is 0, or more with partial")
    # A shard need not hold every banned token, nor any allowed one.
    own = [b - vocab_start for b in banned if not partial or 0 <= b - vocab_start < V]
    check_scoring(
        op, (rows,), V, device, eligible, () if partial else own,
        temperature, seed, noise_ids, confidence,
    )  # fmt: skip
    weight = weight[:V]
    bias = None if bias is None else bias[:V]
    scoring = (eligible, own, temperature, seed, noise_ids, confidence)
    if rows == 0:
        empty = hidden.new_empty((PLANES, 0), dtype=torch.float32)
        return empty if partial else (empty[0].long(), empty[0])
    if partial:
        return _lm_head_partial_op(hidden, weight, bias, *scoring, vocab_start)
    if takes_definition(hidden, weight):
        return lm_head_confidence_definition(hidden, weight, bias, *scoring)
    return _lm_head_confidence_op(hidden, weight, bias, *scoring)
