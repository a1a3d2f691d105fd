"""The benchmarks of single ops: what they share, and the command that runs them all.

    python -m benchmarks.ops --op window_attention token_confidence --json ops.json
    python -m pytest benchmarks/bench_window_attention.py

`bench_<op>.py` lists the shapes of an op, those of the targets first, and makes a `Case` of each:
the op's arguments and what else computes the same from them. Everything else stands here. A
contender is checked before it is timed: its error against the definition in float64, over what is
allowed. Allowed is 1e-5, or twice the error of the definition in the case's own precision where
that is more; integers must be equal. Memory is filled with NaN before the checked call, so that
what a kernel leaves unwritten shows.

On a GPU the figures are microseconds with a cold and a warm L2, the share of the copy bandwidth
that the needed bytes amount to in the cold time, and TFLOP/s. On a CPU the shapes are small, "op"
runs the definition, and the figures only show that the benchmark works.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dsb_runtime.cli.main import OneLineParser
from dsb_runtime.files import check_writable, write_json
from dsb_runtime.measure.machine import describe_run
from dsb_runtime.measure.timing import Call, capture_calls, copy_bandwidth, synchronize, time_call

OPS = (
    "token_confidence", "lm_head_confidence", "window_attention", "rope_write_kv",
    "window_linear", "linear_add_norm", "place_rows", "unmask_and_slide",
)  # fmt: skip
DEFINITIONS = ("definition", "definition compiled")
Shape = dict[str, Any]
OTHERS_MAY = 2.0  # times the error that the op may have: they round at other places


def on_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


def dtype() -> torch.dtype:
    """The precision that is timed: 16 bits on a GPU; a CPU would emulate them."""
    return torch.bfloat16 if on_gpu() else torch.float32


def randn(*size: int) -> Tensor:
    return torch.randn(*size, device=device(), dtype=dtype())


@functools.lru_cache(maxsize=1)
def compiled(function: Callable[..., Any], *sizes: Any) -> Callable[..., Any]:
    """`function` under torch.compile for tensors of these sizes, once for all input sets. Without
    the reset, what was compiled for other sizes counts against the compiler's limit, past which it
    silently runs the function itself."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


@dataclass
class Case:
    """One call of an op at one shape."""

    op: Any  # the public function, which has `definition`
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)  # its keyword arguments
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)  # what computes the same
    written: tuple[Tensor, ...] = ()  # arguments that a call changes; restored between calls
    bytes: int = 0  # that a call has to read and write
    flops: int = 0
    # The error of a result over what is allowed, where equality of integers is too much to ask.
    error: Callable[[Any], float] | None = None

    def __post_init__(self) -> None:
        self.before = [tensor.clone() for tensor in self.written]

    def restore(self) -> None:
        for tensor, before in zip(self.written, self.before, strict=True):
            tensor.copy_(before)

    def call(self, contender: str) -> Call:
        """The call of a contender: "op", "definition", "definition compiled" or one of others."""
        if contender in self.others:
            run = self.others[contender]
        else:
            function = self.op if contender == "op" else self.op.definition
            if contender == "definition compiled":
                sizes = [x.shape for x in self.args if isinstance(x, Tensor)]
                function = compiled(function, *sizes)
            run = functools.partial(function, *self.args, **self.options)
        return Call(run, self.restore if self.written else None)


def poison() -> None:
    """Fill with NaN what the allocator hands out next."""
    if on_gpu():
        torch.cuda.empty_cache()
        blocks = [torch.full((n,), torch.nan, device="cuda") for n in (1 << 26, *[1 << 14] * 256)]
        del blocks


def relative_error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact||; infinite where anything is not a number."""
    norm = exact.norm().item() or 1.0
    value = (result.double() - exact).norm().item() / norm
    return math.inf if math.isnan(value) else value


def allowed_error(plain: Tensor, exact: Tensor) -> float:
    """`plain`: by the definition in the case's own precision; `exact`: by it in float64."""
    return max(1e-5, 2 * relative_error(plain, exact))


def by_definition(case: Case, change: Callable[[Tensor], Tensor], count: int) -> list[Tensor]:
    """The first `count` results of the definition on changed copies of the arguments (it may return
    more than the op does), then the arguments that it wrote."""
    copies: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return copies.setdefault(id(value), change(value))

    args, options = tree_map(copy, (case.args, case.options))
    result = case.op.definition(*args, **options)
    return [*tensors_of(result)[:count], *(copies[id(tensor)] for tensor in case.written)]


def tensors_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


@torch.no_grad()
def check(case: Case, contender: str) -> float:
    """The error of a contender over what it may have: at most 1 is right."""
    call = case.call(contender)
    poison()
    result = call.run()
    if case.error is not None:
        return case.error(result) / (1.0 if contender == "op" else OTHERS_MAY)
    count = len(tensors_of(result))
    results = [tensor.clone() for tensor in (*tensors_of(result), *case.written)]
    case.restore()
    exact = by_definition(case, lambda t: t.double() if t.is_floating_point() else t.clone(), count)
    plain = by_definition(case, torch.clone, count)
    worst = 0.0
    for tensor, by_plain, by_exact in zip(results, plain, exact, strict=True):
        if by_exact.is_floating_point():
            error = relative_error(tensor, by_exact) / allowed_error(by_plain, by_exact)
        else:
            error = 0.0 if torch.equal(tensor, by_exact) else math.inf
        worst = max(worst, error)
    return worst / (1.0 if contender == "op" else OTHERS_MAY)


def time_contender(make: Callable[[], Case], contender: str) -> dict[str, float]:
    """The figures of a contender at the shape of the cases that `make` makes."""
    case = make()
    times = time_call(lambda: make().call(contender), case.bytes, device())
    bandwidth = copy_bandwidth(device())
    figures = {
        "cold_us": round(1e6 * times.cold, 2),
        "warm_us": round(1e6 * times.warm, 2),
        "bandwidth_share": round(case.bytes / times.cold / bandwidth, 4),
    }
    if case.flops:
        figures["tflops"] = round(1e-12 * case.flops / times.cold, 3)
    return figures


# --- pytest-benchmark -------------------------------------------------------------------------


def over(shapes: Sequence[Shape], others: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Decorator of a benchmark's test: every shape with every contender."""

    def words(value: Any) -> str:
        return " ".join(map(str, value.values())) if isinstance(value, dict) else str(value)

    def decorate(test: Any) -> Any:
        contenders = ["op", *others, *DEFINITIONS]
        test = pytest.mark.parametrize("contender", contenders)(test)
        return pytest.mark.parametrize("shape", shapes, ids=words)(test)

    return decorate


def run(benchmark: Any, make: Callable[..., Case], shape: Shape, contender: str) -> None:
    """Check a contender, then time it under pytest-benchmark, whose own clock times the replay of a
    graph of one call on a GPU; `extra_info` gets the figures."""
    case = make(**shape)
    if contender not in (*case.others, "op", *DEFINITIONS):
        pytest.skip(f"{contender} is not installed or does not compute this")
    error = check(case, contender)
    assert error <= 1, f"{contender}: {error:.2f} times the error that is allowed"
    call, benchmark.group = case.call(contender), " ".join(map(str, shape.values()))
    benchmark.extra_info["error"] = error
    if not on_gpu():
        benchmark.pedantic(call.run, setup=call.restore, rounds=5, warmup_rounds=1)
        return
    benchmark.extra_info.update(time_contender(functools.partial(make, **shape), contender))
    graph = capture_calls([call.run])

    def replay() -> None:
        graph.replay()
        synchronize(device())

    benchmark.pedantic(replay, setup=call.restore, rounds=15, warmup_rounds=2)


# --- command ----------------------------------------------------------------------------------


def measure(
    name: str, write: Callable[[dict[str, Any]], None], *, check_only: bool, definitions: bool
) -> bool:
    """Every shape and contender of an op; returns whether the op itself was right at all."""
    module, right = importlib.import_module(f"benchmarks.bench_{name}"), True
    for shape in module.SHAPES:
        make = functools.partial(module.case, **shape)
        contenders = ["op", *make().others, *(DEFINITIONS if definitions else ())]
        if check_only:
            contenders = ["op"]
        cold: dict[str, float] = {}
        for contender in contenders:
            line: dict[str, Any] = {"op": name, "shape": shape, "contender": contender}
            try:
                line["error"] = check(make(), contender)
                if not check_only:
                    line |= time_contender(make, contender)
                    cold[contender] = line["cold_us"]
            except Exception as error:  # a contender that does not take a shape is out of it there
                line["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if contender == "op":
                right &= line.get("error", math.inf) <= 1
            elif contender in cold and "op" in cold:
                line["over_op"] = round(line["cold_us"] / cold["op"], 3)
            write(line)
        rivals = {other: us for other, us in cold.items() if other not in ("op", *DEFINITIONS)}
        if rivals and "op" in cold:
            best = min(rivals, key=rivals.__getitem__)
            write({"op": name, "shape": shape, "contender": "best of the others", "best": best,
                   "over_op": round(rivals[best] / cold["op"], 3)})  # fmt: skip
    return right


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="ops", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", choices=OPS, nargs="+", default=OPS, metavar="OP",
                        help=f"these of {', '.join(OPS)}")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="check the ops, time nothing")
    parser.add_argument("--definitions", action="store_true", help="time the definitions as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every line")
    args = parser.parse_args(argv)
    try:
        check_writable("--json", args.json)
    except ValueError as error:
        parser.error(str(error))
    words = sys.argv[1:] if argv is None else argv
    about = describe_run(" ".join(["python -m benchmarks.ops", *words]), device())
    record: dict[str, Any] = {"benchmark": "ops", **about, "lines": []}

    def write(line: dict[str, Any]) -> None:
        record["lines"].append(line)
        print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)
        if args.json:
            write_json(args.json, record)

    right = [
        measure(name, write, check_only=args.check, definitions=args.definitions)
        for name in args.op
    ]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
