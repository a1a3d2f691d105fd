"""Monte-Carlo log-likelihoods against exact enumeration; the greedy flag against a plain loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dsb_runtime.doors.likelihood import (
    Scored,
    are_greedy,
    draw_masks,
    log_likelihoods,
    masked_log_probs,
)
from tests import golden

ITEM = Scored((5, 6, 7, 8), (40, 300, 12))
LONGER = [Scored((9,), (40, 300, 12, 7, 8)), ITEM, Scored((3, 4, 5, 6, 7, 8, 10), (21,))]


def all_masks(length: int) -> Iterator[Tensor]:
    """Every mask with something masked."""
    for bits in itertools.product([False, True], repeat=length):
        if any(bits):
            yield torch.tensor(bits)


def plain_log_prob(family: str, item: Scored, mask: Tensor) -> float:
    """By transformers' own forward on one row, without padding."""
    model = golden.model(family)
    ids = torch.tensor(item.prompt + item.text)
    index = len(item.prompt) + mask.nonzero()[:, 0]
    noised = ids.clone()
    noised[index] = model.dsb.mask_id
    with torch.no_grad():
        logits = model(noised[None]).logits[0].double().log_softmax(-1)
    rows = index - 1 if family == "dream" else index
    return logits[rows, ids[index]].sum().item()


def enumerated(family: str, item: Scored) -> tuple[float, float]:
    """The estimate's exact expectation, and the standard deviation of one draw."""
    length = len(item.text)
    mean = square = 0.0
    for mask in all_masks(length):
        masked = int(mask.sum())
        probability = 1 / length / math.comb(length, masked)
        value = length / masked * plain_log_prob(family, item, mask)
        mean += probability * value
        square += probability * value**2
    return mean, math.sqrt(square - mean**2)


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "samples"), [(1, 16), (3, 64), (7, 5), (40, 128)])
def test_mask_sizes_are_spread_evenly(length, samples):
    masks, weights = draw_masks(length, samples, seed=3)
    sizes = masks.sum(-1)
    draws = weights * sizes * samples / length  # how often each mask was drawn
    assert torch.allclose(draws, draws.round()) and draws.sum().round() == samples
    assert len(masks.unique(dim=0)) == len(masks) <= samples
    for size in range(1, length + 1):
        share = draws[sizes == size].sum() / samples
        assert abs(share - 1 / length) <= 1 / samples + 1e-9


def test_masks_follow_from_the_seed():
    first, again, other = (draw_masks(9, 20, seed)[0].tolist() for seed in (5, 5, 6))
    assert first == again != other


# --- the estimate --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_masked_log_probs_are_transformers_own(family):
    pairs = [(item, mask) for item in LONGER for mask in all_masks(len(item.text))]
    items, masks = [item for item, _ in pairs], [mask for _, mask in pairs]
    actual = masked_log_probs(golden.model(family), items, masks)
    expected = [plain_log_prob(family, item, mask) for item, mask in pairs]
    assert actual == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_the_estimate_is_within_sampling_error_of_the_enumeration(family):
    """One estimate of many samples, and the average of many estimates of few."""
    exact, deviation = enumerated(family, ITEM)
    assert deviation > 0.1, "masks must matter, or this shows nothing"

    def estimates(seeds: int, samples: int) -> list[float]:
        return [
            log_likelihoods(golden.model(family), [ITEM], samples=samples, seed=s, batch_size=8)[0]
            for s in range(seeds)
        ]

    for actual in estimates(3, 4096):
        assert abs(actual - exact) < 4 * deviation / math.sqrt(4096)
    few = estimates(60, 2)
    assert abs(sum(few) / 60 - exact) < 4 * deviation / math.sqrt(60 * 2)
    assert len({round(value, 3) for value in few}) > 3


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_neither_batch_nor_order_changes_an_estimate(family, batch_size):
    model = golden.model(family)
    alone = [log_likelihoods(model, [item], samples=9)[0] for item in LONGER]
    done: dict[int, float] = {}
    actual = log_likelihoods(
        model, LONGER[::-1], samples=9, batch_size=batch_size, on_done=done.__setitem__
    )
    assert actual[::-1] == pytest.approx(alone, abs=1e-4)
    assert done == dict(enumerate(actual))


# --- the greedy flag -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_the_greedy_flag(family):
    prompts = [(5, 6, 7, 8), (9, 10), (30, 31, 32, 33, 34)]
    greedy = {prompt: golden.one_by_one(family, prompt, 4) for prompt in prompts}
    items = [Scored(p, tuple(g)) for p, g in greedy.items()]
    items += [Scored(p, (*g[:3], (g[3] + 1) % 500)) for p, g in greedy.items()]
    items.append(Scored(prompts[0], tuple(golden.one_by_one(family, prompts[0], 2))))
    actual = are_greedy(golden.model(family), items, batch_size=4)
    assert actual == [True] * 3 + [False] * 3 + [True]
