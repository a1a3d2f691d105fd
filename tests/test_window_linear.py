"""window_linear: the kernel against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsb_kernels import _configs as tuning
from dsb_kernels import linear as module
from dsb_kernels.linear import linear_launch, window_linear, window_linear_reference
from tests.mutations import DEVICE, assert_caught, kernels, tiles_of

INF, NAN = float("inf"), float("nan")
SLOW = pytest.mark.slow
LOW = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
SMALL = tuning.Config(
    {"BLOCK_V": 16, "BLOCK_N": 16, "BLOCK_K": 16, "PROGRAMS": 1}, num_warps=4, num_stages=2
)


@pytest.fixture
def production():
    """Asks for the table's own configurations."""


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Tiles of 16 x 16, so that small shapes have several."""
    tiles_of(request, monkeypatch, SMALL, "window_linear", "window_linear gated")


def inputs(
    N: int, F: int, E: int, *, gated: bool, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias whose products have a standard deviation of about 2."""
    g = torch.Generator().manual_seed(seed)
    rows = F * (2 if gated else 1)
    x, weight = torch.randn(N, E, generator=g), torch.randn(rows, E, generator=g)
    bias = torch.randn(rows, generator=g)
    return tuple(t.to(DEVICE, dtype) for t in (2 / E**0.5 * x, weight, bias))


def exactly(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    return window_linear_reference(*wide, gated=gated)


def compare(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gated: bool) -> Tensor:
    """Every row's error is at most 1e-5 of its largest value, and NaN and infinities are where
    they are in float64."""
    with kernels():
        y = window_linear(x, weight, bias, gated=gated)
    expected = exactly(x, weight, bias, gated)
    assert y.shape == expected.shape and y.dtype == x.dtype and y.is_contiguous()
    finite = expected.isfinite()
    assert torch.equal(y.isfinite(), finite) and torch.equal(y.isnan(), expected.isnan())
    assert (y.double() == expected)[expected.isinf()].all()
    scale = torch.where(finite, expected, 0).abs().amax(-1, keepdim=True).clamp(min=1e-30)
    error = torch.where(finite, y.double() - expected, 0).abs() / scale
    assert (error <= 1e-5).all(), error.max()
    return y


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("N", [1, 15, 16, 17, 33, 64, 100, 130])
def test_kernel_matches_definition(N, gated):
    x, weight, bias = inputs(N, 37, 41, gated=gated)
    compare(x, weight, gated=gated)
    compare(x, weight, bias, gated=gated)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("F", "E"), [(1, 1), (16, 16), (15, 48), (48, 15), (33, 130), (3, 64)])
def test_ragged_and_even_features(F, E, gated):
    compare(*inputs(5, F, E, gated=gated), gated=gated)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("N", [3, 20, 40, pytest.param(130, marks=SLOW)])
def test_production_configuration(production, N, gated):
    compare(*inputs(N, 200, 136, gated=gated, seed=1), gated=gated)
    compare(*inputs(N, 130, 128, gated=gated, seed=2), gated=gated)


def check_low_precision(dtype: torch.dtype, gated: bool) -> None:
    for N, F, E in ((20, 40, 200), (5, 48, 64)):
        tensors = inputs(N, F, E, gated=gated, dtype=dtype)
        expected = exactly(*tensors, gated)
        bound = (window_linear_reference(*tensors, gated=gated) - expected).abs()
        with kernels():
            error = (window_linear(*tensors, gated=gated) - expected).abs()
        assert error.max() <= 2 * bound.max()
        assert error.square().mean() <= 1.1 * bound.square().mean()  # rounded once at most


@LOW
@pytest.mark.parametrize("gated", [False, True])
def test_low_precision_error_is_at_most_twice_the_plain_one(dtype, gated):
    check_low_precision(dtype, gated)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("value", [INF, -INF, NAN, 1e18])
def test_what_is_in_one_row_stays_there(value, gated):
    x, weight, _ = inputs(19, 21, 40, gated=gated)
    with kernels():
        before = window_linear(x, weight, gated=gated)
    x[17, 33] = value
    after = compare(x, weight, gated=gated)
    others = torch.arange(19) != 17
    assert torch.equal(after[others], before[others])
    weight[5, 3] = value
    compare(x, weight, gated=gated)


def test_gates_that_saturate():
    x = torch.eye(16, device=DEVICE)
    gate = torch.linspace(-200, 200, 16, device=DEVICE).expand(3, 16)
    y = compare(x, torch.cat([gate, torch.ones_like(gate)]), gated=True)
    assert y[0].abs().max() == 0 and torch.equal(y[-1], gate[:, -1])


@pytest.mark.parametrize("gated", [False, True])
def test_neither_padding_nor_what_was_in_memory_is_seen(monkeypatch, gated):
    """What lies beside the tensors is NaN, and so is the result's memory before."""
    x, weight, bias = inputs(18, 21, 40, gated=gated)
    with kernels():
        expected = window_linear(x, weight, bias, gated=gated)

    def inside(t: Tensor) -> Tensor:
        whole = torch.full((len(t) + 20, t.shape[1] + 24), NAN, device=DEVICE)
        return whole[1 : len(t) + 1, 3 : t.shape[1] + 3].copy_(t)

    empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda *args, **options: empty(*args, **options).fill_(NAN)
    )
    with kernels():
        found = window_linear(inside(x), inside(weight), bias, gated=gated)
    assert torch.equal(found, expected)


def test_rows_all_from_one():
    """A row stride of 0."""
    x, weight, bias = inputs(1, 21, 40, gated=False)
    y = compare(x.expand(18, -1), weight, bias, gated=False)
    assert torch.equal(y, y[:1].expand(18, -1))


def test_a_larger_batch_is_split_into_rows():
    """Rows of one class get the same whatever their number."""
    x, weight, _ = inputs(50, 21, 40, gated=False)
    with kernels():
        y = window_linear(x, weight)
        for rows in (1, 16, 17, 49):
            assert torch.equal(window_linear(x[:rows], weight), y[:rows])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 40), F=st.integers(1, 50), E=st.integers(1, 70), gated=st.booleans(),
    bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_property_kernel_equals_definition(N, F, E, gated, bias, seed):
    x, weight, b = inputs(N, F, E, gated=gated, seed=seed)
    compare(x, weight, b if bias else None, gated=gated)


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
@pytest.mark.parametrize("gated", [False, True])
def test_nothing_of_something(shape, gated):
    N, F, E = shape
    x = torch.ones(N, E, device=DEVICE)
    weight = torch.ones(F * (2 if gated else 1), E, device=DEVICE)
    with kernels():
        y = window_linear(x, weight, gated=gated)
    assert y.shape == (N, F) and not y.any()


# --- geometry ---------------------------------------------------------------------------------

MODELS = {"LLaDA-8B": (12288, 12288), "iLLaDA-8B": (6144, 12288), "Dream-7B": (4608, 18944)}
SHARED = 227 * 1024


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("name", MODELS)
def test_programs_of_the_models_run_at_once_and_keep_the_memory_busy(production, name, rows):
    for F, gated in zip(MODELS[name], (False, True), strict=True):
        launch = linear_launch(rows, F, torch.bfloat16, "sm_90", gated=gated)
        tile = launch.blocks["BLOCK_V"] * (2 if gated else 1)
        shared = launch.num_stages * (tile + launch.blocks["BLOCK_N"]) * 64 * 2
        programs, (tiles, blocks) = launch.grid[0], launch.grid
        assert blocks == 1 and tiles * launch.blocks["BLOCK_V"] == F
        assert 72 <= programs <= 296 and shared <= SHARED
        late = programs - 132 * (228 * 1024 // (shared + 1024))
        assert late <= (16 if (name, rows, gated) == ("Dream-7B", 128, True) else 0)
        assert programs * (launch.num_stages - 1) * tile * 64 * 2 >= 2.9e6


# --- registration and bad input ---------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_opcheck(backend, monkeypatch):
    monkeypatch.setenv("DSB_BACKEND", backend)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for gated in (False, True):
        x, weight, bias = inputs(3, 10, 20, gated=gated)
        for b in (None, bias):
            op = torch.ops.dsb.window_linear
            torch.library.opcheck(op, (x, weight, b), {"gated": gated}, test_utils=tests)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_compiles_without_a_graph_break(backend):
    for gated in (False, True):
        tensors = inputs(3, 10, 20, gated=gated)
        compiled = torch.compile(window_linear, fullgraph=True, backend=backend)
        expected = window_linear(*tensors, gated=gated)
        torch.testing.assert_close(compiled(*tensors, gated=gated), expected)


X, WEIGHT = torch.zeros(2, 4), torch.zeros(9, 4)


@pytest.mark.parametrize(
    ("x", "weight", "options", "words"),
    [
        (X.double(), WEIGHT, {}, "x has dtype float64: accepted are float32"),
        (X[0], WEIGHT, {}, r"x has shape \(4,\): accepted is \(N, E\)"),
        (torch.zeros(4, 2).T, WEIGHT, {}, "x has stride 2 in its last dimension: accepted is 1"),
        (X, WEIGHT.half(), {}, "weight has dtype float16: accepted are float32"),
        (X, torch.zeros(9, 5), {}, r"weight has shape \(9, 5\): accepted is \(F, 4\)"),
        (X, torch.zeros(4, 9).T, {}, "weight has stride 9 in its last dimension"),
        (X, WEIGHT.to("meta"), {}, "weight is on meta: accepted is cpu"),
        (X, WEIGHT, {"gated": True}, "weight has 9 rows: accepted with gated is an even number"),
        (X, WEIGHT, {"bias": torch.zeros(8)}, r"bias has shape \(8,\): accepted is \(9\)"),
        (X, WEIGHT, {"bias": torch.zeros(18)[::2]}, "bias has strides"),
        ([1.0], WEIGHT, {}, "x is list: a tensor is accepted"),
    ],
)
def test_bad_input_names_argument_value_and_what_is_accepted(x, weight, options, words):
    with pytest.raises((TypeError, ValueError), match=f"window_linear: {words}"):
        window_linear(x, weight, **options)


# --- the tests can fail -----------------------------------------------------------------------


def check_both() -> None:
    for gated in (False, True):
        compare(*inputs(18, 21, 40, gated=gated), gated=gated)


@pytest.mark.parametrize(
    ("old", "new"),
    [
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
    ],
)
def test_deliberate_mistakes_are_caught(old, new):
    assert_caught(check_both, module, "_window_linear_kernel", old, new)


def check_many_tokens() -> None:
    compare(*inputs(130, 21, 40, gated=True), gated=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [("index // F * F + index", "index"), ("gate_ptrs + F", "gate_ptrs"),
     ("< numel", "< numel - 1"), ("tl.exp(-gate)", "tl.exp(gate)")],
)  # fmt: skip
def test_mistakes_in_silu_times_up_after_cublas_are_caught(old, new):
    assert_caught(check_many_tokens, module, "_silu_mul_kernel", old, new)


def check_nan_in_a_row() -> None:
    x, weight, _ = inputs(18, 21, 40, gated=False)
    x[17, 3] = NAN
    compare(x, weight, gated=False)


def test_a_row_that_spoils_its_tile_is_caught():
    old = "if bias_ptr is not None:"
    new = f"gate += 0 * tl.sum(gate, 1)[:, None]\n    {old}"
    assert_caught(check_nan_in_a_row, module, "_window_linear_kernel", old, new)


def check_bfloat16() -> None:
    check_low_precision(torch.bfloat16, gated=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("gate = tl.dot(w, x, gate,", "gate = tl.dot(w, x, gate.to(w.dtype).to(tl.float32),"),
        ("up = tl.dot(w, x, up,", "up = tl.dot(w, x, up.to(w.dtype).to(tl.float32),"),
    ],
)
def test_rounded_sums_are_caught(old, new):
    """Which float32, having nothing to round, could not show."""
    assert_caught(check_bfloat16, module, "_window_linear_kernel", old, new)
