"""token_confidence: kernel against the definition in float64, definition against the textbook."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_kernels import _configs as tuning
from dsb_kernels import score
from dsb_kernels import token_confidence as module
from dsb_kernels.noise import gumbel_noise, philox4x32
from dsb_kernels.score import CONFIDENCES
from dsb_kernels.token_confidence import token_confidence, token_confidence_reference
from tests.mutations import DEVICE, kernels
from tests.op_contract import (
    INF,
    NAN,
    Arguments,
    OpCase,
    OpContract,
    Results,
    assert_scored,
    by_kernel,
    exactly,
    mistakes_of,
    small_tiles,
)  # fmt: skip

SMALL = tuning.Config({"BLOCK_V": 64, "SPLIT_BLOCKS": 2}, num_warps=4, num_stages=2)


# Blocks of 64 and splits of 128 logits, so that small shapes have many of both.
tiles = small_tiles(SMALL, "token_confidence", "token_confidence sampled")
ROWS = 21


def edge_rows(V: int, seed: int = 0) -> torch.Tensor:
    """One row per kind of trouble: (rows, V) float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, V, generator=generator) * 3
    x[1] = 2.5  # ties everywhere
    x[2, [0, V // 2, V - 1]] = 20.0  # ties in three places
    x[3, V - 1] = 30.0
    x[4, 0] = 30.0
    x[5, V // 2] = INF
    x[6, [0, V // 3, V - 1]] = INF
    x[7] = -INF
    x[8, V // 2 :] = -INF
    x[9, : V // 2] = -INF
    x[10, V // 2] = 1e30
    x[11, V - 1] = NAN
    x[12, 0], x[12, V - 1] = NAN, INF
    x[13] = NAN
    x[14] = x[14].round()  # many ties
    x[15] = INF
    x[16] = x[16] * 1e4
    x[17, 0], x[17, 1:] = 1.0, -INF
    x[18, min(127, V - 1)] = 25.0  # the last of its block
    x[19, V - 1], x[19, 0] = 19.0, 20.0  # the best two in different splits
    x[20], x[20, V - 1] = INF, NAN  # in one tile
    return x


def compare(logits: torch.Tensor, **options) -> None:
    arguments = {"logits": logits} | options
    check({n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()})


def check(arguments: Arguments) -> Results:
    """The kernel's tokens equal the definition's in float64, its confidence to 1e-5."""
    found = by_kernel(token_confidence, arguments)
    confidence = arguments.get("confidence", "probability")
    assert_scored(found, exactly(token_confidence, arguments), confidence)
    return found


def sampling(rows: int, temperature: float = 0.7) -> dict:
    return {
        "temperature": temperature,
        "seed": torch.tensor(0x1234_5678_9ABC_DEF0),
        "noise_ids": torch.arange(rows) * 7 + 2**33,
    }


@pytest.mark.parametrize(
    ("V", "sample"), [(3, False), (3, True), (65, False), (130, True), (300, False)]
)
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_kernel_matches_definition(V, confidence, sample):
    x = edge_rows(V)
    options = sampling(len(x)) if sample else {}
    compare(x, confidence=confidence, banned=(0, V // 2), **options)


@pytest.mark.parametrize("V", [64, 128, 129, 191, 256])
def test_vocabularies_that_end_at_and_beside_the_edge_of_a_block(V):
    compare(edge_rows(V))


@pytest.mark.parametrize(
    ("confidence", "sample"),
    [("probability", True), ("margin", False), ("entropy", False)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_logits_are_scored_in_float32(dtype, confidence, sample):
    x = edge_rows(150).clamp(-6e4, 6e4).to(dtype)
    compare(x, banned=(149,), confidence=confidence, **(sampling(len(x)) if sample else {}))


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("V", [1, 4096, 10007])
def test_production_configuration(production, V, sample):
    x = torch.randn(3, V, generator=torch.Generator().manual_seed(V)) * 4
    compare(x, **(sampling(3) if sample else {}))


@pytest.mark.slow
def test_production_configuration_of_many_rows(production):
    compare(torch.randn(129, 5000, generator=torch.Generator().manual_seed(5))[:, :4999])


def test_vocabulary_of_one():
    x = torch.tensor([[0.5], [INF], [-INF], [NAN]])
    for confidence in CONFIDENCES:
        compare(x, confidence=confidence)


def test_ineligible_rows_are_skipped():
    x = edge_rows(130)
    eligible = torch.arange(len(x)) % 3 != 0
    compare(x, eligible=eligible)
    with kernels():
        token, c = token_confidence(x.to(DEVICE), eligible=torch.zeros(ROWS, dtype=torch.bool))
    assert token.tolist() == [-1] * ROWS and c.tolist() == [-INF] * ROWS


def test_any_leading_shape_and_row_stride():
    x = torch.randn(2, 3, 140)[:, :, :129]
    eligible = torch.tensor([[True, False, True], [True, True, True]])
    compare(x, eligible=eligible, banned=(128,))
    compare(x[:, 1])
    compare(torch.randn(0, 70))
    compare(torch.randn(70))


VALUES = st.sampled_from([-INF, -1e30, -2.0, 0.0, 0.5, 0.5000001, 1.0, 80.0, 1e30, INF, NAN])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), V=st.integers(1, 200), rows=st.integers(1, 3), sample=st.booleans())
def test_property_kernel_equals_definition(data, V, rows, sample):
    x = torch.randn(rows, V, generator=torch.Generator().manual_seed(V * 7 + rows)) * 2
    position = st.tuples(st.integers(0, rows - 1), st.integers(0, V - 1))
    for (row, column), value in data.draw(st.dictionaries(position, VALUES, max_size=12)).items():
        x[row, column] = value
    banned = data.draw(st.lists(st.integers(0, V - 1), unique=True, max_size=min(4, V - 1)))
    compare(
        x,
        banned=tuple(banned),
        confidence=data.draw(st.sampled_from(CONFIDENCES)),
        eligible=torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))),
        **(sampling(rows, data.draw(st.sampled_from([0.3, 1.0, 5.0]))) if sample else {}),
    )


# --- the definition itself --------------------------------------------------------------------


def test_definition_is_the_textbook_one():
    x = torch.randn(7, 700, dtype=torch.float64) * 3
    p = x.softmax(-1)
    token, c = token_confidence_reference(x)
    assert torch.equal(token, x.argmax(-1))
    torch.testing.assert_close(c, p.amax(-1))
    c = token_confidence_reference(x, confidence="margin")[1]
    best = p.topk(2).values
    torch.testing.assert_close(c, best[:, 0] - best[:, 1])
    c = token_confidence_reference(x, confidence="entropy")[1]
    torch.testing.assert_close(c, (p * p.log()).sum(-1))


def test_banned_token_is_not_proposed_but_stays_in_the_softmax():
    x = torch.zeros(1, 600)
    x[0, 300], x[0, 400] = 5.0, 4.0
    token, c = token_confidence(x, banned=(300,))
    assert token.item() == 400
    torch.testing.assert_close(c, x.softmax(-1)[:, 400])


def test_limits_at_infinity_and_nan():
    token, c = token_confidence(edge_rows(300))
    assert (token[5].item(), c[5].item()) == (150, 1.0)
    assert (token[6].item(), c[6].item()) == (0, pytest.approx(1 / 3))
    for row in (7, 11, 12, 13):
        assert token[row].item() == -1 and c[row].isnan()
    token, c = token_confidence(torch.tensor([[INF, 1.0, 2.0]]), banned=(0,))
    assert (token.item(), c.item()) == (2, 0.0)


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


# --- registration, bad input, and deliberate mistakes ------------------------------------------

LOGITS = torch.zeros(2, 8)
SEEDS = {"seed": torch.tensor(1), "noise_ids": torch.zeros(2, dtype=torch.int64)}


def check_edges():
    compare(edge_rows(290), banned=(0, 127))
    compare(edge_rows(129), confidence="margin")
    compare(edge_rows(70), **sampling(ROWS))


def one_call() -> Arguments:
    x = torch.randn(4, 150, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    eligible = torch.tensor([True, False, True, True], device=DEVICE)
    return {"logits": x, "eligible": eligible, "banned": (3,)}


CASE = OpCase(
    op=token_confidence,
    module=module,
    helpers=score,
    own_compare=check,
    calls={"some_eligible": one_call},
    quick=("some_eligible",),
    strided=("logits",),
    good=lambda: {"logits": LOGITS.to(DEVICE)},
    refused=[
        ({"logits": LOGITS.double()}, "logits has dtype float64: accepted are float32, float16, b"),
        ({"logits": lambda t: t.tolist()}, "logits is list"),
        ({"logits": torch.tensor(1.0)}, r"logits has shape \(\): accepted is \(..., V\)"),
        ({"logits": torch.zeros(8, 2).T}, "stride 2 in its last dimension: accepted is 1"),
        ({"logits": torch.zeros(2, 0)}, "vocabulary of 0"),
        ({"confidence": "max"}, "confidence='max': accepted are 'probability', 'margin'"),
        ({"banned": (8,)}, "banned token 8: accepted are 0 to 7"),
        ({"banned": tuple(range(8))}, "leaves no token"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": NAN}, "temperature=nan"),
        ({"temperature": 1.0}, "seed=None"),
        ({"temperature": 1.0, **SEEDS, "seed": torch.ones(1)}, "seed has dtype float32"),
        ({"temperature": 1.0, **SEEDS, "noise_ids": torch.tensor(1)}, "noise_ids has sh"),
        ({"eligible": torch.ones(2)}, "eligible has dtype float32: accepted are bool"),
        ({"eligible": torch.ones(3) > 0}, r"eligible has shape \(3,\): accepted is \(2\)"),
        ({"eligible": torch.ones(2, device="meta") > 0}, "eligible is on meta"),
        ({"eligible": (torch.ones(4) > 0)[::2]}, r"eligible has strides \(2,\): accepted is"),
        ({"temperature": 1.0, **SEEDS, "noise_ids": torch.arange(4)[::2]}, "noise_ids has str"),
    ],
    mistakes=mistakes_of(
        (check_edges, "_token_confidence_kernel", [
            ("(V % BLOCK_V > 0)", "(V < 0)"),
            ("end = tl.minimum(begin + SPLIT_BLOCKS,",
             "end = tl.minimum(begin + SPLIT_BLOCKS - 1,"),
        ]),
        (check_edges, "_score_block", [
            ("mask=token < V", "mask=token < V - 1"),
            ("block * (BLOCK_V // 4)", "block * (BLOCK_V // 4) + 1"),
        ]),
        (check_edges, "_score_tile", [
            ("if tile_best > score:", "if tile_best >= score:"),
            ("index = tl.min(tl.where(allowed == tile_best, token, NO_TOKEN), 0)",
             "index = tl.max(tl.where(allowed == tile_best, token, -1), 0)"),
            ("(BANNED[i] < first + BLOCK)", "(BANNED[i] < first + BLOCK - 1)"),
            ("by_thread(capped(e), LANES)", "by_thread(e, LANES)"),
            ("total = total * scale", "total = total"),
        ]),
        (check_edges, "capped", [
            ("tl.minimum(e, 1.0, propagate_nan=tl.PropagateNan.ALL)", "tl.where(e < 1.0, e, 1.0)"),
        ]),
        (check_edges, "by_thread", [
            ("tl.reshape(x, ", "tl.reshape(x * (tl.arange(0, x.shape[0]) > 0), "),
        ]),
        (check_edges, "weigh", [
            ("tl.clamp(maximum, -3.4028234663852886e38, 3.4028234663852886e38)", "maximum"),
        ]),
        (check_edges, "combine_kernel", [
            ("tl.min(tl.where(scores == score, tokens, NO_TOKEN), 0)",
             "tl.max(tl.where(scores == score, tokens, -1), 0)"),
            ("ok = total > 0", "ok = total == total"),
            ("extra = tl.maximum(others,", "extra = tl.maximum(-float('inf'),"),
        ]),
    ),
)  # fmt: skip


class TestTokenConfidence(OpContract):
    case = CASE
