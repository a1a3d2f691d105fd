"""A row's scoring state over part of the vocabulary, shared by both scoring kernels.

Programs of `token_confidence` and `lm_head_confidence` each see part of a row's logits and leave
its state in a partial, which one small kernel combines in a fixed order:

    maximum, total  largest logit m and sum of e^(x - m)
    score, index    best allowed score (logit, or logit / temperature + noise), its lowest token
    logit           "margin": the largest allowed logit; else the logit of `index`
    extra           "margin": the second largest allowed logit; "neg_entropy": sum of
                    e^(x - m) (x - m); else unused

A NaN logit makes `total` NaN, whatever max does with NaN; `index` is then meaningless. "Allowed"
are the tokens that are not banned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsb_kernels.dispatch import check_choice, check_tensor, jit, tl

CONFIDENCES = ("probability", "margin", "neg_entropy")

NO_TOKEN = tl.constexpr(2**31 - 1) if tl else 2**31 - 1  # index where there is none
PLANES = 5  # float32 planes of a partial: maximum, total, score, logit, extra


@jit
def exp_from(x, reference):
    """e^(x - reference), 1 where equal: so many +inf count as so many equal largest logits."""
    return tl.exp(tl.where(x == reference, 0.0, x - reference))


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
def combine_kernel(
    partial_ptr, index_ptr, eligible_ptr, token_ptr, confidence_ptr,
    rows, splits, first_allowed, token_base,
    SPLITS: tl.constexpr, CONFIDENCE: tl.constexpr,
):  # fmt: skip
    """Program (row): its splits' states, all at once in a fixed order, to token and confidence."""
    row = tl.program_id(0)
    if eligible_ptr is not None:  # noqa: SIM102 (a compile-time and a run-time condition)
        if tl.load(eligible_ptr + row) == 0:
            tl.store(token_ptr + row, tl.full((), -1, tl.int64))
            tl.store(confidence_ptr + row, -float("inf"))
            return
    split = tl.arange(0, SPLITS)
    valid = split < splits
    at = split.to(tl.int64) * rows + row
    plane = tl.cast(splits, tl.int64) * rows  # an argument equal to 1 has no .to()
    maxima = tl.load(partial_ptr + at, mask=valid, other=-float("inf"))
    totals = tl.load(partial_ptr + plane + at, mask=valid, other=0.0)
    scores = tl.load(partial_ptr + 2 * plane + at, mask=valid, other=-float("inf"))
    logits = tl.load(partial_ptr + 3 * plane + at, mask=valid, other=-float("inf"))
    indices = tl.load(index_ptr + at, mask=valid, other=NO_TOKEN)

    maximum = tl.max(maxima, 0)
    scale = exp_from(maxima, maximum)
    total = tl.sum(totals * scale, 0)
    score = tl.max(scores, 0)
    index = tl.min(tl.where(scores == score, indices, NO_TOKEN), 0)
    if CONFIDENCE == "probability":
        logit = tl.max(tl.where(indices == index, logits, -float("inf")), 0)
        confidence = exp_from(logit, maximum) / total
    elif CONFIDENCE == "margin":
        extras = tl.load(partial_ptr + 4 * plane + at, mask=valid, other=-float("inf"))
        best = tl.max(logits, 0)
        owner = tl.min(tl.where(logits == best, split, SPLITS), 0)
        others = tl.max(tl.where(split == owner, -float("inf"), logits), 0)
        second = tl.maximum(others, tl.max(extras, 0))
        confidence = (exp_from(best, maximum) - exp_from(second, maximum)) / total
    else:
        extras = tl.load(partial_ptr + 4 * plane + at, mask=valid, other=0.0)
        moved = tl.where(scale > 0, scale * (extras + totals * (maxima - maximum)), 0.0)
        moved = tl.where(maxima == maximum, extras, moved)
        confidence = tl.sum(moved, 0) / total - tl.log(total)
    ok = total > 0  # false for NaN, and for nothing but -inf
    token = tl.where(index == NO_TOKEN, first_allowed, index).to(tl.int64) + token_base
    tl.store(token_ptr + row, tl.where(ok, token, -1))
    tl.store(confidence_ptr + row, tl.where(ok, confidence, float("nan")))


def first_allowed(banned: Sequence[int]) -> int:
    return next(v for v in range(len(banned) + 1) if v not in banned)


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
    if V < 1:
        raise ValueError(f"{op}: vocabulary of {V} tokens: accepted is at least 1")
    for b in banned:
        if not 0 <= b < V:
            raise ValueError(f"{op}: banned token {b}: accepted are 0 to {V - 1}")
    if len(set(banned)) == V:
        raise ValueError(f"{op}: banned={banned!r} leaves no token of {V} to propose")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"{op}: temperature={temperature}: accepted is a finite number >= 0")
    if eligible is not None:
        check_tensor(op, "eligible", eligible, dtype=torch.bool, shape=rows, device=device)
    if temperature > 0:
        for name, value in (("seed", seed), ("noise_ids", noise_ids)):
            if value is None:
                raise ValueError(f"{op}: {name}=None: temperature > 0 needs an int64 tensor")
        check_tensor(op, "seed", seed, dtype=torch.int64, shape=(), device=device)
        check_tensor(op, "noise_ids", noise_ids, dtype=torch.int64, shape=rows, device=device)
