"""token_confidence: from logits to a proposed token and its confidence, in one pass.

LLaDA (arXiv 2502.09992) and Dream (arXiv 2508.15487) propose and score tokens like this: the token
is the argmax (or a Gumbel-max sample), and its confidence is its softmax probability, the margin
between the two best tokens, or the negative entropy.

Shapes: V vocabulary entries, N candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsb_kernels._check import FLOATS, check_tensor
from dsb_kernels._configs import Launch, architecture_of, configuration
from dsb_kernels._launch import wait_for_previous, wrap_triton
from dsb_kernels._op import jit, op, tl
from dsb_kernels.noise import gumbel, philox_words, sampling_scores
from dsb_kernels.score import (
    NO_TOKEN,
    PLANES,
    capped,
    check_scoring,
    confidence_of,
    exclude_tokens,
    exp_from,
    first_allowed,
    launch_combine,
    store_state,
    weigh,
)

# --- definition -------------------------------------------------------------------------------


def token_confidence_reference(
    logits: Tensor,
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
    """Propose a token for every candidate and say how confident the model is in it.

    Args:
        logits: (..., V) float32, float16 or bfloat16, last dimension of stride 1.
        eligible: (...) bool, contiguous. A candidate for which it is False is skipped, and gets
            token -1 and confidence -inf.
        banned: token ids that are never proposed. Their logits stay in the softmax.
        excluded: token ids whose logits count as -inf: they have no part in the softmax.
        excluding: (...) bool, contiguous, for which candidates they are excluded. None means for
            all.
        temperature: at 0 the token is the argmax (the lowest id among equals). Above 0 it is the
            argmax of logits / temperature + Gumbel noise, which is a sample from
            softmax(logits / temperature).
        seed: () int64, the key of the noise, or (...) with a key for each candidate, contiguous;
            needed when sampling.
        noise_ids: (...) int64, contiguous; needed when sampling. Candidates with different ids have
            independent noise.
        confidence: which confidence is computed from p, the softmax of the logits over all V tokens
            without temperature. "probability" is p[token]. "margin" is the difference between the
            two largest p of tokens that are not banned. "entropy" is the negative entropy, the sum
            of p log p (natural logarithm).

    Returns:
        token (...) int64 and confidence (...) float32. A candidate that has a NaN logit, or whose
        logits are all -inf, gets token -1 and confidence NaN. If n logits are +inf, each of them
        has probability 1 / n. Where every token that is not banned has the logit -inf, the lowest
        of them is proposed, with probability 0. It may be an excluded one; otherwise these are
        never proposed.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device, stride or value.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return score_in_place(
        logits.to(dtype, copy=True), eligible=eligible, banned=banned, excluded=excluded,
        excluding=excluding, temperature=temperature, seed=seed, noise_ids=noise_ids,
        confidence=confidence,
    )  # fmt: skip


def score_in_place(
    x: Tensor,
    *,
    eligible: Tensor | None,
    banned: Sequence[int],
    excluded: Sequence[int],
    excluding: Tensor | None,
    temperature: float,
    seed: Tensor | None,
    noise_ids: Tensor | None,
    confidence: str,
) -> tuple[Tensor, Tensor]:
    """What `token_confidence_reference` returns for the logits `x`, float32 or float64, which are
    overwritten: a copy of 32 x 32,000 logits takes a CPU up to 1 ms, most of it for new memory."""
    exclude_tokens(x, excluded, excluding)
    token = first_argmax(sampling_scores(x, temperature, seed, noise_ids), banned)
    # The largest finite number replaces +inf, for which softmax would give NaN.
    p = x.clamp_(max=torch.finfo(x.dtype).max).softmax(-1)
    c = confidence_of(p, token, banned, confidence)
    token = torch.where(c.isnan(), -1, token)
    if eligible is not None:
        token = torch.where(eligible, token, -1)
        c = torch.where(eligible, c, -torch.inf)
    return token, c


def first_argmax(x: Tensor, banned: Sequence[int] = ()) -> Tensor:
    """The argmax over the last dimension without the banned indices, the lowest index among equals.

    It looks at the views between banned indices. In each it first finds the best block of 256
    numbers, since a CPU compares many numbers at once for `amax` but one at a time for `argmax`.
    """
    size, best = 256, []
    for before, end in itertools.pairwise([-1, *sorted(set(banned)), x.shape[-1]]):
        first, blocks = before + 1, (end - before - 1) // size
        tail = first + blocks * size
        if blocks > 0:
            part = x[..., first:tail].unflatten(-1, (blocks, size))
            block = part.amax(-1).argmax(-1, keepdim=True)
            inside = part.take_along_dim(block[..., None], -2)[..., 0, :].argmax(-1, keepdim=True)
            best.append(first + block * size + inside)
        if tail < end:
            best.append(tail + x[..., tail:end].argmax(-1, keepdim=True))
    index = torch.cat(best, -1)
    value, which = x.gather(-1, index).max(-1, keepdim=True)
    nothing = value == -torch.inf
    return torch.where(nothing, first_allowed(banned), index.gather(-1, which))[..., 0]


# --- kernel -----------------------------------------------------------------------------------
# A tile is BLOCK_V consecutive logits of one candidate, which are read once. A program carries the
# candidate's state (see score.py) over SPLIT_BLOCKS tiles, which are its split, and writes the
# state at the end.


@jit
def by_thread(x, LANES: tl.constexpr):
    """Add `x` (BLOCK,) up to (LANES,), so that each thread adds the elements that it has loaded.

    Each of LANES threads loads 8 neighbouring elements of 16 bits at a time. Of 32-bit elements,
    two threads load 8 together.
    """
    return tl.sum(tl.sum(tl.reshape(x, (x.shape[0] // (LANES * 8), LANES, 8)), 2), 0)


@jit
def _score_tile(
    x, token, first, noise, temperature, excluding,
    maximum, total, score, index, logit, extra,
    BLOCK: tl.constexpr, BANNED: tl.constexpr, EXCLUDED: tl.constexpr, SAMPLE: tl.constexpr,
    CONFIDENCE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Extend a state by the logits `x` of tokens `first` to `first + BLOCK - 1`, listed in `token`.

    The sums (`total`, and `extra` for "entropy") have shape (LANES,): each thread has its own until
    the last tile is scored.
    """
    for i in tl.static_range(len(EXCLUDED)):
        if (EXCLUDED[i] >= first) & (EXCLUDED[i] < first + BLOCK):
            x = tl.where((token == EXCLUDED[i]) & excluding, -float("inf"), x)
    tile_maximum = tl.max(x, 0)
    m = tl.maximum(maximum, tile_maximum)
    distance, e = weigh(x, m)  # one exponential per element
    scale = exp_from(maximum, m)
    if CONFIDENCE == "entropy":
        moved = tl.where(scale > 0, scale * (extra + total * (maximum - m)), 0.0)
        extra = tl.where(maximum == m, extra, moved)  # maximum - m may be inf - inf
        # e is 0, or distance infinite, where their product has no value.
        extra += by_thread(tl.where((e > 0) & (distance < float("inf")), e * distance, 0.0), LANES)
    tile_total = by_thread(e, LANES)
    if m == float("inf"):
        tile_total = by_thread(capped(e), LANES)
    total = total * scale + tile_total
    maximum = m

    allowed = x
    tile_best = tile_maximum
    for i in tl.static_range(len(BANNED)):
        if (BANNED[i] >= first) & (BANNED[i] < first + BLOCK):
            allowed = tl.where(token == BANNED[i], -float("inf"), allowed)
            tile_best = tl.max(allowed, 0)

    if CONFIDENCE == "margin":  # noqa: SIM102 (a compile-time and a run-time condition)
        if tile_best > extra:
            best = tl.min(tl.where(allowed == tile_best, token, NO_TOKEN), 0)
            runner_up = tl.max(tl.where(token == best, -float("inf"), allowed), 0)
            extra = tl.maximum(tl.minimum(tile_best, logit), tl.maximum(runner_up, extra))
            logit = tl.maximum(logit, tile_best)
    if SAMPLE:
        noisy = allowed / temperature + noise
        tile_score = tl.max(noisy, 0)
        if tile_score > score:
            score = tile_score
            index = tl.min(tl.where(noisy == tile_score, token, NO_TOKEN), 0)
            if CONFIDENCE != "margin":
                logit = tl.max(tl.where(token == index, x, -float("inf")), 0)
    else:
        if tile_best > score:
            score = tile_best
            index = tl.min(tl.where(allowed == tile_best, token, NO_TOKEN), 0)
            if CONFIDENCE != "margin":
                logit = tile_best
    return maximum, total, score, index, logit, extra


@jit
def _score_block(
    own_ptr, V, block, key, id_low, id_high, temperature, excluding,
    maximum, total, score, index, logit, extra,
    BLOCK_V: tl.constexpr, BANNED: tl.constexpr, EXCLUDED: tl.constexpr, SAMPLE: tl.constexpr,
    CONFIDENCE: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load one tile and extend the state by it."""
    first = block * BLOCK_V
    token = first + tl.arange(0, BLOCK_V)
    if MASKED:
        x = tl.load(own_ptr + token, mask=token < V, other=-float("inf"))
    else:
        x = tl.load(own_ptr + token)
    noise = 0.0
    if SAMPLE:
        counter = block * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)
        noise = gumbel(philox_words(key, counter, id_low, id_high))
    return _score_tile(
        x.to(tl.float32), token, first, noise, temperature, excluding,
        maximum, total, score, index, logit, extra,
        BLOCK_V, BANNED, EXCLUDED, SAMPLE, CONFIDENCE, LANES,
    )  # fmt: skip


@jit
def _token_confidence_kernel(
    logits_ptr, eligible_ptr, excluding_ptr, seed_ptr, noise_ids_ptr, partial_ptr,
    stride_n, num_candidates, V, temperature,
    BLOCK_V: tl.constexpr, SPLIT_BLOCKS: tl.constexpr, BANNED: tl.constexpr, EXCLUDED: tl.constexpr,
    SAMPLE: tl.constexpr, CONFIDENCE: tl.constexpr, STAGES: tl.constexpr, LANES: tl.constexpr,
    SEEDS: tl.constexpr = False, PDL: tl.constexpr = False,
):  # fmt: skip
    """Program (candidate, split): the state of one candidate over one split of the vocabulary."""
    wait_for_previous(PDL)
    candidate = tl.program_id(0)
    split = tl.program_id(1)
    if eligible_ptr is not None:  # noqa: SIM102 (a compile-time and a run-time condition)
        if tl.load(eligible_ptr + candidate) == 0:
            return
    temperature = tl.cast(temperature, tl.float32)  # Inductor passes scalars as float64
    own_ptr = logits_ptr + candidate.to(tl.int64) * stride_n
    excluding = True
    if excluding_ptr is not None:
        excluding = tl.load(excluding_ptr + candidate) != 0
    key = 0
    id_low = 0
    id_high = 0
    if SAMPLE:
        key = tl.load(seed_ptr + candidate) if SEEDS else tl.load(seed_ptr)
        noise_id = tl.load(noise_ids_ptr + candidate)
        id_low = (noise_id & 0xFFFFFFFF).to(tl.uint32)
        id_high = ((noise_id >> 32) & 0xFFFFFFFF).to(tl.uint32)

    maximum = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    score = maximum
    index = tl.full((), NO_TOKEN, tl.int32)
    logit = maximum
    extra = total if CONFIDENCE == "entropy" else maximum
    begin = split * SPLIT_BLOCKS
    # Only the vocabulary's last block is masked: a mask may narrow the loads of all others.
    end = tl.minimum(begin + SPLIT_BLOCKS, V // BLOCK_V)
    for block in tl.range(begin, end, num_stages=STAGES):
        maximum, total, score, index, logit, extra = _score_block(
            own_ptr, V, block, key, id_low, id_high, temperature, excluding,
            maximum, total, score, index, logit, extra,
            BLOCK_V, BANNED, EXCLUDED, SAMPLE, CONFIDENCE, LANES, MASKED=False,
        )  # fmt: skip
    if ((begin + SPLIT_BLOCKS) * BLOCK_V > V) & (V % BLOCK_V > 0):
        maximum, total, score, index, logit, extra = _score_block(
            own_ptr, V, V // BLOCK_V, key, id_low, id_high, temperature, excluding,
            maximum, total, score, index, logit, extra,
            BLOCK_V, BANNED, EXCLUDED, SAMPLE, CONFIDENCE, LANES, MASKED=True,
        )  # fmt: skip

    state_ptr = partial_ptr + split.to(tl.int64) * num_candidates * 6 + candidate
    total = tl.sum(total, 0)
    if CONFIDENCE == "entropy":
        extra = tl.sum(extra, 0)
    store_state(state_ptr, num_candidates, None, maximum, total, score, logit, extra, index, 0)


# --- op ---------------------------------------------------------------------------------------


def launch_of(num_candidates: int, V: int, architecture: str, sample: bool) -> Launch:
    """The launch of the kernel, whose grid is (candidates, splits)."""
    config = configuration("token_confidence" + " sampled" * sample, num_candidates, architecture)
    block_v = config.blocks["BLOCK_V"]
    # Each of LANES threads takes 8 elements of a tile at a time.
    lanes = min(32 * config.num_warps, block_v // 8)
    blocks = {**config.blocks, "STAGES": config.num_stages, "LANES": lanes}
    grid = (num_candidates, -(-V // (block_v * blocks["SPLIT_BLOCKS"])))
    return Launch(blocks, config.num_warps, config.num_stages, grid=grid)


def _launch(a: Any) -> tuple[Tensor, Tensor]:
    shape, V = a.logits.shape[:-1], a.logits.shape[-1]
    logits = a.logits.reshape(-1, V)
    N, sample = len(logits), a.temperature > 0
    launch = launch_of(N, V, architecture_of(logits.device), sample)
    partials = logits.new_empty((launch.grid[1], PLANES, N), dtype=torch.float32)
    if N:
        wrap_triton(_token_confidence_kernel)[launch.grid](
            logits, a.eligible, a.excluding, a.seed, a.noise_ids, partials,
            logits.stride(0), N, V, a.temperature, BANNED=tuple(a.banned),
            EXCLUDED=tuple(a.excluded), SAMPLE=sample, CONFIDENCE=a.confidence,
            SEEDS=sample and a.seed.ndim > 0, **launch.options(),
        )  # fmt: skip
    token, c = launch_combine(partials, a.eligible, a.banned, a.confidence)
    return token.reshape(shape), c.reshape(shape)


def _check(a: Any) -> None:
    name = "token_confidence"
    check_tensor(name, "logits", a.logits, dtype=FLOATS, shape=("...", "V"), unit_stride=True)
    *shape, V = a.logits.shape
    check_scoring(name, a, shape, V, a.logits.device)


token_confidence = op(token_confidence_reference, launch=_launch, check=_check)
