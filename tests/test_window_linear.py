"""window_linear: the kernel against the definition in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import strategies as st

from dsb_kernels import _configs as tuning
from dsb_kernels import linear as module
from dsb_kernels.linear import linear_launch, window_linear
from tests.mutations import DEVICE, kernels
from tests.op_contract import (
    LINEAR_REFUSED,
    NAN,
    SLOW,
    Arguments,
    FloatContract,
    OpCase,
    mistakes_of,
    small_tiles,
)  # fmt: skip

SMALL = tuning.Config(
    {"BLOCK_V": 16, "BLOCK_N": 16, "BLOCK_K": 16, "PROGRAMS": 1}, num_warps=4, num_stages=2
)
tiles = small_tiles(SMALL, "window_linear", "window_linear gated")


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


def with_value(gated: bool, name: str, where: tuple[int, int], value: float) -> Arguments:
    arguments = inputs(18, 21, 40, gated, bias=False)
    arguments[name][where] = value
    return arguments


def one_token_for_all() -> Arguments:
    """A stride of 0."""
    arguments = inputs(1, 21, 40, False)
    return arguments | {"x": arguments["x"].expand(18, -1)}


def check_both() -> None:
    for gated in (False, True):
        compare(inputs(18, 21, 40, gated))


SHAPES = [(N, 37, 41) for N in (1, 15, 16, 17, 33, 64, 100, 130)]
SHAPES += [(5, *x) for x in ((1, 1), (16, 16), (15, 48), (48, 15), (33, 130), (3, 64))]
SHAPES += [(0, 5, 4), (3, 0, 4), (3, 5, 0)]  # nothing of something
WAYS = {"plain": False, "gated": True}


CASE = OpCase(
    op=window_linear,
    module=module,
    calls={
        **{f"{way}_{'x'.join(map(str, shape))}": partial(inputs, *shape, gated)
           for way, gated in WAYS.items() for shape in SHAPES},
        **{f"{way}_without_bias": partial(inputs, 17, 37, 41, gated, bias=False)
           for way, gated in WAYS.items()},
        **{f"{way}_{value}_in_weight": partial(with_value, gated, "weight", (5, 3), value)
           for way, gated in WAYS.items() for value in (float("inf"), -float("inf"), NAN, 1e18)},
        **{f"{way}_18x21x40": partial(inputs, 18, 21, 40, gated) for way, gated in WAYS.items()},
        "nan_in_a_token": partial(with_value, False, "x", (17, 3), NAN),
        "one_token_for_all": one_token_for_all,
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
        *LINEAR_REFUSED,
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
            ("if bias_ptr is not None:",
             "gate += 0 * tl.sum(gate, 1)[:, None]\n    if bias_ptr is not None:"),
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


# --- geometry ---------------------------------------------------------------------------------

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
        assert programs * (launch.num_stages - 1) * tile * 64 * 2 >= 2.9e6
