"""lm_head_confidence: kernel against the definition in float64, whole and in vocabulary shards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_kernels import _configs as tuning
from dsb_kernels import lm_head as module
from dsb_kernels.lm_head import (
    lm_head_confidence,
    lm_head_confidence_reference,
    lm_head_partial,
)
from dsb_kernels.score import CONFIDENCES, combine_partials
from dsb_kernels.token_confidence import token_confidence_reference
from tests.mutations import DEVICE, kernels
from tests.op_contract import (
    INF,
    NAN,
    Arguments,
    OpCase,
    OpContract,
    Results,
    assert_scored,
    exactly,
    mistakes_of,
    small_tiles,
)  # fmt: skip

SMALL = tuning.Config(
    {"BLOCK_V": 16, "BLOCK_N": 16, "BLOCK_K": 16, "COLUMNS": 8, "PROGRAMS": 3}, num_warps=4
)


# Tiles of 16 x 16 and three programs, so that small shapes have several of both.
tiles = small_tiles(SMALL, "lm_head_confidence", "lm_head_confidence sampled")


def inputs(rows: int, V: int, E: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Hidden states, weight and bias whose logits have a standard deviation of about 2."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(rows, E, generator=g), torch.randn(V, E, generator=g)
    bias = torch.randn(V, generator=g)
    return (hidden * 2 / E**0.5).to(dtype), weight.to(dtype), bias.to(dtype)


def rows_of(logits: torch.Tensor):
    """Hidden states and weight whose product is exactly these (finite) logits."""
    return torch.eye(len(logits)), logits.T.contiguous()


def sampling(rows: int, temperature: float = 0.7) -> dict:
    ids = torch.arange(rows) * 3 + 2**35
    return {"temperature": temperature, "seed": torch.tensor(-7), "noise_ids": ids}


def in_shards(cuts, hidden, weight, bias, **options):
    """The same through partial states of the shards between `cuts`."""
    ends = zip([0, *cuts], [*cuts, len(weight)], strict=True)
    partials = [
        lm_head_partial(
            hidden, weight[a:b], None if bias is None else bias[a:b], vocab_start=a, **options
        )
        for a, b in ends
    ]  # fmt: skip
    names = ("eligible", "banned", "confidence")
    return combine_partials(
        torch.stack(partials), **{k: v for k, v in options.items() if k in names}
    )


def compare(hidden, weight, bias=None, cuts=(), **options) -> Results:
    """Tokens equal the definition's in float64, confidence to 1e-5 of its terms."""
    place = lambda t: t.to(DEVICE) if isinstance(t, torch.Tensor) else t  # noqa: E731
    hidden, weight, bias = place(hidden), place(weight), place(bias)
    options = {name: place(value) for name, value in options.items()}
    with kernels():
        results = [lm_head_confidence(hidden, weight, bias, **options)]
        if cuts:
            results.append(in_shards(cuts, hidden, weight, bias, **options))
    if cuts:
        results.append(in_shards(cuts, hidden, weight, bias, **options))
    arguments = {"hidden": hidden, "weight": weight, "bias": bias} | options
    expected = exactly(lm_head_confidence, arguments)
    for found in results:
        assert_scored(found, expected, options.get("confidence", "probability"))
    return results[0]


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize(("rows", "V", "E"), [(1, 16, 16), (17, 41, 20)])
def test_kernel_matches_definition(rows, V, E, confidence, sample):
    options = sampling(rows) if sample else {}
    eligible = torch.arange(rows) % 4 != 1
    compare(*inputs(rows, V, E), confidence=confidence, eligible=eligible, banned=(0, 5), **options)
    compare(*inputs(rows, V, E, seed=1)[:2], cuts=(3, 15), confidence=confidence, **options)


def finite_edges(V: int) -> torch.Tensor:
    x = torch.randn(16, V, generator=torch.Generator().manual_seed(3)).round(decimals=3)
    x[1] = 2.5  # ties everywhere
    x[2, [0, V // 2, V - 1]] = 20.0
    x[3, V - 1] = 30.0
    x[4, 0] = 30.0
    x[5] = x[5].round()
    x[6, V // 2] = 1e30
    x[7] = -1e30
    x[8, 15] = 25.0  # the last of its tile
    x[9, 0], x[9, V - 1] = 20.0, 19.0
    return x


@pytest.mark.parametrize(("V", "confidence"), [*zip([16, 31, 70], CONFIDENCES, strict=True)])
def test_finite_edges(V, confidence):
    compare(*rows_of(finite_edges(V)), cuts=(7,), confidence=confidence, banned=(15,))


@pytest.mark.parametrize(
    "places",
    [{5: INF}, {0: INF, 40: INF}, {5: -INF}, dict.fromkeys(range(70), -INF), {69: NAN},
     {0: NAN, 1: INF}, dict.fromkeys(range(10, 70), -INF), {3: INF, 60: -INF}],
    ids=lambda places: f"{len(places)}-{next(iter(places.items()))}",
)  # fmt: skip
def test_infinite_and_nan_logits(places):
    hidden, weight, bias = inputs(3, 70, 16)
    for token, value in places.items():
        bias[token] = value
    for confidence in CONFIDENCES[:: 1 if len(places) == 1 else 2]:
        compare(hidden, weight, bias, cuts=(20,), confidence=confidence, banned=(3,))


def test_a_nan_in_one_row_stays_there():
    hidden, weight, bias = inputs(4, 50, 24)
    hidden[2, 7] = NAN
    compare(hidden, weight, bias, cuts=(20,))


def check_low_precision(dtype, confidence, sample):
    """Whole and in shards, with ragged tiles of vocabulary, rows and hidden size."""
    rows, cuts = 12, (37,)
    tensors = [t.to(DEVICE) for t in inputs(rows, 75, 40, dtype)]
    options = {"banned": (5,), "confidence": confidence} | (sampling(rows) if sample else {})
    options |= {k: v.to(DEVICE) for k, v in options.items() if isinstance(v, torch.Tensor)}
    wide = [t.double() for t in tensors]
    expected, reference = lm_head_confidence_reference(*wide, **options)
    other, plain = lm_head_confidence_reference(*tensors, **options)
    same = other == expected  # rounded logits may propose another token, with its confidence
    assert same.sum() > rows / 2
    bound = 2 * (plain - reference)[same].abs().max()
    with kernels():
        results = [lm_head_confidence(*tensors, **options), in_shards(cuts, *tensors, **options)]
    for token, c in results:
        assert token.tolist() == expected.tolist()
        error = (c - reference).abs().max()
        assert error <= bound
        # The kernel's logits stay in float32, where products of 16-bit numbers are exact.
        assert error <= 1e-5


@pytest.mark.parametrize(
    ("confidence", "sample"),
    [("probability", True), ("margin", False), ("entropy", False)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_error_is_at_most_twice_the_plain_one(dtype, confidence, sample):
    check_low_precision(dtype, confidence, sample)


@pytest.mark.parametrize("rows", [2, 40, pytest.param(70, marks=pytest.mark.slow)])
def test_production_configuration(production, rows):
    compare(*inputs(rows, 700, 72), banned=(699,))


def test_a_padded_shard_and_a_shard_of_banned_tokens():
    hidden, weight, _ = inputs(5, 40, 24)
    banned = tuple(range(20, 30))
    padded = torch.cat([weight[30:], torch.full((6, 24), 9.0)])
    for backend in (kernels(), None):
        with backend or torch.no_grad():
            shards = [
                lm_head_partial(hidden, part, vocab_start=a, vocab_end=b, banned=banned)
                for a, b, part in ((0, 20, weight[:20]), (20, 30, weight[20:30]), (30, 40, padded))
            ]
            token, c = combine_partials(torch.stack(shards), banned=banned)
        logits = (hidden @ weight.T).double()
        expected, reference = token_confidence_reference(logits, banned=banned)
        assert token.tolist() == expected.tolist()
        torch.testing.assert_close(c.double(), reference, rtol=1e-5, atol=0)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 20), V=st.integers(1, 80), E=st.integers(1, 40), seed=st.integers(0, 99),
    confidence=st.sampled_from(CONFIDENCES), sample=st.booleans(), data=st.data(),
)  # fmt: skip
def test_property_kernel_equals_definition(rows, V, E, seed, confidence, sample, data):
    hidden, weight, bias = inputs(rows, V, E, seed=seed)
    for token in data.draw(st.lists(st.integers(0, V - 1), max_size=3)):
        bias[token] = data.draw(st.sampled_from([-INF, INF, 50.0, -1e30]))
    banned = data.draw(st.lists(st.integers(0, V - 1), unique=True, max_size=min(3, V - 1)))
    cuts = (data.draw(st.integers(1, V - 1)),) if V > 1 else ()
    compare(
        hidden, weight, bias, cuts=cuts, confidence=confidence, banned=tuple(banned),
        **(sampling(rows) if sample else {}),
    )  # fmt: skip


# --- registration and bad input ---------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_opcheck_of_shards(backend, monkeypatch):
    monkeypatch.setenv("DSB_BACKEND", backend)
    hidden, weight, bias = (t.to(DEVICE) for t in inputs(3, 50, 16))
    scoring = (None, [3], 0.0, None, None, "margin")
    shards = torch.stack([lm_head_partial(hidden, weight, confidence="margin")] * 2)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, args in (
        (torch.ops.dsb.lm_head_partial, (hidden, weight, bias, 0, None, *scoring)),
        (torch.ops.dsb.combine_partials, (shards, None, [], "margin")),
    ):
        torch.library.opcheck(op, args, test_utils=tests)


HIDDEN, WEIGHT = torch.zeros(2, 4), torch.zeros(9, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_start": -1}, "vocab_start=-1: accepted is at least 0"),
        ({"vocab_end": 10}, "vocab_end=10 with vocab_start=0: accepted are 1 to 9"),
        ({"vocab_start": 9, "vocab_end": 9}, "vocab_end=9 with vocab_start=9: accepted are 10 to"),
        ({"bias": torch.zeros(8)}, r"bias has shape \(8,\): accepted is \(9\)"),
        ({"temperature": 0.5}, "seed=None"),
    ],
)
def test_bad_shards(options, words):
    with pytest.raises((TypeError, ValueError), match=f"lm_head_partial: .*{words}"):
        lm_head_partial(HIDDEN, WEIGHT, **options)


@pytest.mark.parametrize(
    ("partials", "options", "words"),
    [
        (torch.zeros(2, 5, 3), {}, r"partials has shape \(2, 5, 3\): accepted is \(R, 6, N\)"),
        (torch.zeros(3, 6, 2).transpose(0, 2), {}, "accepted is a contiguous tensor"),
        (torch.zeros(0, 6, 2), {}, "partials of 0 processes"),
        (torch.zeros(2, 6, 3), {"eligible": torch.ones(2) > 0}, "eligible has shape"),
        (torch.zeros(2, 6, 3), {"eligible": (torch.ones(6) > 0)[::2]}, "eligible has strides"),
    ],
)
def test_bad_partials(partials, options, words):
    with pytest.raises((TypeError, ValueError), match=f"combine_partials: .*{words}"):
        combine_partials(partials, **options)


# --- the contract ------------------------------------------------------------------------------


def check_edges():
    compare(*rows_of(finite_edges(41)), banned=(15,))
    compare(*inputs(18, 53, 20), confidence="margin", cuts=(11,))
    compare(*inputs(5, 37, 16), cuts=(11,), **sampling(5))
    hidden, weight, bias = inputs(3, 37, 16)
    bias[0] = bias[5] = INF
    compare(hidden, weight, bias, banned=(3,))


def check_bfloat16():
    check_low_precision(torch.bfloat16, "probability", sample=False)


def one_call() -> Arguments:
    hidden, weight, bias = (t.to(DEVICE) for t in inputs(3, 50, 16))
    options = {"banned": (3,), "confidence": "margin"}
    return {"hidden": hidden, "weight": weight, "bias": bias} | options


CASE = OpCase(
    op=lm_head_confidence,
    module=module,
    own_compare=lambda arguments: compare(**arguments),
    calls={"margin": one_call},
    quick=("margin",),
    strided=("hidden", "weight"),
    good=lambda: {"hidden": HIDDEN.to(DEVICE), "weight": WEIGHT.to(DEVICE)},
    refused=[
        ({"hidden": HIDDEN.double()}, "hidden has dtype float64: accepted are float32"),
        ({"hidden": HIDDEN[0]}, r"hidden has shape \(4,\): accepted is \(N, E\)"),
        ({"weight": WEIGHT.half()}, "weight has dtype float16: accepted are float32"),
        ({"weight": torch.zeros(9, 5)}, r"weight has shape \(9, 5\): accepted is \(V, 4\)"),
        ({"weight": torch.zeros(4, 9).T}, "weight has stride 9 in its last dimension"),
        ({"weight": WEIGHT.to("meta")}, "weight is on meta: accepted is"),
        ({"bias": torch.zeros(8)}, r"bias has shape \(8,\): accepted is \(9\)"),
        ({"banned": (9,)}, "banned token 9: accepted are 0 to 8"),
        ({"confidence": "top"}, "confidence='top'"),
        ({"temperature": 0.5}, "seed=None"),
        ({"eligible": (torch.ones(4) > 0)[::2]}, "eligible has strides"),
    ],
    mistakes=mistakes_of(
        (check_edges, "_lm_head_kernel", [
            ("tl.minimum(first + share, V)", "tl.minimum(first + share, V - 1)"),
            ("(token < last)[:, None]", "(token < last - 1)[:, None]"),
            ("inside = offset + k < E", "inside = offset + k < E - 1"),
            ("tl.cdiv(share, BLOCK_V)", "(share // BLOCK_V)"),
            ("bias_ptr + token,", "bias_ptr + 0 * token,"),
        ]),
        (check_edges, "_store_states", [
            ("token[:, None] < last", "token[:, None] <= last"),
            ("first_candidate + BLOCK_N // 2", "first_candidate + BLOCK_N // 4"),
            ("tl.min(tl.where(scores == score[None, :], token[:, None], NO_TOKEN)",
             "tl.max(tl.where(scores == score[None, :], token[:, None], -1)"),
            ("(BANNED[i] < first + BLOCK_V)", "(BANNED[i] < first + BLOCK_V - 1)"),
            ("token + token_base, noise_id", "token, noise_id"),
            ("e = capped(e)", "e = e"),
            ("score = tl.max(x, 0)\n        scores", "score = maximum\n        scores"),
        ]),
        (check_edges, "_noise", [
            ("token % 4", "3 - token % 4"),
        ]),
        (check_bfloat16, "_lm_head_kernel", [  # which float32 could not show
            ("tl.dot(w, h, x,", "tl.dot(w, h, x.to(w.dtype).to(tl.float32),"),
        ]),
    ),
)  # fmt: skip


class TestLMHeadConfidence(OpContract):
    case = CASE
