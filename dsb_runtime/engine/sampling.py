"""From hidden states to proposed tokens: by the scoring op, or by Dream's cuts.

Sampling follows each family's published code. LLaDA adds Gumbel noise to the logits and takes the
confidence from the distribution without temperature; the scoring op does that. Dream divides the
logits by the temperature, cuts the distribution to top_p and top_k, samples, and takes the
confidence from the distribution after the cuts. A random number depends on a seed and on the
candidate's noise id (`dsb_kernels.noise`), never on earlier draws.

A banned token's logit counts as -inf, and so does that of an EOS at a position where none may stand
yet: a confidence is that of the distribution from which the token is proposed. (Otherwise a
candidate whose distribution is nearly all on a banned token would have the lowest entropy of all,
and be committed first.) The mask token alone keeps its share, as in the published method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dsb_kernels.lm_head import lm_head_confidence
from dsb_kernels.noise import uniform
from dsb_kernels.score import confidence_of, exclude_tokens
from dsb_kernels.token_confidence import first_argmax, token_confidence
from dsb_runtime.config import RANDOM, DecodingConfig
from dsb_runtime.engine.layers import is_plain_linear
from dsb_runtime.engine.parallel import is_sharded, score_sharded
from dsb_runtime.families import DiffusionInfo


def computed_confidence(config: DecodingConfig) -> str:
    """The confidence that is computed from the logits, whatever then ranks the candidates."""
    return "probability" if config.confidence == RANDOM else config.confidence


def cut_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability exceeds `top_p`. Others get the
    lowest finite logit. (N, V) -> (N, V)."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    before = pad(ordered.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
    drop = torch.zeros_like(before, dtype=torch.bool).scatter(1, index, before > top_p)
    return logits.masked_fill(drop, torch.finfo(logits.dtype).min)


def cut_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` most likely tokens, and any that are as likely as the last of them. Others
    get the lowest finite logit. (N, V) -> (N, V)."""
    kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, torch.finfo(logits.dtype).min)


def ban_of(config: DecodingConfig, vocab: int, like: Tensor) -> Tensor | None:
    """What is added to the logits, (V,) on the device of `like` and of its dtype: -inf for banned
    tokens, 0 for the others. The ops take it as a bias of the LM head, whatever the number of
    tokens. None means that no token is banned."""
    if not config.banned_tokens:
        return None
    ban = torch.zeros(vocab, dtype=like.dtype, device=like.device)
    ban[list(config.banned_tokens)] = -torch.inf
    return ban


def log_probability(scored: Tensor, lm_head: nn.Module | None, token: Tensor) -> Tensor:
    """The log-probability of each token under the model's own distribution, (N,) float32, whatever
    the temperature, the cuts and the banned tokens. The arguments are those of `propose`, and its
    tokens, which may be anything where nothing was eligible."""
    logits = (scored if lm_head is None else lm_head(scored)).float()
    token = token.clamp(0, logits.shape[-1] - 1)
    return logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)


def sample_nucleus(
    logits: Tensor,
    mask_id: int,
    config: DecodingConfig,
    seed: Tensor | None = None,
    noise_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Propose tokens as Dream does, with the confidence of the distribution after the cuts.
    (N, V) -> (N,), (N,).

    If the cuts leave only the mask token, the most likely other token is proposed, although its
    probability is 0 after the cuts.
    """
    logits = logits.float()
    token = first_argmax(logits, (mask_id,))[:, None]
    if config.temperature > 0:
        logits = logits / config.temperature
    if config.top_p is not None and config.top_p < 1:
        logits = cut_top_p(logits, config.top_p)
    if config.top_k is not None:
        logits = cut_top_k(logits, config.top_k)
    probability = logits.softmax(-1)
    if config.temperature > 0:
        allowed = probability.clone()
        allowed[:, mask_id] = 0
        barred = ~(allowed.sum(-1, keepdim=True) > 0)  # only the mask token is left, or NaN
        # This inverts the distribution function: it takes the first token whose sum exceeds `draw`.
        sums = allowed.masked_fill(barred, 1.0).double().cumsum(-1)
        assert seed is not None and noise_ids is not None
        draw = uniform(seed, noise_ids)[:, None] * sums[:, -1:]
        token = torch.where(barred, token, torch.searchsorted(sums, draw, right=True))
    token = token[:, 0]
    return token, confidence_of(probability, token, (mask_id,), computed_confidence(config))


def with_ban(x: Tensor, ban: Tensor | None) -> Tensor:
    """Logits (N, V), or a bias (V,) of the LM head, with the ban."""
    return x if ban is None else x + ban


ORDER_STREAM = 2  # of the random numbers that draw an order; the cuts draw tokens from stream 1


def order_confidence(
    confidence: Tensor, config: DecodingConfig, seed: Tensor | None, noise_ids: Tensor | None
) -> Tensor:
    """The number that ranks each candidate, (N,) float32: its confidence, unless an order is drawn.

    Candidates that are drawn one after another from the softmax of confidences / T (Dream's
    alg_temp) have the order of confidence / T plus Gumbel noise. A NaN stays NaN.
    """
    if config.confidence != RANDOM and config.confidence_temperature is None:
        return confidence
    assert seed is not None and noise_ids is not None
    number = uniform(seed, noise_ids, ORDER_STREAM) + 2.0**-54  # never 0
    if config.confidence_temperature is not None:
        number = confidence / config.confidence_temperature - (-number.log()).log()
    return torch.where(confidence.isnan(), confidence, number).float()


def propose(
    scored: Tensor,
    lm_head: nn.Module | None,
    eligible: Tensor,
    config: DecodingConfig,
    info: DiffusionInfo,
    seed: Tensor | None = None,
    noise_ids: Tensor | None = None,
    ban: Tensor | None = None,
    early: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The proposed token and its confidence for every candidate. It is never the mask token.

    Args:
        scored: (N, E), the candidates' hidden states after the final norm.
        lm_head: the model's output layer. It is called, unless it is a plain linear layer. None
            means that `scored` has logits, (N, V).
        eligible: (N,) bool. Results for which it is False are not used.
        config: how to sample, and which confidence to compute.
        seed, noise_ids: () int64 and (N,) int64, which determine what is drawn (`config.draws`).
        ban: `ban_of` the config, or None.
        early: (N,) bool, for which candidates no EOS is proposed. None means for none.

    Returns:
        (N,) int64 and (N,) float32, the number that ranks it. NaN logits give a NaN confidence.
    """
    ban = None if ban is None else ban.to(scored)  # which changes nothing but on several devices
    noisy = config.temperature > 0
    cuts = config.top_p is not None or config.top_k is not None
    how: dict[str, Any] = {
        "eligible": eligible, "banned": (info.mask_id,), "temperature": config.temperature,
        "seed": seed if noisy else None, "noise_ids": noise_ids if noisy else None,
        "confidence": computed_confidence(config),
        "excluded": () if early is None else info.eos_ids, "excluding": early,
    }  # fmt: skip
    if cuts or (noisy and info.family.nucleus):
        # A sharded head's own forward gathers the vocabulary, which the cuts need as a whole.
        logits = with_ban(scored if lm_head is None else lm_head(scored), ban)
        if early is not None:
            logits = logits.clone()
            exclude_tokens(logits, info.eos_ids, early)
        token, confidence = sample_nucleus(logits, info.mask_id, config, seed, noise_ids)
    elif lm_head is None:
        token, confidence = token_confidence(with_ban(scored, ban), **how)
    elif is_sharded(lm_head):
        token, confidence = score_sharded(scored, lm_head, ban=ban, **how)
    elif isinstance(lm_head, nn.Linear) and is_plain_linear(lm_head):
        bias = ban if lm_head.bias is None else with_ban(lm_head.bias, ban)
        token, confidence = lm_head_confidence(scored, lm_head.weight, bias, **how)
    else:
        token, confidence = token_confidence(with_ban(lm_head(scored), ban), **how)
    return token, order_confidence(confidence, config, seed, noise_ids)
