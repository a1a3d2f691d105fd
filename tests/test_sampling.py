"""Proposals against the families' published sampling, and against their distributions."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dsb_runtime as dsb
from dsb_kernels.noise import gumbel_noise, uniform
from dsb_kernels.score import CONFIDENCES
from dsb_runtime.engine.sampling import cut_top_k, order_confidence, propose, sample_nucleus
from dsb_runtime.families import LLADA, DiffusionInfo
from tests import golden

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10]])
SHAPE = {"gen_length": 16, "block_length": 8}
MASK = 15
CUTS = list(itertools.product([None, 0.1, 0.5, 0.9, 1.0], [None, 1, 3, 100]))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(rows: int, vocab: int = 16, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocab, generator=seeded(seed))


def noise(seed: int, rows: int) -> dict[str, Tensor]:
    """The seed and a noise id for each row."""
    return {"seed": torch.tensor(seed), "noise_ids": torch.arange(rows)}


def llada_proposals(
    logits: Tensor, temperature: float = 0.0, seed: int = 0, **values: Any
) -> tuple[Tensor, Tensor]:
    """What LLaDA proposes for logits (N, V): an LM head that gives them from unit vectors."""
    head = torch.nn.Linear(*logits.shape, bias=False)
    head.weight.data = logits.T.contiguous()
    info = DiffusionInfo(LLADA, logits.shape[1] - 1, ())
    rows = len(logits)
    config = settings(temperature=temperature, **values)
    eligible = torch.ones(rows, dtype=torch.bool)
    return propose(torch.eye(rows), head, eligible, config, info, **noise(seed, rows))


def settings(**values: Any) -> dsb.DecodingConfig:
    return dsb.DecodingConfig(**SHAPE, steps=4, **values)  # a rule that every confidence fits


# --- Dream, row by row as it is published: temper, cut to top_p, cut to top_k, softmax ----------


def published_row(
    logits: list[float], temperature: float, top_p: float | None, top_k: int | None
) -> list[float]:
    """The probabilities that Dream samples from for one candidate, in plain Python floats."""
    values = [x / temperature for x in logits] if temperature > 0 else list(logits)

    def softmax(row: list[float]) -> list[float]:
        exp = [math.exp(x - max(row)) for x in row]
        return [e / sum(exp) for e in exp]

    if top_p is not None and top_p < 1:
        probability, before, nucleus = softmax(values), 0.0, set()
        for index in sorted(range(len(values)), key=lambda i: -values[i]):
            if before > top_p and nucleus:  # the token that crosses top_p is kept, and the first
                break
            nucleus.add(index)
            before += probability[index]
        values = [x if i in nucleus else -math.inf for i, x in enumerate(values)]
    if top_k is not None:
        lowest = sorted(values, reverse=True)[min(top_k, len(values)) - 1]
        values = [x if x >= lowest else -math.inf for x in values]
    return softmax(values)


def published_confidence(kind: str, probability: list[float], chosen: int) -> float:
    """Dream's `confidence`, with its `margin_confidence` and its `neg_entropy` (eps = 1e-10)."""
    if kind == "margin":
        best, second = sorted(probability, reverse=True)[:2]
        return best - second
    if kind == "entropy":
        return sum(p * math.log(p + 1e-10) for p in probability)
    return probability[chosen]


@pytest.mark.parametrize(("top_p", "top_k"), CUTS)
@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", CONFIDENCES)
def test_dreams_confidence_is_of_the_distribution_after_temperature_and_cuts(
    kind, temperature, top_p, top_k
):
    """The mask token is the least likely here, so that it decides nothing."""
    logits = random_logits(40)
    logits[:, MASK] = -30.0
    config = settings(temperature=temperature, top_p=top_p, top_k=top_k, confidence=kind)
    token, confidence = sample_nucleus(logits.clone(), MASK, config, **noise(1, 40))
    for row, chosen, c in zip(logits.tolist(), token.tolist(), confidence, strict=True):
        expected = published_row(row, temperature, top_p, top_k)
        assert expected[chosen] > 0
        assert c.item() == pytest.approx(published_confidence(kind, expected, chosen), abs=1e-6)
        if temperature == 0:
            assert expected[chosen] == max(expected)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("kind", CONFIDENCES)
def test_lladas_confidence_is_of_the_distribution_before_temperature(kind, temperature):
    """The mask token is the most likely of every second candidate, where it is not proposed and no
    part of a margin."""
    logits = random_logits(40)
    logits[::2, MASK] = 9.0
    token, confidence = llada_proposals(logits, temperature, seed=2, confidence=kind)
    p = logits.double().softmax(-1)
    best = p[:, :MASK].topk(2).values
    expected = {
        "probability": p.gather(-1, token[:, None])[:, 0],
        "margin": best[:, 0] - best[:, 1],
        "entropy": (p * p.log()).sum(-1),
    }
    torch.testing.assert_close(confidence.double(), expected[kind], atol=1e-6, rtol=0)
    assert (token != MASK).all()
    if temperature == 0:
        assert torch.equal(token, p[:, :MASK].argmax(-1))


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_the_confidence_decides_which_candidate_is_committed(family):
    orders = []
    for kind in CONFIDENCES:
        shape = {"gen_length": 16, "block_length": 16, "steps": 16}
        out = dsb.generate(golden.model(family), PROMPT, cache="none", confidence=kind, **shape)
        orders.append(out.sequences[0, PROMPT.shape[1] :].tolist())
        assert orders[-1] == golden.one_by_one(family, PROMPT[0].tolist(), 16, kind)
    assert orders[1:] != orders[:1] * 2, "confidences must differ, or this shows nothing"


def test_a_drawn_order_is_that_of_drawing_one_after_another():
    """The first of four candidates, 20000 times, against the softmax of their confidences: a
    chi-square. The second among those that remain, by the same law."""
    config = settings(confidence_temperature=0.25)
    confidence = torch.tensor([0.9, 0.7, 0.4, 0.1])
    ids = torch.arange(20000)[:, None] * 4 + torch.arange(4)
    number = order_confidence(
        confidence.repeat(20000), config, torch.tensor(3), ids.flatten()
    ).view(-1, 4)
    p = (confidence.double() / 0.25).softmax(-1)
    order = number.argsort(-1, descending=True)
    first = order[:, 0].bincount(minlength=4)
    assert ((first - 20000 * p) ** 2 / (20000 * p)).sum() < 16.3  # three degrees, 0.1%
    second = order[order[:, 0] == 0, 1].bincount(minlength=4)[1:]
    expected = len(order[order[:, 0] == 0]) * p[1:] / p[1:].sum()
    assert ((second - expected) ** 2 / expected).sum() < 13.8  # two degrees


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize(
    "how", [{"confidence": "random"}, {"confidence_temperature": 0.5, "confidence": "entropy"}]
)
def test_a_drawn_order_is_the_generators_and_no_batchs(family, how):
    generate = functools.partial(
        dsb.generate, golden.model(family), gen_length=16, block_length=8, steps=8,
        stop_at_eos=False, **how,
    )  # fmt: skip
    order: list[list[int]] = []

    def draw(prompt: Tensor, seed: int) -> Tensor:
        order.append([])
        picked = lambda e: order[-1].extend(e.position[0][e.commit[0]].tolist())  # noqa: E731
        return generate(prompt, generator=seeded(seed), on_step=picked).sequences

    one, again, _ = (draw(PROMPT, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and order[0] == order[1] != order[2]
    assert torch.equal(draw(PROMPT.repeat(3, 1), 1)[0], one[0])


def test_nan_stays_nan_in_a_drawn_order():
    config = settings(confidence="random")
    number = order_confidence(torch.tensor([0.5, math.nan]), config, **noise(1, 2))
    assert number.isnan().tolist() == [False, True]


@pytest.mark.parametrize(("top_p", "top_k"), CUTS)
def test_dream_samples_what_the_cuts_leave(top_p, top_k):
    """20000 draws of one row against its probabilities without the mask token: chi-square."""
    row = random_logits(1, seed=3)
    config = settings(temperature=0.8, top_p=top_p, top_k=top_k)
    token, _ = sample_nucleus(row.repeat(20000, 1), MASK, config, **noise(2, 20000))
    probability = torch.tensor(published_row(row[0].tolist(), 0.8, top_p, top_k)).double()
    probability[MASK] = 0
    expected = probability / probability.sum() * len(token)
    counts = torch.bincount(token, minlength=len(expected))
    assert (counts[expected == 0] == 0).all()
    often = expected > 5
    chi = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    freedom = max(int(often.sum()) - 1, 1)
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


def test_top_k_keeps_ties_and_all_when_larger_than_the_vocabulary():
    row, counts = torch.tensor([[3.0, 1.0, 2.0, 2.0]]), {1: 1, 2: 3, 3: 3, 4: 4, 99: 4}
    lowest = torch.finfo(row.dtype).min
    assert {k: int((cut_top_k(row, k) > lowest).sum()) for k in counts} == counts


# --- LLaDA: Gumbel-max, the untempered probability as confidence --------------------------------


def test_llada_equals_the_published_formula_on_the_same_noise():
    """Published: argmax of exp(logits) / (-log u)^T in float64."""
    logits = random_logits(200, 64)
    token, _ = llada_proposals(logits, 0.7, seed=4)
    gumbel = gumbel_noise(torch.tensor(4), torch.arange(200), 0, 64, torch.float64)
    u = torch.exp(-torch.exp(-gumbel))  # whose -log(-log u) it is
    scores = logits.double().exp() / (-u.log()) ** 0.7
    scores[:, 63] = -1
    assert torch.equal(token, scores.argmax(-1))


def test_uniform_draws_are_uniform_and_not_the_gumbel_noise():
    ids = torch.arange(20000)
    draws = uniform(torch.tensor(3), ids)
    assert ((draws >= 0) & (draws < 1)).all() and len(draws.unique()) == 20000
    assert abs(torch.corrcoef(torch.stack([draws[1:], draws[:-1]]))[0, 1]) < 0.03
    other = gumbel_noise(torch.tensor(3), ids, 0, 1, torch.float64)[:, 0]
    assert abs(torch.corrcoef(torch.stack([draws, other]))[0, 1]) < 0.03


# --- both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 0.1}])
def test_cuts_that_leave_only_the_mask_token(cut, temperature):
    """The best other token is proposed, with no confidence: it is committed last."""
    logits = random_logits(10)
    logits[:5, MASK] = 20.0
    config = settings(temperature=temperature, **cut)
    token, confidence = sample_nucleus(logits.clone(), MASK, config, **noise(0, 10))
    assert torch.equal(token[:5], logits[:5, :MASK].argmax(-1))
    assert (confidence[:5] == 0).all() and (confidence[5:] > 0).all()
    assert (token != MASK).all()


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("own", [True, False])
def test_the_same_seed_gives_the_same_tokens(family, own):
    """The seed of a generator of one's own, or torch's where there is none."""
    model, runs = golden.model(family), []
    for seed in (1, 1, 2):
        torch.manual_seed(5 if own else seed)
        generator = seeded(seed) if own else None
        out = dsb.generate(model, PROMPT, temperature=3.0, generator=generator, **SHAPE)
        assert not (out.sequences == model.dsb.mask_id).any()
        runs.append(out.sequences.tolist())
    assert runs[0] == runs[1] != runs[2]
