"""The state of a candidate over part of the vocabulary, and how such states are combined.

A program of `token_confidence` or `lm_head_confidence`, or a process with a vocabulary shard, sees
only part of a candidate's logits x. It writes the candidate's state over that part, and one small
kernel combines the states of all parts in a fixed order. A token is allowed unless it is banned; an
excluded token's logit counts as -inf. A state is six float32 planes:

    0 maximum  the largest logit m
    1 total    the sum of e^(x - m)
    2 score    the best score of an allowed token: its logit, or, when sampling, its
               logit / temperature + noise
    3 logit    "margin": the largest allowed logit; otherwise the logit of `token`
    4 extra    "margin": the second largest allowed logit; "entropy": the sum of
               e^(x - m) (x - m); otherwise unused
    5 token    the lowest token with the best score; NO_TOKEN where every allowed logit is -inf

A NaN logit makes `total` NaN, whatever max does with NaN; `token` then means nothing.

Shapes: R parts of the vocabulary, N candidates, V vocabulary entries.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsb_kernels._check import check_choice, check_tensor
from dsb_kernels._launch import launch_options, wait_for_previous, wrap_triton
from dsb_kernels._op import constant, jit, op, tl, triton
from dsb_kernels.noise import sampling_scores

CONFIDENCES = ("probability", "margin", "entropy")
PLANES = 6
MAX_VOCABULARY = 1 << 24  # float32 represents every token id below this exactly
_NO_TOKEN = 1 << 30
NO_TOKEN = constant(_NO_TOKEN)

# --- definition -------------------------------------------------------------------------------


def confidence_of(p: Tensor, token: Tensor, banned: Sequence[int], confidence: str) -> Tensor:
    """The confidence (...) in `token` (...) under the distributions p (..., V)."""
    if confidence == "probability":
        return p.gather(-1, token[..., None])[..., 0]
    if confidence == "entropy":
        return p.xlogy(p).sum(-1)
    allowed = pad(p, (0, 1))  # a copy, which has at least two entries for `topk`
    for b in banned:
        allowed[..., b] = 0
    best, second = allowed.topk(2, dim=-1).values.unbind(-1)
    return best - second


def exclude_tokens(x: Tensor, excluded: Sequence[int], excluding: Tensor | None) -> None:
    """Make the columns `excluded` of logits x (..., V) -inf, in place, for the candidates that
    `excluding` (...) bool names; None names all."""
    for token in excluded:
        if excluding is None:
            x[..., token] = -torch.inf
        else:
            x[..., token].masked_fill_(excluding, -torch.inf)


def state_of(
    logits: Tensor,
    *,
    banned: Sequence[int],
    excluded: Sequence[int],
    excluding: Tensor | None,
    temperature: float,
    seed: Tensor | None,
    noise_ids: Tensor | None,
    confidence: str,
    vocab_start: int,
) -> Tensor:
    """The state (6, N) of logits (N, V), whose first column is token `vocab_start`. It is float32,
    or float64 for float64 logits. `banned` and `excluded` list columns of `logits`, which are
    overwritten."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    exclude_tokens(x, excluded, excluding)
    maximum = x.amax(-1)
    # If the maximum is -inf, the reference is finite, so that every e is 0. If it is +inf, so is
    # the reference: then e is 1 for logits of +inf and 0 for the others.
    reference = maximum.clamp(min=torch.finfo(x.dtype).min)[:, None]
    distance = torch.where(x == reference, 0.0, x - reference)
    e = distance.exp()
    allowed = x.clone()
    for b in banned:
        allowed[:, b] = -torch.inf
    score, column = sampling_scores(allowed, temperature, seed, noise_ids, vocab_start).max(-1)
    logit, extra = allowed.gather(-1, column[:, None])[:, 0], torch.zeros_like(maximum)
    if confidence == "margin":
        logit, extra = pad(allowed, (0, 1), value=-torch.inf).topk(2, dim=-1).values.unbind(-1)
    elif confidence == "entropy":
        extra = torch.where(e > 0, e * distance, 0.0).sum(-1)
    token = torch.where(score == -torch.inf, _NO_TOKEN, column + vocab_start).to(x.dtype)
    return torch.stack([maximum, e.sum(-1), score, logit, extra, token])


def combine_partials_reference(
    partials: Tensor,
    *,
    eligible: Tensor | None = None,
    banned: Sequence[int] = (),
    confidence: str = "probability",
) -> tuple[Tensor, Tensor]:
    """Token and confidence of candidates whose vocabulary is sharded over processes.

    Args:
        partials: (R, 6, N) float32, contiguous: the results of `lm_head_partial` of all processes
            in any order (their token ids are global).
        eligible, banned, confidence: the arguments of that call; `banned` are global token ids.

    Returns:
        token (N,) int64 and confidence (N,) float32, as from `token_confidence`. Processes that
        have the same partials compute the same result.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device, stride or value.
    """
    maxima, totals, scores, logits, extras, tokens = partials.unbind(1)
    maximum = maxima.amax(0)
    scale = torch.where(maxima == maximum, 1.0, (maxima - maximum).exp())
    total = (totals * scale).sum(0)
    token = torch.where(scores == scores.amax(0), tokens, _NO_TOKEN).amin(0)

    def probability(logit: Tensor) -> Tensor:
        return torch.where(logit == maximum, 1.0, (logit - maximum).exp()) / total

    if confidence == "probability":
        c = probability(torch.where(tokens == token, logits, -torch.inf).amax(0))
    elif confidence == "margin":
        best, second = torch.cat([logits, extras]).topk(2, dim=0).values
        c = probability(best) - probability(second)
    else:
        rescaled = torch.where(scale > 0, scale * (extras + totals * (maxima - maximum)), 0.0)
        rescaled = torch.where(maxima == maximum, extras, rescaled)
        c = rescaled.sum(0) / total - total.log()
    token = torch.where(token == _NO_TOKEN, first_allowed(banned), token).long()
    ok = total > 0  # false where a logit is NaN, and where every logit is -inf
    token, c = torch.where(ok, token, -1), torch.where(ok, c, torch.nan)
    if eligible is not None:
        token = torch.where(eligible, token, -1)
        c = torch.where(eligible, c, -torch.inf)
    return token, c


def first_allowed(banned: Sequence[int]) -> int:
    """The lowest token that is not banned."""
    return next(v for v in range(len(banned) + 1) if v not in banned)


# --- kernel -----------------------------------------------------------------------------------


@jit
def exp_from(x, reference):
    """e^(x - reference), which is 1 where both are equal, so that two logits of +inf count as two
    equal largest logits."""
    return tl.exp(tl.where(x == reference, 0.0, x - reference))


@jit
def weigh(x, maximum):
    """The distance of logits to their maximum, and e^distance, the weights of the logits.

    An infinite maximum is replaced by a finite number. Then a logit of -inf has weight 0. A logit
    of +inf has distance +inf and weight +inf, which `capped` makes 1, as for any largest logit.
    """
    distance = x - tl.clamp(maximum, -3.4028234663852886e38, 3.4028234663852886e38)
    # exp2 flushes what is below 2^-126 to 0; exp would spend four instructions to keep it.
    return distance, tl.exp2(distance * 1.4426950408889634)


@jit
def capped(e):
    """The weights, with 1 in place of +inf. A NaN stays NaN."""
    return tl.minimum(e, 1.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def store_state(
    state_ptr, stride_plane, mask, maximum, total, score, logit, extra, index, token_base
):
    """Write the state of one candidate (scalars) or of many (vectors). Adding `token_base` to an
    index gives the global token id."""
    token = tl.where(index == NO_TOKEN, NO_TOKEN, index + token_base).to(tl.float32)
    tl.store(state_ptr, maximum, mask=mask)
    tl.store(state_ptr + stride_plane, total, mask=mask)
    tl.store(state_ptr + 2 * stride_plane, score, mask=mask)
    tl.store(state_ptr + 3 * stride_plane, logit, mask=mask)
    tl.store(state_ptr + 4 * stride_plane, extra, mask=mask)
    tl.store(state_ptr + 5 * stride_plane, token, mask=mask)


@jit
def combine_kernel(
    partial_ptr, eligible_ptr, token_ptr, confidence_ptr, state_ptr,
    num_candidates, parts, first_allowed,
    PARTS: tl.constexpr, CONFIDENCE: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Program (candidate): combine the states of all its parts at once, in a fixed order, and write
    one state, or, if `state_ptr` is None, the token and its confidence."""
    wait_for_previous(PDL)
    candidate = tl.program_id(0)
    part = tl.arange(0, PARTS)
    if eligible_ptr is not None:  # the states of other candidates were never written
        parts = tl.where(tl.load(eligible_ptr + candidate) != 0, parts, 0)
    valid = part < parts
    part_ptr = partial_ptr + part.to(tl.int64) * num_candidates * 6 + candidate
    maxima = tl.load(part_ptr, mask=valid, other=-float("inf"))
    totals = tl.load(part_ptr + num_candidates, mask=valid, other=0.0)
    scores = tl.load(part_ptr + 2 * num_candidates, mask=valid, other=-float("inf"))
    logits = tl.load(part_ptr + 3 * num_candidates, mask=valid, other=-float("inf"))
    tokens = tl.load(part_ptr + 5 * num_candidates, mask=valid, other=NO_TOKEN).to(tl.int32)

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
        extras = tl.load(part_ptr + 4 * num_candidates, mask=valid, other=-float("inf"))
        logit = tl.max(logits, 0)
        owner = tl.min(tl.where(logits == logit, part, PARTS), 0)
        others = tl.max(tl.where(part == owner, -float("inf"), logits), 0)
        extra = tl.maximum(others, tl.max(extras, 0))
        confidence = (exp_from(logit, maximum) - exp_from(extra, maximum)) / total
    else:
        extras = tl.load(part_ptr + 4 * num_candidates, mask=valid, other=0.0)
        moved = tl.where(scale > 0, scale * (extras + totals * (maxima - maximum)), 0.0)
        extra = tl.sum(tl.where(maxima == maximum, extras, moved), 0)
        logit = tl.max(tl.where(tokens == token, logits, -float("inf")), 0)
        confidence = extra / total - tl.log(total)

    if state_ptr is not None:
        store_state(
            state_ptr + candidate, num_candidates, None,
            maximum, total, score, logit, extra, token, 0,
        )  # fmt: skip
    else:
        ok = total > 0  # false for NaN, and for nothing but -inf
        token = tl.where(token == NO_TOKEN, first_allowed, token)
        token = tl.where(ok, token, -1)
        confidence = tl.where(ok, confidence, float("nan"))
        if eligible_ptr is not None:
            eligible = tl.load(eligible_ptr + candidate) != 0
            confidence = tl.where(eligible, confidence, -float("inf"))
        tl.store(token_ptr + candidate, token.to(tl.int64))
        tl.store(confidence_ptr + candidate, confidence)


# --- op ---------------------------------------------------------------------------------------


def combine_warps(parts: int) -> int:
    return 1 if parts <= 64 else 4


def launch_combine(
    partials: Tensor, eligible: Tensor | None, banned: Sequence[int], confidence: str
) -> tuple[Tensor, Tensor]:
    """Combine partials (parts, 6, N) of the whole vocabulary into token and confidence."""
    N = partials.shape[2]
    token, c = partials.new_empty(N, dtype=torch.int64), partials.new_empty(N)
    _combine(partials, eligible, token, c, None, first_allowed(banned), confidence)
    return token, c


def launch_merge(partials: Tensor, eligible: Tensor | None, confidence: str) -> Tensor:
    """Combine partials (parts, 6, N) into one state (6, N)."""
    state = partials.new_empty((PLANES, partials.shape[2]))
    _combine(partials, eligible, None, None, state, 0, confidence)
    return state


def _combine(
    partials: Tensor, eligible: Tensor | None, token: Tensor | None, c: Tensor | None,
    state: Tensor | None, first: int, confidence: str,
) -> None:  # fmt: skip
    parts, _, N = partials.shape
    if N:
        wrap_triton(combine_kernel)[(N,)](
            partials, eligible, token, c, state, N, parts, first,
            PARTS=triton.next_power_of_2(parts), CONFIDENCE=confidence,
            **launch_options(combine_warps(parts), 1),
        )  # fmt: skip


def _launch(a: Any) -> tuple[Tensor, Tensor]:
    return launch_combine(a.partials, a.eligible, a.banned, a.confidence)


def _check(a: Any) -> None:
    check = functools.partial(check_tensor, "combine_partials", contiguous=True)
    check("partials", a.partials, dtype=torch.float32, shape=("R", PLANES, "N"))
    check_choice("combine_partials", "confidence", a.confidence, CONFIDENCES)
    if a.partials.shape[0] < 1:
        raise ValueError("combine_partials: partials of 0 processes: accepted is at least 1")
    if a.eligible is not None:
        N, device = a.partials.shape[2], a.partials.device
        check("eligible", a.eligible, dtype=torch.bool, shape=(N,), device=device)


combine_partials = op(combine_partials_reference, launch=_launch, check=_check)


def check_scoring(
    op: str, a: Any, shape: Sequence[int], V: int, device: torch.device, *, shard: bool = False
) -> None:
    """Check the arguments `a` that the scoring ops share, for candidates of this shape and token
    ids below V. Those of a vocabulary shard are global, and it may have no allowed token: its
    banned and excluded tokens are not checked."""
    check_choice(op, "confidence", a.confidence, CONFIDENCES)
    if not 1 <= V <= MAX_VOCABULARY:
        raise ValueError(f"{op}: vocabulary of {V} tokens: accepted are 1 to {MAX_VOCABULARY}")
    for name, tokens in (("banned", a.banned), ("excluded", a.excluded)) * (not shard):
        for token in tokens:
            if not 0 <= token < V:
                raise ValueError(f"{op}: {name} token {token}: accepted are 0 to {V - 1}")
    if not shard and len({*a.banned, *a.excluded}) == V:
        names = f"banned={a.banned!r}" + f" and excluded={a.excluded!r}" * bool(a.excluded)
        raise ValueError(f"{op}: {names}: no token of {V} is left to propose")
    if not 0 <= a.temperature < float("inf"):
        raise ValueError(f"{op}: temperature={a.temperature}: accepted is a finite number >= 0")
    check = functools.partial(check_tensor, op, device=device, contiguous=True)
    for name in ("eligible", "excluding"):
        if getattr(a, name) is not None:
            check(name, getattr(a, name), dtype=torch.bool, shape=shape)
    for name in ("seed", "noise_ids"):
        tensor = getattr(a, name)
        if tensor is not None:
            one = name == "seed" and isinstance(tensor, torch.Tensor) and tensor.ndim == 0
            check(name, tensor, dtype=torch.int64, shape=() if one else shape)
        elif a.temperature > 0:
            raise ValueError(f"{op}: {name}=None: temperature > 0 needs an int64 tensor")
