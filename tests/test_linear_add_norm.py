"""linear_add_norm: the kernels against the definition in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import strategies as st

from dsb_kernels import _configs as tuning
from dsb_kernels import linear as module
from dsb_kernels.linear import linear_add_norm, split_launch
from tests.mutations import DEVICE
from tests.op_contract import (
    LINEAR_REFUSED,
    LOW,
    NAN,
    SLOW,
    Arguments,
    FloatContract,
    OpCase,
    mistakes_of,
    small_tiles,
)  # fmt: skip

SMALL = tuning.Config(
    {"BLOCK_V": 16, "BLOCK_N": 16, "BLOCK_K": 16, "PROGRAMS": 6}, num_warps=4, num_stages=2
)
tiles = small_tiles(SMALL, "linear_add_norm")


def inputs(
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


def check(**shape) -> None:
    compare(inputs(**shape))


def nan_in_a_token() -> Arguments:
    arguments = inputs(18, 21, 40)
    arguments["x"][17, 3] = NAN
    return arguments


def one_token_for_all() -> Arguments:
    """x has a stride of 0."""
    arguments = inputs(18, 21, 40)
    return arguments | {"x": arguments["x"][:1].expand(18, -1)}


def check_roundings(dtype: torch.dtype = torch.bfloat16) -> None:
    """The norm is that of the rounded residual, as what follows the layer sees it."""
    for N, E, F in ((20, 40, 200), (5, 64, 48)):
        arguments = inputs(N, E, F, dtype)
        out, residual = compare(arguments)
        gain = arguments["norm_weight"].double()
        expected = torch.nn.functional.rms_norm(residual.double(), (E,), gain, 1e-5)
        half_ulp = torch.finfo(dtype).eps / 2
        assert ((out - expected).abs() <= 1.01 * half_ulp * expected.abs() + 1e-7).all()


SHAPES = [(N, 37, 41) for N in (1, 15, 16, 17, 33, 64, 100, 130)]
SHAPES += [(5, E, F) for E, F in ((1, 1), (16, 16), (15, 48), (48, 15), (33, 130), (3, 64))]
SHAPES += [(5, 600, 20), (5, 90, 400)]

CASE = OpCase(
    op=linear_add_norm,
    module=module,
    calls={
        **{"x".join(map(str, shape)): partial(inputs, *shape) for shape in SHAPES},
        **{f"eps_{eps}": partial(inputs, 4, 24, 40, eps=eps) for eps in (0.0, 1e-6, 3.0)},
        "ragged": partial(inputs, 18, 21, 70, eps=0.1),
        "nan_in_a_token": nan_in_a_token,
        "one_token_for_all": one_token_for_all,
        # Nothing of something.
        **{"x".join(map(str, shape)): partial(inputs, *shape, eps=0.1)
           for shape in ((0, 5, 4), (3, 5, 0), (3, 0, 4))},
    },
    quick=("ragged",),
    strided=("x", "weight", "residual"),
    low_calls={
        "20_tokens": partial(inputs, 20, 40, 200),
        "5_tokens": partial(inputs, 5, 64, 48),
    },
    separate=("x", "residual"),
    good=partial(inputs, 2, 9, 4),
    refused=[
        ({"residual": torch.zeros(3, 9)}, r"residual has shape \(3, 9\): accepted is \(2, 9\)"),
        ({"norm_weight": torch.zeros(8)}, r"norm_weight has shape \(8,\): accepted is \(9\)"),
        *LINEAR_REFUSED,
    ],
    any_check=st.builds(
        partial, st.just(check), N=st.integers(1, 40), E=st.integers(1, 70), F=st.integers(1, 150),
        eps=st.sampled_from([1e-6, 1e-5, 0.1]), seed=st.integers(0, 99),
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
            ("norm_weight_ptr + feature", "norm_weight_ptr + 0 * feature"),
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
compare = CASE.compare


class TestLinearAddNorm(FloatContract):
    case = CASE


@LOW
def test_norm_is_that_of_the_rounded_residual(dtype):
    check_roundings(dtype)


@pytest.mark.parametrize("N", [3, 20, 40, pytest.param(130, marks=SLOW)])
def test_production_configuration(production, N):
    compare(inputs(N, 200, 136, seed=1))
    compare(inputs(N, 130, 512, seed=2))


def test_a_token_of_zeros_has_a_norm_of_zeros():
    arguments = inputs(4, 24, 40)
    arguments["x"][2] = arguments["residual"][2] = 0
    out, residual = compare(arguments)
    assert not residual[2].any() and not out[2].any()


# --- geometry ---------------------------------------------------------------------------------

MODELS = {  # hidden size, MLP
    "LLaDA-8B": (4096, 12288), "iLLaDA-8B": (4096, 12288), "Dream-7B": (3584, 18944),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("name", MODELS)
def test_programs_of_the_models_run_at_once_and_keep_the_memory_busy(production, name, tokens):
    E, mlp = MODELS[name]
    for F in (E, mlp):
        launch = split_launch(tokens, F, E, torch.bfloat16, "sm_90")
        (tiles, splits, blocks), tile = launch.grid, launch.blocks["BLOCK_V"]
        programs = tiles * splits
        assert blocks == 1 and tiles * tile == E and 100 <= programs <= 132
        assert splits * launch.share == F  # equal work
        assert programs * (launch.num_stages - 1) * tile * 64 * 2 >= 4.5e6
        must = 2 * (E * F + tokens * (F + 3 * E) + E)
        allowed = {16: 1.1, 32: 1.1, 64: 1.15, 128: 1.5}[tokens]  # from 64 on: of L2
        partials = 2 * 4 * splits * tokens * E
        assert 1 + partials / must <= allowed and partials / 2 < 10e6


def test_every_split_has_work():
    for F in range(1, 200):
        launch = split_launch(1, F, 16, torch.bfloat16, "sm_90")
        splits = launch.grid[1]
        assert (splits - 1) * launch.share < F <= splits * launch.share
        assert launch.share % SMALL.blocks["BLOCK_K"] == 0 and splits <= SMALL.blocks["PROGRAMS"]
