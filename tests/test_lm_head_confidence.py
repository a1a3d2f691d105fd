"""lm_head_confidence: kernel against the definition in float64, whole and in vocabulary shards."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dsb_kernels import _configs as tuning
from dsb_kernels import lm_head as module
from dsb_kernels.lm_head import lm_head_confidence, lm_head_partial
from dsb_kernels.score import CONFIDENCES, combine_partials
from dsb_kernels.token_confidence import token_confidence_reference
from tests.mutations import DEVICE, kernels
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
    edge_rows,
    exactly,
    excluding,
    mistakes_of,
    sampling,
    small_tiles,
    strided,
)  # fmt: skip

SMALL = tuning.Config(
    {"BLOCK_V": 16, "BLOCK_N": 16, "BLOCK_K": 16, "COLUMNS": 8, "PROGRAMS": 3}, num_warps=4
)
# Tiles of 16 x 16 and three programs, so that small shapes have several of both.
tiles = small_tiles(SMALL, "lm_head_confidence", "lm_head_confidence sampled")


def inputs(
    rows: int, V: int, E: int, *, dtype: torch.dtype = torch.float32, seed: int = 0,
    bias: dict[int, float] | None = None, sample: bool = False, **options,
) -> Arguments:  # fmt: skip
    """Hidden states, weight and bias whose logits have a standard deviation of about 2; tokens of
    another bias; rows that are sampled from or not."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(rows, E, generator=g), torch.randn(V, E, generator=g)
    tensors = {"hidden": hidden * 2 / E**0.5, "weight": weight, "bias": torch.randn(V, generator=g)}
    for token, value in (bias or {}).items():
        tensors["bias"][token] = value
    arguments = {name: t.to(DEVICE, dtype) for name, t in tensors.items()} | options
    return arguments | (sampling(rows) if sample else {})


def finite_edges(V: int, **options) -> Arguments:
    """The product of hidden states and weight is exactly the logits."""
    logits = edge_rows(V, SMALL.blocks["BLOCK_V"]).to(DEVICE)
    logits = logits[logits.isfinite().all(-1)]
    hidden = torch.eye(len(logits), device=DEVICE)
    return {"hidden": hidden, "weight": logits.T.contiguous()} | options


def some_eligible(rows: int, V: int, E: int, **options) -> Arguments:
    eligible = torch.arange(rows, device=DEVICE) % 4 != 1
    return inputs(rows, V, E, eligible=eligible, **options)


def nan_in_a_row() -> Arguments:
    arguments = inputs(4, 50, 24)
    arguments["hidden"][2, 7] = NAN
    return arguments


def in_shards(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **options) -> Results:
    """The same through partial states of two shards of the vocabulary."""
    cut = -(-len(weight) // 3)
    partials = [
        lm_head_partial(
            hidden, weight[part], None if bias is None else bias[part], vocab_start=start, **options
        )
        for start, part in ((0, slice(cut)), (cut, slice(cut, None))) if start < len(weight)
    ]  # fmt: skip
    scoring = {n: x for n, x in options.items() if n in ("eligible", "banned", "confidence")}
    return combine_partials(torch.stack(partials), **scoring)


def compare(arguments: Arguments) -> Results:
    """Whole and in shards, by the kernels and, where it rounds no logits, by the definition."""
    with kernels():
        results = [lm_head_confidence(**arguments), in_shards(**arguments)]
    if arguments["hidden"].dtype == torch.float32:
        results.append(in_shards(**arguments))
    expected = exactly(lm_head_confidence, arguments)
    for actual in results:
        assert_scored(actual, expected, arguments.get("confidence", "probability"))
    return results[0]


@st.composite
def any_inputs(draw: st.DrawFn) -> partial:
    rows, V, E = (draw(st.integers(1, n)) for n in (20, 80, 40))
    values = st.sampled_from([-INF, INF, 50.0, -1e30])
    banned = draw(st.lists(st.integers(0, V - 1), unique=True, max_size=min(3, V - 1)))
    options = {}
    if draw(st.booleans()):
        options = excluding(rows, *range(draw(st.integers(0, (V - 1) // 2))))
        banned = [token for token in banned if token > V // 2]
    arguments = inputs(
        rows, V, E, seed=draw(st.integers(0, 99)), sample=draw(st.booleans()), banned=tuple(banned),
        confidence=draw(st.sampled_from(CONFIDENCES)),
        bias=draw(st.dictionaries(st.integers(0, V - 1), values, max_size=3)), **options,
    )  # fmt: skip
    return partial(compare, arguments)


SPECIAL = [
    {5: INF}, {0: INF, 40: INF}, {5: -INF}, dict.fromkeys(range(70), -INF), {69: NAN},
    {0: NAN, 1: INF}, dict.fromkeys(range(10, 70), -INF), {3: INF, 60: -INF},
]  # fmt: skip
CASE = OpCase(
    op=lm_head_confidence,
    module=module,
    own_compare=compare,
    calls={
        **{f"{confidence}_{rows}_{sample}": partial(
               some_eligible, rows, V, E, sample=sample, confidence=confidence, banned=(0, 5))
           for rows, V, E in ((1, 16, 16), (17, 41, 20))
           for confidence in CONFIDENCES for sample in (False, True)},
        **{f"edges_{V}": partial(finite_edges, V, confidence=confidence, banned=(15,))
           for V, confidence in zip((16, 31, 70), CONFIDENCES, strict=True)},
        **{f"{len(bias)}_{next(iter(bias.items()))}_{confidence}": partial(
               inputs, 3, 70, 16, bias=bias, banned=(3,), confidence=confidence)
           for bias in SPECIAL for confidence in CONFIDENCES[:: 1 if len(bias) == 1 else 2]},
        "nan_in_a_row": nan_in_a_row,
        # Products of 16-bit numbers are exact in float32, in which the kernel's logits stay.
        **{f"{dtype}_{confidence}": partial(
               inputs, 12, 75, 40, dtype=dtype, banned=(5,), confidence=confidence,
               sample=confidence == "probability")
           for dtype in LOW_PRECISION for confidence in CONFIDENCES},
        **{f"excluded_{confidence}": partial(
               inputs, 19, 75, 20, banned=(3,), confidence=confidence,
               sample=confidence == "margin", **excluding(19, 15, 24, 25, 74))
           for confidence in CONFIDENCES},
        "excluded_for_all": partial(inputs, 3, 41, 16, excluded=(0, 40)),
        "nothing_allowed": partial(
            inputs, 3, 41, 16, bias=dict.fromkeys({*range(41)} - {7}, -INF), banned=(7,),
            excluded=(0,)),
        "edges": partial(finite_edges, 41, banned=(15,)),
        "margin": partial(inputs, 18, 53, 20, confidence="margin"),
        "sampled": partial(inputs, 5, 37, 16, sample=True),
        "own_seeds": lambda: inputs(19, 37, 16) | sampling(19, own=True),
        "infinities": partial(inputs, 3, 37, 16, bias={0: INF, 5: INF}, banned=(3,)),
        "quick": partial(inputs, 3, 50, 16, banned=(3,), confidence="margin"),
    },
    quick=("quick",),
    any_check=any_inputs(),
    examples=(0, 15),
    same_examples=True,
    strided=("hidden", "weight"),
    good=partial(some_eligible, 2, 8, 4, sample=True, **excluding(2, 3)),
    refused=[
        ({"weight": torch.zeros(8, 5)}, r"weight has shape \(8, 5\): accepted is \(V, 4\)"),
        ({"weight": strided(0, 2**24 + 1)},
         "weight has stride 16777217 in dimension 0: accepted is at most 16777216"),
        ({"bias": torch.zeros(9)}, r"bias has shape \(9,\): accepted is \(8\)"),
        *SCORING_REFUSED,
    ],
    mistakes=mistakes_of(
        ("edges", "_lm_head_kernel", [
            ("tl.minimum(first + share, V)", "tl.minimum(first + share, V - 1)"),
            ("(token < last)[:, None]", "(token < last - 1)[:, None]"),
            ("inside = offset + k < E", "inside = offset + k < E - 1"),
            ("tl.cdiv(share, BLOCK_V)", "(share // BLOCK_V)"),
        ]),
        ("margin", "_lm_head_kernel", [("bias_ptr + token,", "bias_ptr + 0 * token,")]),
        ("edges", "_store_states", [
            ("token[:, None] < last", "token[:, None] <= last"),
            ("tl.min(tl.where(scores == score[None, :], token[:, None], NO_TOKEN)",
             "tl.max(tl.where(scores == score[None, :], token[:, None], -1)"),
            ("(BANNED[i] < first + BLOCK_V)", "(BANNED[i] < first + BLOCK_V - 1)"),
            ("score = tl.max(x, 0)\n        scores", "score = maximum\n        scores"),
        ]),
        ("excluded_probability", "_store_states", [
            ("(EXCLUDED[i] < first + BLOCK_V)", "(EXCLUDED[i] < first + BLOCK_V - 1)"),
            ("& excluding[None, :]", "& (excluding | True)[None, :]"),
            ("excluding_ptr + candidate,", "excluding_ptr + candidate - first_candidate,"),
        ]),
        ("margin", "_store_states", [
            ("first_candidate + BLOCK_N // 2", "first_candidate + BLOCK_N // 4"),
        ]),
        ("sampled", "_store_states", [("token + token_base, noise_id", "token, noise_id")]),
        ("own_seeds", "_store_states", [("seed_ptr + mine", "seed_ptr + 0 * mine")]),
        ("infinities", "_store_states", [("e = capped(e)", "e = e")]),
        ("sampled", "_noise", [("token % 4", "3 - token % 4")]),
        ("torch.bfloat16_margin", "_lm_head_kernel", [  # which float32 could not show
            ("tl.dot(w, h, x,", "tl.dot(w, h, x.to(w.dtype).to(tl.float32),"),
        ]),
    ),
)  # fmt: skip


class TestLMHeadConfidence(OpContract):
    case = CASE


@pytest.mark.parametrize("rows", [2, 40, pytest.param(70, marks=SLOW)])
def test_production_configuration(production, rows):
    compare(inputs(rows, 700, 72, banned=(699,)))


def test_a_padded_shard_and_a_shard_of_banned_tokens():
    hidden, weight, _ = inputs(5, 40, 24).values()
    banned = tuple(range(20, 30))
    padded = torch.cat([weight[30:], weight.new_full((6, 24), 9.0)])
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


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_opcheck_of_shards(backend, monkeypatch):
    monkeypatch.setenv("DSB_BACKEND", backend)
    hidden, weight, bias = inputs(3, 50, 16).values()
    scoring = (None, [3], [4], None, 0.0, None, None, "margin")
    shards = torch.stack([lm_head_partial(hidden, weight, confidence="margin")] * 2)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, args in (
        (torch.ops.dsb.lm_head_partial, (hidden, weight, bias, 0, None, *scoring)),
        (torch.ops.dsb.combine_partials, (shards, None, [], "margin")),
    ):
        torch.library.opcheck(op, args, test_utils=tests)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_start": -1}, "vocab_start=-1: accepted is at least 0"),
        ({"vocab_start": 1 << 24}, "vocabulary of 16777225 tokens: accepted are 1 to 16777216"),
        ({"vocab_end": 10}, "vocab_end=10 with vocab_start=0: accepted are 1 to 9"),
        ({"vocab_start": 9, "vocab_end": 9}, "vocab_end=9 with vocab_start=9: accepted are 10 to"),
        ({"temperature": 0.5}, "seed=None"),
        ({"weight": torch.tensor(1.0)}, r"weight has shape \(\): accepted is \(V, 4\)"),
    ],
)
def test_bad_shards(options, words):
    good = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(9, 4)}
    with pytest.raises(ValueError, match=f"lm_head_partial: .*{words}"):
        lm_head_partial(**good | options)


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
    with pytest.raises(ValueError, match=f"combine_partials: .*{words}"):
        combine_partials(partials, **options)
