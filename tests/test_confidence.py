"""token_confidence: kernel against the definition in float64, definition against the textbook."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dsb_kernels import _configs as tuning
from dsb_kernels import score
from dsb_kernels import token_confidence as module
from dsb_kernels.noise import gumbel_noise, philox4x32
from dsb_kernels.score import CONFIDENCES
from dsb_kernels.token_confidence import token_confidence, token_confidence_reference
from tests.mutations import DEVICE
from tests.op_contract import (
    INF,
    LOW_PRECISION,
    NAN,
    SCORING_REFUSED,
    SLOW,
    Arguments,
    OpCase,
    OpContract,
    Results,
    assert_scored,
    by_kernel,
    edge_rows,
    exactly,
    excluding,
    mistakes_of,
    sampling,
    small_tiles,
)  # fmt: skip

SMALL = tuning.Config({"BLOCK_V": 64, "SPLIT_BLOCKS": 2}, num_warps=4, num_stages=2)
# Blocks of 64 and splits of 128 logits, so that small shapes have many of both.
tiles = small_tiles(SMALL, "token_confidence", "token_confidence sampled")


def compare(arguments: Arguments) -> Results:
    actual = by_kernel(token_confidence, arguments)
    confidence = arguments.get("confidence", "probability")
    assert_scored(actual, exactly(token_confidence, arguments), confidence)
    return actual


def of(logits: Tensor, sample: bool = False, **options) -> Arguments:
    """Arguments of a call, whose rows are sampled from or not."""
    arguments = {"logits": logits.to(DEVICE)} | options
    return arguments | (sampling(len(logits)) if sample else {})


def edges(V: int, sample: bool = False, dtype: torch.dtype = torch.float32, **options) -> Arguments:
    logits = edge_rows(V, 128)
    if dtype != torch.float32:
        logits = logits.clamp(-6e4, 6e4).to(dtype)
    return of(logits, sample, **options)


def normal(*shape: int, scale: float = 4.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])) * scale


def some_eligible(logits: Tensor, **options) -> Arguments:
    eligible = torch.arange(logits[..., 0].numel()).view(logits.shape[:-1]) % 3 != 1
    return of(logits, eligible=eligible.to(DEVICE), **options)


@st.composite
def any_rows(draw: st.DrawFn) -> partial:
    rows, V = draw(st.integers(1, 3)), draw(st.integers(1, 200))
    logits = normal(rows, V, scale=2)
    values = st.sampled_from([-INF, -1e30, -2.0, 0.0, 0.5, 0.5000001, 1.0, 80.0, 1e30, INF, NAN])
    position = st.tuples(st.integers(0, rows - 1), st.integers(0, V - 1))
    for (row, column), value in draw(st.dictionaries(position, values, max_size=12)).items():
        logits[row, column] = value
    options = sampling(rows, draw(st.sampled_from([0.3, 1.0, 5.0]))) if draw(st.booleans()) else {}
    eligible = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    banned = draw(st.lists(st.integers(0, V - 1), unique=True, max_size=min(4, V - 1)))
    if draw(st.booleans()):
        options |= excluding(rows, *range(draw(st.integers(0, (V - 1) // 2))))
        banned = [token for token in banned if token > V // 2]
    arguments = of(
        logits, eligible=torch.tensor(eligible, device=DEVICE), banned=tuple(banned),
        confidence=draw(st.sampled_from(CONFIDENCES)), **options,
    )  # fmt: skip
    return partial(compare, arguments)


NOTHING_ALLOWED = torch.tensor([[-INF, -INF, 5.0, -INF]])
SPLITS, EDGE, SAMPLED, OWN_SEEDS = "banned_290", "margin_129", "sampled_70", "own_seeds"
EXCLUDED = "excluded_entropy"
KERNEL = "_token_confidence_kernel"
CASE = OpCase(
    op=token_confidence,
    module=module,
    helpers=score,
    own_compare=compare,
    calls={
        **{f"{confidence}_{V}_{sample}": partial(
               edges, V, sample, confidence=confidence, banned=(0, V // 2))
           for V, sample in ((3, False), (3, True), (65, False), (130, True), (300, False))
           for confidence in CONFIDENCES},
        # Vocabularies that end at and beside the edge of a block.
        **{f"edge_{V}": partial(edges, V) for V in (64, 128, 129, 191, 256)},
        SPLITS: partial(edges, 290, banned=(0, 127)),
        EDGE: partial(edges, 129, confidence="margin"),
        SAMPLED: partial(edges, 70, True),
        **{f"excluded_{confidence}": partial(
               edges, 290, confidence == "margin", banned=(0,), confidence=confidence,
               **excluding(21, 127, 145, 289)) for confidence in CONFIDENCES},
        "excluded_for_all": partial(edges, 130, excluded=(0, 129)),
        "nothing_allowed": partial(of, NOTHING_ALLOWED, banned=(2,), excluded=(0,)),
        OWN_SEEDS: lambda: edges(130) | sampling(21, own=True),
        # 16-bit logits are scored in float32.
        **{f"{dtype}_{confidence}": partial(
               edges, 150, confidence == "probability", dtype, banned=(149,), confidence=confidence)
           for dtype in LOW_PRECISION for confidence in CONFIDENCES},
        **{f"one_token_{confidence}": partial(
               of, torch.tensor([[0.5], [INF], [-INF], [NAN]]), confidence=confidence)
           for confidence in CONFIDENCES},
        "some_eligible": partial(some_eligible, normal(4, 150), banned=(3,)),
        "none_eligible": lambda: of(
            edge_rows(130, 128), eligible=torch.zeros(21, dtype=torch.bool, device=DEVICE)),
        "two_dimensions": partial(some_eligible, normal(2, 3, 140)[:, :, :129], banned=(128,)),
        "rows_apart": partial(of, normal(2, 3, 140)[:, 1, :129]),
        "no_rows": partial(of, torch.zeros(0, 70)),
        "no_dimension": partial(of, normal(70)),
    },
    quick=("some_eligible",),
    any_check=any_rows(),
    examples=(40, 0),
    same_examples=True,
    strided=("logits",),
    good=partial(some_eligible, torch.zeros(2, 8), **sampling(2), **excluding(2, 3)),
    refused=[({"logits": torch.zeros(2, 0)}, "vocabulary of 0"), *SCORING_REFUSED],
    mistakes=mistakes_of(
        (SPLITS, KERNEL, [
            ("(V % BLOCK_V > 0)", "(V < 0)"),
            ("end = tl.minimum(begin + SPLIT_BLOCKS,",
             "end = tl.minimum(begin + SPLIT_BLOCKS - 1,"),
        ]),
        (SPLITS, "_score_block", [("mask=token < V", "mask=token < V - 1")]),
        (OWN_SEEDS, KERNEL, [("seed_ptr + candidate", "seed_ptr + 0 * candidate")]),
        (SAMPLED, "_score_block", [("block * (BLOCK_V // 4)", "block * (BLOCK_V // 4) + 1")]),
        (SPLITS, "_score_tile", [
            ("if tile_best > score:", "if tile_best >= score:"),
            ("index = tl.min(tl.where(allowed == tile_best, token, NO_TOKEN), 0)",
             "index = tl.max(tl.where(allowed == tile_best, token, -1), 0)"),
            ("(BANNED[i] < first + BLOCK)", "(BANNED[i] < first + BLOCK - 1)"),
            ("by_thread(capped(e), LANES)", "by_thread(e, LANES)"),
            ("total = total * scale", "total = total"),
        ]),
        (EXCLUDED, "_score_tile", [
            ("(EXCLUDED[i] < first + BLOCK)", "(EXCLUDED[i] < first + BLOCK - 1)"),
            ("(token == EXCLUDED[i]) & excluding", "(token == EXCLUDED[i])"),
            ("tile_maximum = tl.max(x, 0)", "tile_maximum = tl.max(x, 0) + 9 * len(EXCLUDED)"),
        ]),
        (EXCLUDED, KERNEL, [("excluding_ptr + candidate", "excluding_ptr + 0 * candidate")]),
        (SPLITS, "capped", [
            ("tl.minimum(e, 1.0, propagate_nan=tl.PropagateNan.ALL)", "tl.where(e < 1.0, e, 1.0)"),
        ]),
        (SPLITS, "by_thread", [
            ("tl.reshape(x, ", "tl.reshape(x * (tl.arange(0, x.shape[0]) > 0), "),
        ]),
        (SPLITS, "weigh", [
            ("tl.clamp(maximum, -3.4028234663852886e38, 3.4028234663852886e38)", "maximum"),
        ]),
        (SPLITS, "combine_kernel", [
            ("tl.min(tl.where(scores == score, tokens, NO_TOKEN), 0)",
             "tl.max(tl.where(scores == score, tokens, -1), 0)"),
            ("ok = total > 0", "ok = total == total"),
        ]),
        (EDGE, "combine_kernel", [
            ("extra = tl.maximum(others,", "extra = tl.maximum(-float('inf'),"),
        ]),
    ),
)  # fmt: skip


class TestTokenConfidence(OpContract):
    case = CASE


@pytest.mark.parametrize(
    ("rows", "V"), [(3, 1), (3, 4096), (3, 10007), pytest.param(129, 4999, marks=SLOW)]
)
@pytest.mark.parametrize("sample", [False, True])
def test_production_configuration(production, rows, V, sample):
    compare(of(normal(rows, V + 1)[:, :V], sample))


# --- the definition itself --------------------------------------------------------------------


def test_definition_is_the_textbook_one():
    x = torch.randn(7, 700, dtype=torch.float64) * 3
    p = x.softmax(-1)
    best = p.topk(2).values
    for confidence, expected in (
        ("probability", p.amax(-1)),
        ("margin", best[:, 0] - best[:, 1]),
        ("entropy", (p * p.log()).sum(-1)),
    ):
        token, c = token_confidence_reference(x, confidence=confidence)
        assert torch.equal(token, x.argmax(-1))
        torch.testing.assert_close(c, expected)


def test_banned_token_is_not_proposed_but_stays_in_the_softmax():
    x = torch.zeros(1, 600)
    x[0, 300], x[0, 400] = 5.0, 4.0
    token, c = token_confidence(x, banned=(300,))
    assert token.item() == 400
    torch.testing.assert_close(c, x.softmax(-1)[:, 400])


def test_excluded_token_is_out_of_the_distribution_of_those_that_exclude_it():
    x = torch.zeros(2, 600)
    x[:, 300], x[:, 400] = 5.0, 4.0
    token, c = token_confidence(x, excluded=(300,), excluding=torch.tensor([True, False]))
    assert token.tolist() == [400, 300]
    without = torch.cat([x[:, :300], x[:, 301:]], -1).softmax(-1)
    torch.testing.assert_close(c, torch.stack([without[0, 399], x[1].softmax(-1)[300]]))
    assert x[0, 300] == 5.0, "the caller's logits stay as they are"


def test_limits_at_infinity_and_nan_and_of_what_is_not_eligible():
    x = edge_rows(300, 128)
    token, c = token_confidence(x)
    assert (token[5].item(), c[5].item()) == (150, 1.0)
    assert (token[6].item(), c[6].item()) == (0, pytest.approx(1 / 3))
    for row in (7, 11, 12, 13):
        assert token[row].item() == -1 and c[row].isnan()
    token, c = token_confidence(torch.tensor([[INF, 1.0, 2.0]]), banned=(0,))
    assert (token.item(), c.item()) == (2, 0.0)
    token, c = token_confidence(NOTHING_ALLOWED, banned=(2,), excluded=(0,))
    assert (token.item(), c.item()) == (0, 0.0)
    token, c = token_confidence(x, eligible=torch.zeros(21, dtype=torch.bool))
    assert (token == -1).all() and (c == -INF).all()


def test_philox_known_answers():
    """The counters, keys and words are those of Random123's kat_vectors."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, words in (
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        result = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert tuple(int(w) for w in result) == words


def test_samples_follow_the_tempered_softmax():
    x = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    n, temperature = 20000, 0.8
    token, c = token_confidence(
        x.expand(n, -1), temperature=temperature, seed=torch.tensor(3), noise_ids=torch.arange(n)
    )
    share = token.bincount(minlength=5) / n
    torch.testing.assert_close(share, (x / temperature).softmax(-1), atol=0.012, rtol=0)
    torch.testing.assert_close(c, x.softmax(-1)[token])


def test_noise_depends_on_seed_row_and_token_alone():
    seed, ids = torch.tensor(-5), torch.tensor([4, 2**40, -1])
    noise = gumbel_noise(seed, ids, 0, 1000, torch.float64)
    part = gumbel_noise(seed, ids[1:], 333, 701, torch.float64)
    assert torch.equal(part, noise[1:, 333:701])
    assert noise[0].ne(noise[1]).all() and noise[1].ne(noise[2]).all()
    assert gumbel_noise(seed + 1, ids, 0, 1000, torch.float64).ne(noise).all()
