"""linear_add_norm: the kernels against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsb_kernels import _configs as tuning
from dsb_kernels import linear as module
from dsb_kernels.linear import linear_add_norm, linear_add_norm_reference, split_launch
from tests.mutations import DEVICE, assert_caught, kernels, tiles_of

INF, NAN = float("inf"), float("nan")
SLOW = pytest.mark.slow
LOW = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
SMALL = tuning.Config(
    {"BLOCK_V": 16, "BLOCK_N": 16, "BLOCK_K": 16, "PROGRAMS": 6}, num_warps=4, num_stages=2
)
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]  # x, weight, residual, norm weight


@pytest.fixture
def production():
    """Asks for the table's own configurations."""


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Tiles of 16 x 16 and several splits for few features."""
    tiles_of(request, monkeypatch, SMALL, "linear_add_norm")


def inputs(N: int, E: int, F: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """Products and residuals of a standard deviation of about 2."""
    g = torch.Generator().manual_seed(seed)
    x, weight = 2 / F**0.5 * torch.randn(N, F, generator=g), torch.randn(E, F, generator=g)
    residual, gain = 2 * torch.randn(N, E, generator=g), 1 + torch.randn(E, generator=g) / 4
    return tuple(t.to(DEVICE, dtype) for t in (x, weight, residual, gain))


def exactly(tensors: Tensors, eps: float) -> tuple[Tensor, Tensor]:
    """Residual and result in float64."""
    x, weight, residual, gain = (t.double() for t in tensors)  # a copy of the residual
    return residual, linear_add_norm_reference(x, weight, residual, gain, eps)


def by_kernel(tensors: Tensors, eps: float) -> tuple[Tensor, Tensor]:
    x, weight, residual, gain = tensors
    residual = residual.clone()
    with kernels():
        out = linear_add_norm(x, weight, residual, gain, eps)
    assert out.shape == residual.shape and out.dtype == x.dtype and out.is_contiguous()
    return residual, out


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of a row's largest value; NaN and infinities are where they should be."""
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite) and torch.equal(found.isnan(), expected.isnan())
    assert (found.double() == expected)[expected.isinf()].all()
    scale = torch.where(finite, expected, 0).abs().amax(-1, keepdim=True).clamp(min=1e-30)
    error = torch.where(finite, found.double() - expected, 0).abs() / scale
    assert (error <= 1e-5).all(), error.max()


def compare(tensors: Tensors, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    found = by_kernel(tensors, eps)
    for result, expected in zip(found, exactly(tensors, eps), strict=True):
        assert_close(result, expected)
    return found


@pytest.mark.parametrize("N", [1, 15, 16, 17, 33, 64, 100, 130])
def test_kernel_matches_definition(N):
    compare(inputs(N, 37, 41))


@pytest.mark.parametrize(
    ("E", "F"), [(1, 1), (16, 16), (15, 48), (48, 15), (33, 130), (3, 64), (600, 20), (90, 400)]
)
def test_ragged_and_even_features(E, F):
    compare(inputs(5, E, F))


@pytest.mark.parametrize("N", [3, 20, 40, pytest.param(130, marks=SLOW)])
def test_production_configuration(production, N):
    compare(inputs(N, 200, 136, seed=1))
    compare(inputs(N, 130, 512, seed=2))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 3.0])
def test_eps(eps):
    compare(inputs(4, 24, 40), eps)


def test_a_row_of_zeros_has_a_norm_of_zeros():
    x, weight, residual, gain = inputs(4, 24, 40)
    x[2], residual[2] = 0, 0
    residual, out = compare((x, weight, residual, gain))
    assert not residual[2].any() and not out[2].any()


def check_low_precision(dtype: torch.dtype) -> None:
    for N, E, F in ((20, 40, 200), (5, 64, 48)):
        tensors, eps = inputs(N, E, F, dtype), 1e-5
        plain = tensors[2].clone()
        plain = plain, linear_add_norm_reference(*tensors[:2], plain, tensors[3], eps)
        results = zip(by_kernel(tensors, eps), plain, exactly(tensors, eps), strict=True)
        for found, definition, expected in results:
            error, bound = (found - expected).abs(), (definition - expected).abs()
            assert error.max() <= 2 * bound.max()
            assert error.square().mean() <= 1.1 * bound.square().mean()
        # The norm is that of the rounded residual, as what follows the layer sees it.
        residual, out = by_kernel(tensors, eps)
        expected = torch.nn.functional.rms_norm(residual.double(), (E,), tensors[3].double(), eps)
        half_ulp = torch.finfo(dtype).eps / 2
        assert ((out - expected).abs() <= 1.01 * half_ulp * expected.abs() + 1e-7).all()


@LOW
def test_low_precision_error_is_at_most_twice_the_plain_one(dtype):
    check_low_precision(dtype)


def check_one_row(value: float) -> None:
    """What happens in a row (a value of x, then of the residual) stays there."""
    for where in (0, 2):
        tensors = inputs(19, 21, 40)
        before = by_kernel(tensors, 1e-5)
        tensors[where][17, 13] = value
        after = compare(tensors)
        others = torch.arange(19) != 17
        for a, b in zip(after, before, strict=True):
            assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("value", [INF, -INF, NAN, 1e15])
def test_what_is_in_one_row_stays_there(value):
    check_one_row(value)


def test_neither_padding_nor_what_was_in_memory_is_seen(monkeypatch):
    """What lies beside the tensors is NaN and stays so; so is, before, the memory of results."""
    tensors = inputs(18, 21, 70)
    residual, out = by_kernel(tensors, 1e-5)

    def around(t: Tensor) -> Tensor:
        return torch.full((len(t) + 20, t.shape[1] + 24), NAN, device=DEVICE)

    empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda *args, **options: empty(*args, **options).fill_(NAN)
    )
    wholes = [around(t) for t in tensors[:3]]
    x, weight, r = (
        whole[1 : len(t) + 1, 3 : t.shape[1] + 3].copy_(t)
        for whole, t in zip(wholes, tensors[:3], strict=True)
    )
    with kernels():
        found = linear_add_norm(x, weight, r, tensors[3], 1e-5)
    assert torch.equal(found, out) and torch.equal(r, residual)
    assert int((~wholes[2].isnan()).sum()) == residual.numel()


def test_rows_all_from_one():
    """x with a row stride of 0."""
    x, weight, residual, gain = inputs(18, 21, 40)
    compare((x[:1].expand(18, -1), weight, residual, gain))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 40), E=st.integers(1, 70), F=st.integers(1, 150),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]), seed=st.integers(0, 99),
)  # fmt: skip
def test_property_kernel_equals_definition(N, E, F, eps, seed):
    compare(inputs(N, E, F, seed=seed), eps)


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 5, 0), (3, 0, 4)])
def test_nothing_of_something(shape):
    N, E, F = shape
    residual = torch.ones(N, E, device=DEVICE)
    x, weight = torch.ones(N, F, device=DEVICE), torch.ones(E, F, device=DEVICE)
    with kernels():
        y = linear_add_norm(x, weight, residual, torch.ones(E, device=DEVICE), 0.0)
    assert y.shape == (N, E) and (y == 1).all() and (residual == 1).all()


# --- geometry ---------------------------------------------------------------------------------

MODELS = {  # hidden size, MLP
    "LLaDA-8B": (4096, 12288), "iLLaDA-8B": (4096, 12288), "Dream-7B": (3584, 18944),
}  # fmt: skip


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("name", MODELS)
def test_programs_of_the_models_run_at_once_and_keep_the_memory_busy(production, name, rows):
    E, mlp = MODELS[name]
    for F in (E, mlp):
        launch = split_launch(rows, F, E, torch.bfloat16, "sm_90")
        (tiles, splits, blocks), tile = launch.grid, launch.blocks["BLOCK_V"]
        programs = tiles * splits
        assert blocks == 1 and tiles * tile == E and 100 <= programs <= 132
        assert splits * launch.share == F  # equal work
        assert programs * (launch.num_stages - 1) * tile * 64 * 2 >= 4.5e6
        must = 2 * (E * F + rows * (F + 3 * E) + E)
        allowed = {16: 1.1, 32: 1.1, 64: 1.15, 128: 1.5}[rows]  # of the L2 cache, from 64 rows on
        partials = 2 * 4 * splits * rows * E
        assert 1 + partials / must <= allowed and partials / 2 < 10e6


def test_every_split_has_work():
    for F in range(1, 200):
        launch = split_launch(1, F, 16, torch.bfloat16, "sm_90")
        splits = launch.grid[1]
        assert (splits - 1) * launch.share < F <= splits * launch.share
        assert launch.share % SMALL.blocks["BLOCK_K"] == 0 and splits <= SMALL.blocks["PROGRAMS"]


# --- registration and bad input ---------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_opcheck(backend, monkeypatch):
    monkeypatch.setenv("DSB_BACKEND", backend)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.dsb.linear_add_norm
    torch.library.opcheck(op, (*inputs(3, 10, 40), 1e-5), test_utils=tests)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_compiles_without_a_graph_break(backend):
    x, weight, residual, gain = inputs(3, 10, 20)
    again = residual.clone()
    expected = linear_add_norm(x, weight, residual, gain, 1e-5)
    compiled = torch.compile(linear_add_norm, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, weight, again, gain, 1e-5), expected)
    torch.testing.assert_close(again, residual)


X, WEIGHT, RESIDUAL, GAIN = (torch.zeros(s) for s in ((2, 4), (9, 4), (2, 9), (9,)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": X.double()}, "x has dtype float64: accepted are float32"),
        ({"x": X[0]}, r"x has shape \(4,\): accepted is \(N, E\)"),
        ({"x": torch.zeros(4, 2).T}, "x has stride 2 in its last dimension"),
        ({"weight": WEIGHT.half()}, "weight has dtype float16: accepted are float32"),
        ({"weight": torch.zeros(9, 5)}, r"weight has shape \(9, 5\): accepted is \(F, 4\)"),
        ({"weight": torch.zeros(4, 9).T}, "weight has stride 9 in its last dimension"),
        ({"residual": torch.zeros(3, 9)}, r"residual has shape \(3, 9\): accepted is \(2, 9\)"),
        ({"residual": RESIDUAL.half()}, "residual has dtype float16"),
        ({"residual": RESIDUAL.to("meta")}, "residual is on meta: accepted is cpu"),
        ({"residual": torch.zeros(9, 2).T}, "residual has stride 2 in its last dimension"),
        ({"norm_weight": torch.zeros(8)}, r"norm_weight has shape \(8,\): accepted is \(9\)"),
        ({"norm_weight": torch.zeros(18)[::2]}, "norm_weight has strides"),
    ],
)
def test_bad_input_names_argument_value_and_what_is_accepted(changes, words):
    tensors = {"x": X, "weight": WEIGHT, "residual": RESIDUAL, "norm_weight": GAIN} | changes
    with pytest.raises((TypeError, ValueError), match=f"linear_add_norm: {words}"):
        linear_add_norm(**tensors, eps=1e-5)


# --- the tests can fail -----------------------------------------------------------------------


def check_ragged() -> None:
    compare(inputs(18, 21, 70), 0.1)


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("_split_linear_kernel", "(feature < F)[:, None],", "(feature < F - 1)[:, None],"),
        (
            "_split_linear_kernel",
            "(token < num_tokens)[None, :]\n",
            "(token < num_tokens - 1)[None, :]\n",
        ),
        ("_split_linear_kernel", "k0 + k < E", "k0 + k < E - 1"),
        ("_split_linear_kernel", "first = split * share", "first = 0 * share"),
        ("_split_linear_kernel", "tl.minimum(first + share, E)", "tl.minimum(first + share, 64)"),
        (
            "_split_linear_kernel",
            "split.to(tl.int64) * num_tokens",
            "split.to(tl.int64) * (num_tokens - 1)",
        ),
        ("_add_norm_kernel", "tl.static_range(SPLITS)", "tl.static_range(1, SPLITS)"),
        ("_add_norm_kernel", "tl.store(residual_ptr, rounded, mask=inside)", "pass"),
        ("_add_norm_kernel", "/ F + eps", "/ BLOCK_F + eps"),
        ("_add_norm_kernel", "/ F + eps", "/ F"),
        ("_add_norm_kernel", "norm_weight_ptr + feature", "norm_weight_ptr + 0 * feature"),
        ("_add_norm_kernel", "inside = feature < F", "inside = feature < F - 1"),
    ],
)
def test_deliberate_mistakes_are_caught(kernel, old, new):
    assert_caught(check_ragged, module, kernel, old, new)


def check_nan() -> None:
    check_one_row(NAN)


def test_a_row_that_spoils_its_tile_is_caught():
    old = "partial_token = split.to(tl.int64)"
    new = f"y += 0 * tl.sum(y, 1)[:, None]\n    {old}"
    assert_caught(check_nan, module, "_split_linear_kernel", old, new)


def check_bfloat16() -> None:
    check_low_precision(torch.bfloat16)


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("_split_linear_kernel", "tl.dot(w, x, y,", "tl.dot(w, x, y.to(w.dtype).to(tl.float32),"),
        ("_add_norm_kernel", "y = rounded.to(tl.float32)", "y += 0"),
        ("_add_norm_kernel", "(y * scale * gain)", "((y * scale).to(rounded.dtype) * gain)"),
    ],
)
def test_roundings_of_their_own_are_caught(kernel, old, new):
    """Which float32, having nothing to round, could not show."""
    assert_caught(check_bfloat16, module, kernel, old, new)
