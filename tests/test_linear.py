"""window_linear and linear_add_norm: the kernels against the definitions in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from dsb_kernels import _configs as tuning
from dsb_kernels import linear as module
from dsb_kernels.linear import linear_add_norm, linear_launch, split_launch, window_linear
from tests.mutations import DEVICE, kernels
from tests.op_contract import (
    INF,
    LOW,
    NAN,
    SLOW,
    Arguments,
    FloatContract,
    OpCase,
    mistakes_of,
    small_tiles,
)  # fmt: skip

TILE = {"BLOCK_V": 16, "BLOCK_N": 16, "BLOCK_K": 16}
SMALL = tuning.Config({**TILE, "PROGRAMS": 1}, num_warps=4, num_stages=2)
SMALL_SPLITS = tuning.Config({**TILE, "PROGRAMS": 6}, num_warps=4, num_stages=2)
tiles = small_tiles(SMALL, "window_linear", "window_linear gated")
tiles_of_splits = small_tiles(SMALL_SPLITS, "linear_add_norm")

SHAPES = [(N, 37, 41) for N in (1, 15, 16, 17, 33, 64, 100, 130)]
SHAPES += [(5, *x) for x in ((1, 1), (16, 16), (15, 48), (48, 15), (33, 130), (3, 64))]
SHAPES += [(0, 5, 4), (3, 0, 4), (3, 5, 0)]  # nothing of something
NAMED_SHAPES = {"x".join(map(str, shape)): shape for shape in SHAPES}
WAYS = {"plain": False, "gated": True}
REFUSED: list[tuple[Arguments, str]] = [  # by both, where x is (2, 4) and weight (9, 4)
    ({"x": torch.zeros(2, 5)}, r"weight has shape \(9, 4\): accepted is \(F, 5\)"),
    ({"weight": torch.zeros(9, 5)}, r"weight has shape \(9, 5\): accepted is \(F, 4\)"),
]


def spoiled(arguments: Arguments, name: str, where: Any, value: float) -> Arguments:
    arguments[name][where] = value
    return arguments


def one_token_for_all(arguments: Arguments) -> Arguments:
    """x has a stride of 0."""
    return arguments | {"x": arguments["x"][:1].expand(len(arguments["x"]), -1)}


# --- window_linear ----------------------------------------------------------------------------


def inputs(
    N: int, F: int, E: int, gated: bool, dtype: torch.dtype = torch.float32, *, seed: int = 0,
    bias: bool = True,
) -> Arguments:  # fmt: skip
    """Arguments whose products have a standard deviation of about 2."""
    g = torch.Generator().manual_seed(seed)
    features = F * (2 if gated else 1)
    x, weight = torch.randn(N, E, generator=g), torch.randn(features, E, generator=g)
    tensors = {
        "x": 2 / max(E, 1) ** 0.5 * x,
        "weight": weight,
        "bias": torch.randn(features, generator=g),
    }
    arguments = {name: t.to(DEVICE, dtype) for name, t in tensors.items()}
    return arguments | {"gated": gated} | ({} if bias else {"bias": None})


def check(**shape) -> None:
    compare(inputs(**shape))


def check_both() -> None:
    for gated in (False, True):
        compare(inputs(18, 21, 40, gated))


CASE = OpCase(
    op=window_linear,
    module=module,
    calls={
        **{f"{way}_{name}": partial(inputs, *shape, gated)
           for way, gated in WAYS.items() for name, shape in NAMED_SHAPES.items()},
        **{f"{way}_without_bias": partial(inputs, 17, 37, 41, gated, bias=False)
           for way, gated in WAYS.items()},
        **{f"{way}_{value}_in_weight": lambda gated=gated, value=value: spoiled(
               inputs(18, 21, 40, gated, bias=False), "weight", (5, 3), value)
           for way, gated in WAYS.items() for value in (INF, -INF, NAN, 1e18)},
        **{f"{way}_18x21x40": partial(inputs, 18, 21, 40, gated) for way, gated in WAYS.items()},
        "nan_in_a_token": lambda: spoiled(inputs(18, 21, 40, False), "x", (17, 3), NAN),
        "one_token_for_all": lambda: one_token_for_all(inputs(18, 21, 40, False)),
        "many_tokens": partial(inputs, 130, 21, 40, True),
    },
    quick=("plain_18x21x40", "gated_18x21x40", "plain_without_bias"),
    low_calls={
        f"{way}_{N}_tokens": partial(inputs, N, F, E, gated)
        for way, gated in WAYS.items() for N, F, E in ((20, 40, 200), (5, 48, 64))
    },
    strided=("x", "weight"),
    separate=("x",),
    good=partial(inputs, 2, 9, 4, False),
    refused=[
        ({"weight": torch.zeros(9, 4), "gated": True}, "weight has 9 rows: accepted with gated is"),
        ({"bias": torch.zeros(8)}, r"bias has shape \(8,\): accepted is \(9\)"),
        *REFUSED,
    ],
    any_check=st.builds(
        partial, st.just(check), N=st.integers(1, 40), F=st.integers(1, 50), E=st.integers(1, 70),
        gated=st.booleans(), bias=st.booleans(), seed=st.integers(0, 99),
    ),
    examples=(15, 0),
    same_examples=True,
    mistakes=mistakes_of(
        (check_both, "_window_linear_kernel", [
            ("(feature < F)[:, None], (token", "(feature < F - 1)[:, None], (token"),
            ("(token < num_tokens)[None, :]\n", "(token < num_tokens - 1)[None, :]\n"),
            ("k0 + k < E", "k0 + k < E - 1"),
            ("tl.cast(F, tl.int64)", "tl.cast(F - 1, tl.int64)"),
            ("tl.program_id(1) * BLOCK_N", "tl.program_id(1) * 0"),
            ("bias_ptr + F + feature", "bias_ptr + feature"),
            ("gate += tl.load(bias_ptr + feature,", "gate += tl.load(bias_ptr + 0 * feature,"),
            ("tl.exp(-gate)", "tl.exp(gate)"),
            ("up = tl.dot(w, x, up,", "up = tl.dot(w, x, gate,"),
            ("* stride_xn + k[:, None]", "* stride_xn + k[:, None] * (token < 17)[None, :]"),
        ]),
        ("many_tokens", "_silu_mul_kernel", [
            ("index // F * F + index", "index"), ("gate_ptrs + F", "gate_ptrs"),
            ("< numel", "< numel - 1"), ("tl.exp(-gate)", "tl.exp(gate)"),
        ]),
        ("nan_in_a_token", "_window_linear_kernel", [  # a token that spoils its tile
            ("if bias_ptr is not None:\n        gate",
             "gate += 0 * tl.sum(gate, 1)[:, None]\n    if bias_ptr is not None:\n        gate"),
        ]),
        ("gated_20_tokens", "_window_linear_kernel", [  # which float32 could not show
            ("gate = tl.dot(w, x, gate,", "gate = tl.dot(w, x, gate.to(w.dtype).to(tl.float32),"),
            ("up = tl.dot(w, x, up,", "up = tl.dot(w, x, up.to(w.dtype).to(tl.float32),"),
        ]),
    ),
)  # fmt: skip
compare = CASE.compare


class TestWindowLinear(FloatContract):
    case = CASE


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("N", [3, 20, 40, pytest.param(130, marks=SLOW)])
def test_production_configuration(production, N, gated):
    compare(inputs(N, 200, 136, gated, seed=1))
    compare(inputs(N, 130, 128, gated, seed=2))


def test_gates_that_saturate():
    gate = torch.linspace(-200, 200, 16, device=DEVICE).expand(3, 16)
    weight = torch.cat([gate, torch.ones_like(gate)])
    (y,) = compare({"x": torch.eye(16, device=DEVICE), "weight": weight, "gated": True})
    assert y[0].abs().max() == 0 and torch.equal(y[-1], gate[:, -1])


def test_tokens_get_the_same_whatever_their_number():
    x, weight = (inputs(50, 21, 40, False)[name] for name in ("x", "weight"))
    with kernels():
        y = window_linear(x, weight)
        for tokens in (1, 16, 17, 49):
            assert torch.equal(window_linear(x[:tokens], weight), y[:tokens])


MODELS = {"LLaDA-8B": (12288, 12288), "iLLaDA-8B": (6144, 12288), "Dream-7B": (4608, 18944)}
SHARED = 227 * 1024


@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("name", MODELS)
def test_programs_of_the_models_run_at_once_and_keep_the_memory_busy(production, name, tokens):
    for F, gated in zip(MODELS[name], (False, True), strict=True):
        launch = linear_launch(tokens, F, torch.bfloat16, "sm_90", gated=gated)
        tile = launch.blocks["BLOCK_V"] * (2 if gated else 1)
        shared = launch.num_stages * (tile + launch.blocks["BLOCK_N"]) * 64 * 2
        programs, (tiles, blocks) = launch.grid[0], launch.grid
        assert blocks == 1 and tiles * launch.blocks["BLOCK_V"] == F
        assert 72 <= programs <= 296 and shared <= SHARED
        late = programs - 132 * (228 * 1024 // (shared + 1024))
        assert late <= (16 if (name, tokens, gated) == ("Dream-7B", 128, True) else 0)
        assert programs * (launch.num_stages - 1) * tile * 64 * 2 >= 4.7e6


# --- linear_add_norm --------------------------------------------------------------------------


def norm_inputs(
    N: int, E: int, F: int, dtype: torch.dtype = torch.float32, *, seed: int = 0, eps: float = 1e-5
) -> Arguments:
    """Products and residuals of a standard deviation of about 2."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(N, F, generator=g), torch.randn(E, F, generator=g)
    residual, gain = 2 * torch.randn(N, E, generator=g), 1 + torch.randn(E, generator=g) / 4
    tensors = {
        "x": 2 / max(F, 1) ** 0.5 * x,
        "weight": weight,
        "residual": residual,
        "norm_weight": gain,
    }
    return {name: t.to(DEVICE, dtype) for name, t in tensors.items()} | {"eps": eps}


def norm_check(**shape) -> None:
    norm_compare(norm_inputs(**shape))


def check_roundings(dtype: torch.dtype = torch.bfloat16) -> None:
    """The norm is that of the rounded residual, as what follows the layer sees it."""
    for N, E, F in ((20, 40, 200), (5, 64, 48)):
        arguments = norm_inputs(N, E, F, dtype)
        out, residual = norm_compare(arguments)
        gain = arguments["norm_weight"].double()
        expected = torch.nn.functional.rms_norm(residual.double(), (E,), gain, 1e-5)
        half_ulp = torch.finfo(dtype).eps / 2
        assert ((out - expected).abs() <= 1.01 * half_ulp * expected.abs() + 1e-7).all()


NORM_CASE = OpCase(
    op=linear_add_norm,
    module=module,
    calls={
        **{name: partial(norm_inputs, *shape, eps=0.1) for name, shape in NAMED_SHAPES.items()},
        **{f"5x{E}x{F}": partial(norm_inputs, 5, E, F) for E, F in ((600, 20), (90, 400))},
        **{f"eps_{eps}": partial(norm_inputs, 4, 24, 40, eps=eps) for eps in (0.0, 1e-6, 3.0)},
        "ragged": partial(norm_inputs, 18, 21, 70, eps=0.1),
        "nan_in_a_token": lambda: spoiled(norm_inputs(18, 21, 40), "x", (17, 3), NAN),
        "one_token_for_all": lambda: one_token_for_all(norm_inputs(18, 21, 40)),
        "zeros_in_a_token": lambda: spoiled(
            spoiled(norm_inputs(4, 24, 40), "x", 2, 0), "residual", 2, 0),
    },
    quick=("ragged",),
    strided=("x", "weight", "residual"),
    low_calls={
        "20_tokens": partial(norm_inputs, 20, 40, 200),
        "5_tokens": partial(norm_inputs, 5, 64, 48),
    },
    separate=("x", "residual"),
    good=partial(norm_inputs, 2, 9, 4),
    refused=[
        ({"residual": torch.zeros(3, 9)}, r"residual has shape \(3, 9\): accepted is \(2, 9\)"),
        ({"norm_weight": torch.zeros(8)}, r"norm_weight has shape \(8,\): accepted is \(9\)"),
        *REFUSED,
    ],
    any_check=st.builds(
        partial, st.just(norm_check), N=st.integers(1, 40), E=st.integers(1, 70),
        F=st.integers(1, 150), eps=st.sampled_from([1e-6, 1e-5, 0.1]), seed=st.integers(0, 99),
    ),
    examples=(15, 0),
    same_examples=True,
    mistakes=mistakes_of(
        ("ragged", "_split_linear_kernel", [
            ("(feature < F)[:, None],", "(feature < F - 1)[:, None],"),
            ("(token < num_tokens)[None, :]\n", "(token < num_tokens - 1)[None, :]\n"),
            ("k0 + k < E", "k0 + k < E - 1"),
            ("first = split * share", "first = 0 * share"),
            ("tl.minimum(first + share, E)", "tl.minimum(first + share, 64)"),
            ("split.to(tl.int64) * num_tokens", "split.to(tl.int64) * (num_tokens - 1)"),
        ]),
        ("ragged", "_add_norm_kernel", [
            ("tl.static_range(SPLITS)", "tl.static_range(1, SPLITS)"),
            ("tl.store(residual_ptr, rounded, mask=inside)", "pass"),
            ("/ F + eps", "/ BLOCK_F + eps"),
            ("/ F + eps", "/ F"),
            ("load(norm_weight_ptr + feature", "load(norm_weight_ptr + 0 * feature"),
            ("inside = feature < F", "inside = feature < F - 1"),
        ]),
        ("nan_in_a_token", "_split_linear_kernel", [  # a token that spoils its tile
            ("partial_token = split.to(tl.int64)",
             "y += 0 * tl.sum(y, 1)[:, None]\n    partial_token = split.to(tl.int64)"),
        ]),
        (check_roundings, "_split_linear_kernel", [  # which float32 could not show
            ("tl.dot(w, x, y,", "tl.dot(w, x, y.to(w.dtype).to(tl.float32),"),
        ]),
        (check_roundings, "_add_norm_kernel", [
            ("y = rounded.to(tl.float32)", "y += 0"),
            ("(y * scale * gain)", "((y * scale).to(rounded.dtype) * gain)"),
        ]),
    ),
)  # fmt: skip
norm_compare = NORM_CASE.compare


class TestLinearAddNorm(FloatContract):
    case = NORM_CASE


@LOW
def test_norm_is_that_of_the_rounded_residual(dtype):
    check_roundings(dtype)


@pytest.mark.parametrize("N", [3, 20, 40, pytest.param(130, marks=SLOW)])
def test_norm_in_production_configuration(production, N):
    norm_compare(norm_inputs(N, 200, 136, seed=1))
    norm_compare(norm_inputs(N, 130, 512, seed=2))


NORM_MODELS = {  # hidden size, MLP
    "LLaDA-8B": (4096, 12288), "iLLaDA-8B": (4096, 12288), "Dream-7B": (3584, 18944),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("name", NORM_MODELS)
def test_splits_of_the_models_run_at_once_and_keep_the_memory_busy(production, name, tokens):
    E, mlp = NORM_MODELS[name]
    for F in (E, mlp):
        launch = split_launch(tokens, F, E, torch.bfloat16, "sm_90")
        (tiles, splits, blocks), tile = launch.grid, launch.blocks["BLOCK_V"]
        programs = tiles * splits
        assert blocks == 1 and tiles * tile == E and 100 <= programs <= 132
        assert splits * launch.share == F  # equal work
        assert programs * (launch.num_stages - 1) * tile * 64 * 2 >= 4.5e6
        must = 2 * (E * F + tokens * (F + 3 * E) + E)
        allowed = {16: 1.1, 32: 1.1, 64: 1.3, 128: 1.5}[tokens]  # from 64 on: of L2
        partials = 2 * 4 * splits * tokens * E
        assert 1 + partials / must <= allowed and partials / 2 < 10e6


def test_every_split_has_work():
    for F in range(1, 200):
        launch = split_launch(1, F, 16, torch.bfloat16, "sm_90")
        splits = launch.grid[1]
        assert (splits - 1) * launch.share < F <= splits * launch.share
        assert (
            launch.share % SMALL_SPLITS.blocks["BLOCK_K"] == 0
            and splits <= SMALL_SPLITS.blocks["PROGRAMS"]
        )
