"""What every op must satisfy. The op's own test file has an `OpCase`, with the op and its calls,
and a class that is an `OpContract` of it; pytest runs all of the checks below on that.

A call is a function that returns the arguments by name. Results are what the op returns, then the
arguments that it writes. They are held against `op.definition`, which takes float64 as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dsb_kernels import _configs as tuning
from tests.mutations import DEVICE, assert_caught, kernels, unwritten_is_nan

INF, NAN = float("inf"), float("nan")
SLOW = pytest.mark.slow
LOW_PRECISION = [torch.float16, torch.bfloat16]
LOW = pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
Arguments = dict[str, Any]
Results = tuple[Tensor, ...]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def small_tiles(small: tuning.Config, *ops: str) -> Callable:
    """A fixture: ops run in these tiles in every dtype, so that small shapes have several of them;
    a test that asks for the fixture `production` has those of the table for 16 bits."""

    @pytest.fixture(autouse=True)
    def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        for op in ops:
            if "production" not in request.fixturenames:
                monkeypatch.setitem(tuning.CONFIGS, (op, "any"), {tuning.INFINITY: small})
            monkeypatch.setitem(tuning.CONFIGS, (f"{op} float32", "any"), tuning.CONFIGS[op, "any"])

    return tiles


def tensors_of(arguments: Arguments) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def written(op: Callable) -> list[str]:
    """Names of the arguments that an op changes in place."""
    schema = op.op._opoverload._schema
    return [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]


def results(function: Callable, arguments: Arguments, names: Iterable[str]) -> Results:
    """What a function returns, then the arguments `names`, which it writes in copies."""
    copies = arguments | {name: arguments[name].clone() for name in names}
    result = function(**copies)
    returned = () if result is None else (result,) if isinstance(result, Tensor) else result
    return (*returned, *(copies[name] for name in names))


def by_kernel(op: Callable, arguments: Arguments) -> Results:
    with kernels():
        return results(op, arguments, written(op))


def by_definition(op: Callable, arguments: Arguments) -> Results:
    return results(op.definition, arguments, written(op))


def exactly(op: Callable, arguments: Arguments) -> Results:
    """By the definition in float64."""
    floating = {n: t.double() for n, t in tensors_of(arguments).items() if t.is_floating_point()}
    return by_definition(op, arguments | floating)


def errors(actual: Tensor, expected: Tensor, smallest: float = 1e-30) -> Tensor:
    """Errors as a share of the largest value in the last dimension, or of `smallest` if that is
    larger; NaN and infinities are where they should be."""
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite) and torch.equal(actual.isnan(), expected.isnan())
    assert (actual.double() == expected)[expected.isinf()].all()
    if not expected.numel():
        return torch.zeros(())
    scale = torch.where(finite, expected, 0).abs().amax(-1, keepdim=True).clamp(min=smallest)
    return torch.where(finite, actual.double() - expected, 0).abs() / scale


def edge_rows(V: int, block: int) -> Tensor:
    """Logits (21, V) in float32: one row per kind of trouble, where tiles have `block` logits."""
    x = torch.randn(21, V, generator=torch.Generator().manual_seed(0)) * 3
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
    x[18, min(block - 1, V - 1)] = 25.0  # the last of its tile
    x[19, V - 1], x[19, 0] = 19.0, 20.0  # the best two in different splits
    x[20], x[20, V - 1] = INF, NAN  # in one tile
    return x


def sampling(rows: int, temperature: float = 0.7, own: bool = False) -> Arguments:
    """How to sample, with one seed for all rows or, where they have their `own`, one for each."""
    ids = (torch.arange(rows) * 7 + 2**35).to(DEVICE)
    seed = torch.arange(rows) * 2**33 - 7 if own else torch.tensor(-7)
    return {"temperature": temperature, "seed": seed.to(DEVICE), "noise_ids": ids}


# What both ops that propose tokens refuse, where there are two candidates and eight tokens.
SCORING_REFUSED: list[tuple[Arguments, str]] = [
    ({"confidence": "max"}, "confidence='max': accepted are 'probability', 'margin'"),
    ({"banned": (8,)}, "banned token 8: accepted are 0 to 7"),
    ({"excluded": (-1,)}, "excluded token -1: accepted are 0 to 7"),
    ({"banned": tuple(range(8))}, "no token of 8 is left"),
    ({"banned": (0, 1), "excluded": tuple(range(2, 8))}, "and excluded=.*no token of 8 is left"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"temperature": NAN}, "temperature=nan"),
    ({"seed": None}, "seed=None"),
    ({"noise_ids": torch.tensor(1)}, "noise_ids has shape"),
    ({"seed": torch.tensor([3])}, "seed has shape"),
    ({"temperature": 0.0, "seed": [3]}, "seed is list"),
    ({"temperature": 0.0, "noise_ids": torch.ones(2)}, "noise_ids has dtype"),
    ({"eligible": torch.ones(3) > 0}, r"eligible has shape \(3,\): accepted is \(2,?\)"),
]


def excluding(rows: int, *excluded: int) -> Arguments:
    """Tokens that are excluded for every third candidate."""
    return {"excluded": excluded, "excluding": (torch.arange(rows) % 3 == 0).to(DEVICE)}


def assert_scored(actual: Results, expected: Results, confidence: str) -> None:
    """The same tokens, and confidences to 1e-5 of their terms: a margin is a difference, an entropy
    a sum of terms of both signs."""
    (token, c), (expected_token, reference) = actual, expected
    assert token.tolist() == expected_token.tolist()
    assert c.dtype == torch.float32 and c.shape == token.shape
    scale = 1e-37 if confidence == "probability" else 0.1
    error = (c.double() - reference).abs() / reference.abs().clamp(min=scale)
    same = (c.double() == reference) | (c.isnan() & reference.isnan())
    assert ((error <= 1e-5) | same).all(), f"{c.tolist()} for {reference.tolist()}"


def registered(op: Callable, arguments: Arguments) -> tuple[Any, ...]:
    """Arguments of an op as torch has it: all of them, in order, and settings as strings."""
    bound = inspect.signature(op.definition).bind(**arguments)
    bound.apply_defaults()
    values = ([*x] if isinstance(x, tuple) else x for x in bound.arguments.values())
    return tuple(
        x.encode() if hasattr(x, "encode") and not isinstance(x, str) else x for x in values
    )


def strided(dim: int, stride: int) -> Callable[[Tensor], Tensor]:
    """A function that returns a tensor of the same metadata with another stride in `dim`. Checks
    read no more than metadata, so that it needs no memory."""

    def change(t: Tensor) -> Tensor:
        strides = [*t.stride()]
        strides[dim] = stride
        with FakeTensorMode():
            return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device)

    return change


Check = str | Callable[[], None]


def mistakes_of(*groups: tuple[Check, str, list[tuple[str, str]]]) -> dict[str, tuple]:
    """`OpContract.mistakes` of (check, kernel, [(what stands there, the mistake)])."""
    return {
        f"{kernel} {check if isinstance(check, str) else ''}: {' '.join(new.split())}": (
            check, kernel, old, new,
        )
        for check, kernel, texts in groups
        for old, new in texts
    }  # fmt: skip


@dataclass(frozen=True)
class OpCase:
    """An op and the data that its checks need."""

    op: Callable
    module: ModuleType  # with the kernels
    # Each of these calls is compared with the definition; those of `quick` are also checked by
    # torch, compiled, and called with other strides.
    calls: dict[str, Callable[[], Arguments]]
    quick: tuple[str, ...]
    # What is changed in the right arguments `good`, into a value or by a function of the right one,
    # and what the error says.
    good: Callable[[], Arguments]
    refused: list[tuple[Arguments, str]]
    # Checks of any call, drawn by hypothesis, and how many are run in quick and in slow tests.
    any_check: SearchStrategy[Callable[[], object]]
    examples: tuple[int, int]
    # A check that must fail (a function or the name of a call), the kernel or its helper, what
    # stands there, the mistake.
    mistakes: dict[str, tuple[Check, str, str, str]]
    helpers: ModuleType | None = None  # has the helpers that `module` does not have
    # Arguments that may have any strides but in their last dimension.
    strided: tuple[str, ...] = ()
    # Floating-point ops only: calls in 16 bits, and arguments whose first dimension is that of the
    # results, so that what is in one of its elements stays there.
    low_calls: dict[str, Callable[[torch.dtype], Arguments]] = field(default_factory=dict)
    separate: tuple[str, ...] = ()
    own_compare: Callable[[Arguments], Results] | None = None  # in place of `compare_floats`
    # Errors are shares of the largest value, which in some call is a sum close to 0. Ops of long
    # sums therefore try the same calls in every run.
    same_examples: bool = False
    # Which results are logarithms. Their errors are relative errors of what they are logarithms of,
    # so they are not shares of a largest value, which may be close to 0.
    logarithms: tuple[int, ...] = ()
    rounds_once: bool = True  # at most: then errors in 16 bits are those of the definition

    def compare(self, arguments: Arguments) -> Results:
        if self.own_compare is not None:
            return self.own_compare(arguments)
        return (self.compare_floats if self.low_calls else self.compare_exactly)(arguments)

    def compare_exactly(self, arguments: Arguments) -> Results:
        """Results of the kernel and of the definition are the same; NaN equals NaN."""
        actual = by_kernel(self.op, arguments)
        for i, (x, wanted) in enumerate(
            zip(actual, by_definition(self.op, arguments), strict=True)
        ):
            assert x.dtype == wanted.dtype and x.shape == wanted.shape, i
            assert x.equal(wanted) or x.allclose(wanted, rtol=0, atol=0, equal_nan=True), i
        return actual

    def compare_floats(self, arguments: Arguments) -> Results:
        """Errors of the kernel are at most twice those of the definition. In float32 they may
        always be 1e-5 of the largest value, or 1e-5 if it is a logarithm and below 1. With
        `rounds_once` their mean square in 16 bits is that of the definition."""
        actual, exact = by_kernel(self.op, arguments), exactly(self.op, arguments)
        plain = by_definition(self.op, arguments)
        for i, (result, definition, expected) in enumerate(zip(actual, plain, exact, strict=True)):
            assert result.dtype == definition.dtype and result.shape == definition.shape
            if not result.numel():
                continue
            smallest = 1.0 if i in self.logarithms else 1e-30
            error = errors(result, expected, smallest)
            bound = errors(definition, expected, smallest)
            # Where the largest value is a sum that cancels, the definition is no closer than 1e-5.
            low = result.dtype in LOW_PRECISION
            assert error.amax() <= max(2 * bound.amax(), 0 if low else 1e-5), error.amax()
            if self.rounds_once and low:
                assert error.square().mean() <= 1.1 * bound.square().mean()
        return actual


class OpContract:
    case: OpCase

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        tables = {
            "call": self.case.calls,
            "low_call": self.case.low_calls,
            "quick_call": {name: self.case.calls[name] for name in self.case.quick},
            "wrong": {words: (changes, words) for changes, words in self.case.refused},
            "mistake": self.case.mistakes,
            "name": {name: name for name in self.case.separate},
        }
        for name in [name for name in tables if name in metafunc.fixturenames]:
            table = tables[name]
            metafunc.parametrize(name, [*table.values()], ids=[*table])
        if "examples" in metafunc.fixturenames:
            quick, slow = self.case.examples
            counts = [quick] * (quick > 0) + [pytest.param(slow, marks=SLOW)] * (slow > 0)
            metafunc.parametrize("examples", counts)

    def test_kernel_matches_definition(self, call):
        self.case.compare(call())

    def test_any_call(self, examples):
        @settings(max_examples=examples, deadline=None, derandomize=self.case.same_examples)
        @given(self.case.any_check)
        def run(check):
            check()

        run()

    def test_neither_strides_nor_what_is_in_memory_matter(self, quick_call):
        """What lies beside the tensors is NaN and stays so; new memory holds NaN."""
        arguments = quick_call()
        expected = by_kernel(self.case.op, arguments)
        wholes, views = {}, {}
        for name, t in tensors_of(arguments).items():
            if name in self.case.strided:
                fill = NAN if t.is_floating_point() else 99
                wholes[name] = torch.full([n + 24 for n in t.shape], fill).to(DEVICE, t.dtype)
                inside = tuple(slice(3, n + 3) for n in t.shape)
                views[name] = wholes[name][inside].copy_(t)
        with unwritten_is_nan(), kernels():
            result = results(self.case.op, arguments | views, [])
        changed = tuple((arguments | views)[name] for name in written(self.case.op))
        for again, before in zip((*result, *changed), expected, strict=True):
            assert again.equal(before) or again.allclose(before, 0, 0, equal_nan=True)
        for name, view in views.items():
            view.fill_(wholes[name].flatten()[0])
            assert wholes[name].isnan().all() or (wholes[name] == 99).all()

    @pytest.mark.parametrize("backend", ["eager", "triton"])
    def test_opcheck(self, quick_call, backend, monkeypatch):
        monkeypatch.setenv("DSB_BACKEND", backend)
        tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
        tests += ["test_autograd_registration"] * (backend == "eager")
        torch.library.opcheck(
            self.case.op.op, registered(self.case.op, quick_call()), test_utils=tests
        )

    @pytest.mark.parametrize(
        ("compiler", "backend"),
        [("aot_eager", "eager"), ("aot_eager", "triton"),
         pytest.param("inductor", "triton", marks=SLOW)],
    )  # fmt: skip
    def test_compiles_without_a_graph_break(self, quick_call, compiler, backend, monkeypatch):
        monkeypatch.setenv("DSB_BACKEND", backend)
        torch.compiler.reset()  # so that other ops' shapes do not count as recompilations
        arguments, names = quick_call(), written(self.case.op)
        compiled = torch.compile(self.case.op, fullgraph=True, backend=compiler)
        for result, expected in zip(
            results(compiled, arguments, names), by_definition(self.case.op, arguments), strict=True
        ):
            torch.testing.assert_close(result, expected, equal_nan=True)

    def test_refused_arguments_are_named(self, wrong):
        changes, words = wrong
        good = self.case.good()
        bad = {n: x(good[n]) if inspect.isfunction(x) else x for n, x in changes.items()}
        bad = {
            n: x.to(DEVICE) if isinstance(x, Tensor) and x.device.type == "cpu" else x
            for n, x in bad.items()
        }
        error = TypeError if "has dtype" in words or " is list" in words else ValueError
        with pytest.raises(error, match=f"{self.case.op.__name__}: .*{words}"):
            self.case.op(**good | bad)

    def test_tensors_of_a_wrong_kind_are_named(self):
        """A list, another dtype or number of dimensions, a last stride of 2, another device. The
        dtype and the device of the first tensor are those of the others."""
        good = self.case.good()
        first = next(iter(tensors_of(good)))
        for name, t in tensors_of(good).items():
            dtype = torch.int32 if t.dtype == torch.int64 else torch.int64
            if t.is_floating_point():
                dtype = torch.float64 if name == first else torch.float16
            shape = t.flatten()[0] if t.ndim else t[None]
            faults = [("is list", [t]), ("has dtype .*", t.to(dtype)), ("has shape .*", shape)]
            if t.ndim:
                faults += [("has strides? .*", t.repeat_interleave(2, -1)[..., ::2])]
            if name != first:
                faults += [("has shape .*", t[None]), ("is on meta", t.to("meta"))]
            for words, wrong in faults:
                error = TypeError if words in ("has dtype .*", "is list") else ValueError
                with pytest.raises(error, match=f"^{self.case.op.__name__}: {name} {words}: "):
                    self.case.op(**good | {name: wrong})

    def test_mistakes_are_caught(self, mistake):
        check, kernel, old, new = mistake
        case, name = self.case, check
        if name in case.calls:
            check = lambda: case.compare(case.calls[name]())  # noqa: E731
        elif name in case.low_calls:
            check = lambda: case.compare(case.low_calls[name](torch.bfloat16))  # noqa: E731
        module = case.module if hasattr(case.module, kernel) else case.helpers
        assert_caught(check, module, kernel, old, new, known_as=(case.op, name))


class FloatContract(OpContract):
    @LOW
    def test_low_precision_error_is_at_most_twice_the_definitions(self, low_call, dtype):
        self.case.compare(low_call(dtype))

    @pytest.mark.parametrize("value", [INF, -INF, NAN, 1e15])
    def test_what_is_in_one_row_stays_there(self, quick_call, name, value):
        arguments = quick_call()
        before = by_kernel(self.case.op, arguments)
        arguments[name] = arguments[name].clone()
        spoiled = arguments[name][-1]
        spoiled[tuple(n * 2 // 3 for n in spoiled.shape)] = value
        for after, result in zip(self.case.compare_floats(arguments), before, strict=True):
            assert torch.equal(after[:-1], result[:-1])
