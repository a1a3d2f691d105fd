"""A row's scoring state over part of the vocabulary, and the combine of such states.

Programs of `token_confidence` and `lm_head_confidence`, and ranks with a vocabulary shard, each
see part of a row's logits x. They leave its state, which one small kernel combines in a fixed
order. A state is six float32 planes:

    0 maximum  largest logit m
    1 total    sum of e^(x - m)
    2 score    best allowed score: logit, or logit / temperature + noise when sampling
    3 logit    "margin": the largest allowed logit; else the logit of `token`
    4 extra    "margin": the second largest allowed logit; "neg_entropy": sum of e^(x - m) (x - m);
               else unused
    5 token    lowest token with the best score; NO_TOKEN where every allowed logit is -inf

A NaN logit makes `total` NaN, whatever max does with NaN; `token` is then meaningless. "Allowed"
are the tokens that are not banned. `R` = parts, `N` = rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsb_kernels._check import check_choice, check_tensor
from dsb_kernels._op import jit, launch_options, register_op, tl, triton, use_triton, wrap_triton
from dsb_kernels.noise import gumbel_noise

CONFIDENCES = ("probability", "margin", "neg_entropy")
PLANES = 6
MAX_VOCABULARY = 1 << 24  # token ids are exact in float32 up to here
_NO_TOKEN = 1 << 30
NO_TOKEN = tl.constexpr(_NO_TOKEN) if tl else _NO_TOKEN

# --- definition -------------------------------------------------------------------------------


def state_definition(
    logits: Tensor,
    banned: Sequence[int],
    temperature: float,
    seed: Tensor | None,
    noise_ids: Tensor | None,
    confidence: str,
    vocab_start: int,
) -> Tensor:
    """The state of logits (N, V) whose first column is token `vocab_start`: (6, N) float32, or
    float64 for float64 logits. `banned` are columns."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    maximum = x.amax(-1)
    # Finite where nothing is, so that e is 0 there; +inf counts as equal to +inf.
    reference = maximum.clamp(min=torch.finfo(x.dtype).min)[:, None]
    distance = torch.where(x == reference, 0.0, x - reference)
    e = distance.exp()
    scores = allowed = x.clone()
    for b in banned:
        allowed[:, b] = -torch.inf
    if temperature > 0:
        noise = gumbel_noise(seed, noise_ids, vocab_start, vocab_start + x.shape[-1], x.dtype)
        scores = allowed / temperature + noise
    score, column = scores.max(-1)
    logit, extra = allowed.gather(-1, column[:, None])[:, 0], torch.zeros_like(maximum)
    if confidence == "margin":
        best = torch.nn.functional.pad(allowed, (0, 1), value=-torch.inf).topk(2, dim=-1).values
        logit, extra = best.unbind(-1)
    elif confidence == "neg_entropy":
        extra = torch.where(e > 0, e * distance, 0.0).sum(-1)
    token = torch.where(score == -torch.inf, _NO_TOKEN, column + vocab_start).to(x.dtype)
    return torch.stack([maximum, e.sum(-1), score, logit, extra, token])


def combine_partials_definition(
    partials: Tensor, eligible: Tensor | None, banned: Sequence[int], confidence: str
) -> tuple[Tensor, Tensor]:
    maxima, totals, scores, logits, extras, tokens = partials.unbind(1)
    maximum = maxima.amax(0)
    scale = torch.where(maxima == maximum, 1.0, (maxima - maximum).exp())
    total = (totals * scale).sum(0)
    best = scores.amax(0)
    token = torch.where(scores == best, tokens, _NO_TOKEN).amin(0)

    def probability(logit: Tensor) -> Tensor:
        return torch.where(logit == maximum, 1.0, (logit - maximum).exp()) / total

    if confidence == "probability":
        c = probability(torch.where(tokens == token, logits, -torch.inf).amax(0))
    elif confidence == "margin":
        top = torch.cat([logits, extras]).topk(2, dim=0).values
        c = probability(top[0]) - probability(top[1])
    else:
        moved = torch.where(scale > 0, scale * (extras + totals * (maxima - maximum)), 0.0)
        moved = torch.where(maxima == maximum, extras, moved)
        c = moved.sum(0) / total - total.log()
    token = torch.where(token == _NO_TOKEN, first_allowed(banned), token).long()
    ok = total > 0  # neither NaN nor nothing but -inf
    token, c = torch.where(ok, token, -1), torch.where(ok, c, torch.nan)
    if eligible is not None:
        token = torch.where(eligible, token, -1)
        c = torch.where(eligible, c, -torch.inf)
    return token, c


# --- kernel -----------------------------------------------------------------------------------


@jit
def exp_from(x, reference):
    """e^(x - reference), 1 where equal: so many +inf count as so many equal largest logits."""
    return tl.exp(tl.where(x == reference, 0.0, x - reference))


@jit
def weigh(x, maximum):
    """Distance of logits to their maximum, and e^distance, which is at most 1 (`capped`).

    Where the maximum is infinite, the reference is finite: then -inf weighs nothing, +inf is at a
    distance of +inf and weighs as much as an equal, once capped.
    """
    distance = x - tl.clamp(maximum, -3.4028234663852886e38, 3.4028234663852886e38)
    # exp2 flushes what is below 2^-126 to 0; exp would spend four instructions to keep it.
    return distance, tl.exp2(distance * 1.4426950408889634)


@jit
def capped(e):
    """Weights with e^(+inf) = 1; a NaN stays one."""
    return tl.minimum(e, 1.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def philox_words(key, counter, id_low, id_high):
    """Four random words for each of N consecutive counters, in token order: (4 N,) uint32."""
    counter = counter.to(tl.uint32)
    zero = tl.zeros_like(counter)
    w0, w1, w2, w3 = tl.philox(key, counter, zero + id_low, zero + id_high, zero)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@jit
def gumbel(word):
    """Standard Gumbel noise of a Philox word, as `philox.gumbel_noise`."""
    w = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # -log(1 - w), by its series where 1 - w would round away the fine steps of w.
    series = 1.0 / 4 + w * (1.0 / 5 + w * (1.0 / 6 + w * (1.0 / 7)))
    series = w * (1.0 + w * (1.0 / 2 + w * (1.0 / 3 + w * series)))
    return -tl.log(tl.where(w < 0.0625, series, -tl.log(1.0 - w)))


@jit
def store_state(
    state_ptr, stride_plane, mask, maximum, total, score, logit, extra, index, token_base
):
    """Write a state of one row (scalars) or of many; `token_base` makes local tokens global."""
    token = tl.where(index == NO_TOKEN, NO_TOKEN, index + token_base).to(tl.float32)
    tl.store(state_ptr, maximum, mask=mask)
    tl.store(state_ptr + stride_plane, total, mask=mask)
    tl.store(state_ptr + 2 * stride_plane, score, mask=mask)
    tl.store(state_ptr + 3 * stride_plane, logit, mask=mask)
    tl.store(state_ptr + 4 * stride_plane, extra, mask=mask)
    tl.store(state_ptr + 5 * stride_plane, token, mask=mask)


@jit
def combine_kernel(
    partial_ptr, eligible_ptr, token_ptr, confidence_ptr, state_ptr, rows, parts, first_allowed,
    PARTS: tl.constexpr, CONFIDENCE: tl.constexpr,
):  # fmt: skip
    """Program (row): the states of its parts, all at once in a fixed order, to one state (where
    `state_ptr` is given) or to token and confidence."""
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    if eligible_ptr is not None:  # the states of other rows were never written
        parts = tl.where(tl.load(eligible_ptr + row) != 0, parts, 0)
    valid = part < parts
    part_ptr = partial_ptr + part.to(tl.int64) * rows * 6 + row
    maxima = tl.load(part_ptr, mask=valid, other=-float("inf"))
    totals = tl.load(part_ptr + rows, mask=valid, other=0.0)
    scores = tl.load(part_ptr + 2 * rows, mask=valid, other=-float("inf"))
    logits = tl.load(part_ptr + 3 * rows, mask=valid, other=-float("inf"))
    tokens = tl.load(part_ptr + 5 * rows, mask=valid, other=NO_TOKEN).to(tl.int32)

    maximum = tl.max(maxima, 0)
    scale = exp_from(maxima, maximum)
    total = tl.sum(totals * scale, 0)
    score = tl.max(scores, 0)
    token = tl.min(tl.where(scores == score, tokens, NO_TOKEN), 0)
    if CONFIDENCE == "probability":
        logit = tl.max(tl.where(tokens == token, logits, -float("inf")), 0)
        extra = tl.zeros_like(logit)
        confidence = exp_from(logit, maximum) / total
    elif CONFIDENCE == "margin":
        extras = tl.load(part_ptr + 4 * rows, mask=valid, other=-float("inf"))
        logit = tl.max(logits, 0)
        owner = tl.min(tl.where(logits == logit, part, PARTS), 0)
        others = tl.max(tl.where(part == owner, -float("inf"), logits), 0)
        extra = tl.maximum(others, tl.max(extras, 0))
        confidence = (exp_from(logit, maximum) - exp_from(extra, maximum)) / total
    else:
        extras = tl.load(part_ptr + 4 * rows, mask=valid, other=0.0)
        moved = tl.where(scale > 0, scale * (extras + totals * (maxima - maximum)), 0.0)
        extra = tl.sum(tl.where(maxima == maximum, extras, moved), 0)
        logit = tl.max(tl.where(tokens == token, logits, -float("inf")), 0)
        confidence = extra / total - tl.log(total)

    if state_ptr is not None:
        store_state(state_ptr + row, rows, None, maximum, total, score, logit, extra, token, 0)
    else:
        ok = total > 0  # false for NaN, and for nothing but -inf
        token = tl.where(token == NO_TOKEN, first_allowed, token)
        token = tl.where(ok, token, -1)
        confidence = tl.where(ok, confidence, float("nan"))
        if eligible_ptr is not None:
            confidence = tl.where(tl.load(eligible_ptr + row) != 0, confidence, -float("inf"))
        tl.store(token_ptr + row, token.to(tl.int64))
        tl.store(confidence_ptr + row, confidence)


# --- op ---------------------------------------------------------------------------------------


def first_allowed(banned: Sequence[int]) -> int:
    """The lowest token that is not banned."""
    return next(v for v in range(len(banned) + 1) if v not in banned)


@register_op("combine_partials")
def _combine_partials_op(
    partials: Tensor, eligible: Tensor | None, banned: list[int], confidence: str
) -> tuple[Tensor, Tensor]:
    if not use_triton(partials):
        return combine_partials_definition(partials, eligible, banned, confidence)
    parts, _, rows = partials.shape
    token = partials.new_empty(rows, dtype=torch.int64)
    c = partials.new_empty(rows)
    if rows:
        wrap_triton(combine_kernel)[(rows,)](
            partials, eligible, token, c, None, rows, parts, first_allowed(banned),
            PARTS=triton.next_power_of_2(parts), CONFIDENCE=confidence,
            **launch_options(combine_warps(parts), 1),
        )  # fmt: skip
    return token, c


def combine_warps(parts: int) -> int:
    return 1 if parts <= 64 else 4


def combine_partials(
    partials: Tensor,
    *,
    eligible: Tensor | None = None,
    banned: Sequence[int] = (),
    confidence: str = "probability",
) -> tuple[Tensor, Tensor]:
    """Token and confidence of rows whose vocabulary is sharded over ranks.

    Args:
        partials: (R, 6, N) float32, contiguous: what `lm_head_confidence(partial=True)` returned
            on each rank, gathered in any order (token ids are global).
        eligible, banned, confidence: as given to it, `banned` in global token ids.

    Returns:
        token (N,) int64 and confidence (N,) float32, as from `token_confidence`. Every rank
        computes the same from the same gathered tensor.
    """
    op = "combine_partials"
    shape = ("R", PLANES, "N")
    check_tensor(op, "partials", partials, dtype=torch.float32, shape=shape, contiguous=True)
    check_choice(op, "confidence", confidence, CONFIDENCES)
    if partials.shape[0] < 1:
        raise ValueError(f"{op}: partials of 0 ranks: accepted is at least 1")
    if eligible is not None:
        same = {"device": partials.device, "contiguous": True}
        check_tensor(op, "eligible", eligible, dtype=torch.bool, shape=partials.shape[2:], **same)
    return _combine_partials_op(partials, eligible, list(banned), confidence)


def check_scoring(
    op: str,
    rows: tuple[int, ...],
    V: int,
    device: torch.device,
    eligible: Tensor | None,
    banned: tuple[int, ...],
    temperature: float,
    seed: Tensor | None,
    noise_ids: Tensor | None,
    confidence: str,
) -> None:
    """What both scoring ops accept."""
    check_choice(op, "confidence", confidence, CONFIDENCES)
    if not 1 <= V <= MAX_VOCABULARY:
        raise ValueError(f"{op}: vocabulary of {V} tokens: accepted are 1 to {MAX_VOCABULARY}")
    for b in banned:
        if not 0 <= b < V:
            raise ValueError(f"{op}: banned token {b}: accepted are 0 to {V - 1}")
    if len(set(banned)) == V:
        raise ValueError(f"{op}: banned={banned!r} leaves no token of {V} to propose")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"{op}: temperature={temperature}: accepted is a finite number >= 0")
    same = {"shape": rows, "device": device, "contiguous": True}
    if eligible is not None:
        check_tensor(op, "eligible", eligible, dtype=torch.bool, **same)
    if temperature > 0:
        for name, value in (("seed", seed), ("noise_ids", noise_ids)):
            if value is None:
                raise ValueError(f"{op}: {name}=None: temperature > 0 needs an int64 tensor")
        check_tensor(op, "seed", seed, dtype=torch.int64, shape=(), device=device)
        check_tensor(op, "noise_ids", noise_ids, dtype=torch.int64, **same)
