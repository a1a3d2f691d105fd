"""The benchmarks of single ops: their shapes, their contenders, and the command.

    python -m benchmarks.ops --op window_attention token_confidence --json ops.json
    python -m pytest benchmarks/ops.py -k window_attention

`BENCHMARKS` lists the shapes of each op, those of the targets first, and the function of
`op_cases.py` or `attention_cases.py` that makes a `Case` of a shape. `op_case.py` checks and times
it.

On a GPU the figures are microseconds with a cold and a warm L2, the share of the copy bandwidth
that the needed bytes amount to in the cold time, and TFLOP/s. On a CPU the shapes are small, "op"
runs the definition, and the figures only show that the benchmark works.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import benchmark_parser, describe_benchmark
from benchmarks.attention_cases import MODELS, refresh_attention_case, window_attention_case
from benchmarks.op_case import DEFINITIONS, Case, check, device, on_gpu, time_contender
from benchmarks.op_cases import (
    HEADS,
    LAYERS,
    OUTPUTS,
    RULES,
    linear_add_norm_case,
    lm_head_confidence_case,
    place_rows_case,
    rope_write_kv_case,
    token_confidence_case,
    unmask_and_slide_case,
    window_linear_case,
)
from dsb_runtime.cli.process import run_process
from dsb_runtime.files import write_json
from dsb_runtime.measure.command import check_arguments
from dsb_runtime.measure.timing import capture_calls, timed

Shape = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """An op's shapes: for each the values of `names`, arguments of `make`."""

    make: Callable[..., Case]
    names: str
    gpu: list[tuple[Any, ...]]
    cpu: list[tuple[Any, ...]]
    others: tuple[str, ...] = ()  # contenders beside the op and its definition

    @property
    def shapes(self) -> list[Shape]:
        return self.named(self.gpu if on_gpu() else self.cpu)

    def named(self, shapes: Sequence[tuple[Any, ...]]) -> list[Shape]:
        names = self.names.split()
        return [dict(zip(names, each, strict=True)) for each in shapes]

    def case(self, **shape: Any) -> Case:
        torch.manual_seed(0)
        return self.make(**shape)


def large(names: dict[str, Any]) -> list[str]:
    return [name for name in names if not name.startswith("small")]


V = 126464  # LLaDA-8B
PLAIN, SAMPLED = ("probability", 0.0), ("probability", 1.0)
BENCHMARKS = {
    "token_confidence": Benchmark(
        token_confidence_case, "candidates V confidence temperature",
        [*((n, v, *PLAIN) for n in (1024, 64, 32, 256) for v, _ in list(HEADS.values())[:3]),
         (4096, V, *PLAIN), (64, V, "margin", 0.0), (64, V, "entropy", 0.0),
         (64, V, *SAMPLED), (1024, V, *SAMPLED)],
        [(8, 3000, *PLAIN), (8, 3000, "margin", 0.0), (8, 3000, *SAMPLED)],
        ("float64",),
    ),
    "lm_head_confidence": Benchmark(
        lm_head_confidence_case, "model candidates",
        [(m, n) for n in (64, 32, 128, 16, 96, 256) for m in large(HEADS)],
        [("small", 4), ("small", 32)],
        ("matmul + op",),
    ),
    "window_attention": Benchmark(
        window_attention_case, "model batch width positions",
        [*(("LLaDA-8B", 1, W, C) for C in (4096, 16384) for W in (64, 128, 32)),
         *(("Dream-7B", 1, W, C) for C in (16384, 4096) for W in (128, 64, 32)),
         *(("iLLaDA-8B", 1, W, C) for C in (4096, 16384) for W in (64, 128, 32)),
         *((m, 1, 64, 1024) for m in MODELS), *((m, 8, 64, 4096) for m in MODELS),
         *((m, 1, 256, 4096) for m in MODELS),
         *((m, 64, 64, 4096) for m in MODELS if m != "LLaDA-8B")],
        [("LLaDA-8B", 1, 8, 96), ("Dream-7B", 2, 8, 96)],
        ("sdpa", "flex", "flash"),
    ),
    "refresh_attention": Benchmark(
        refresh_attention_case, "model positions length",
        [(m, 1280, n) for m in ("LLaDA-8B", "Dream-7B") for n in (1280, 1256)],
        [("LLaDA-8B", 32, 32), ("Dream-7B", 32, 25)],
        ("sdpa", "cudnn", "varlen"),
    ),
    "rope_write_kv": Benchmark(
        # The cache's length changes nothing; a short one leaves memory for many of them.
        rope_write_kv_case, "model batch width positions",
        [(m, B, W, 1024) for B in (1, 8) for W in (64, 32, 128, 256) for m in MODELS],
        [("LLaDA-8B", 1, 8, 64), ("Dream-7B", 2, 8, 64)],
    ),
    "window_linear": Benchmark(
        window_linear_case, "layer num_tokens",
        [(layer, n) for n in (64, 32, 128, 16, 56) for layer in large(LAYERS)],
        [(layer, n) for n in (4, 32) for layer in ("small", "small gated")],
        ("matmul",),
    ),
    "linear_add_norm": Benchmark(
        linear_add_norm_case, "layer num_tokens",
        [(layer, n) for n in (64, 32, 128, 16, 56) for layer in large(OUTPUTS)],
        [("small out", 4), ("small out", 32)],
        ("cuBLAS",),
    ),
    "place_rows": Benchmark(
        place_rows_case, "kind batch num_rows prompt response",
        [*((kind, B, B, 1024, 256) for kind in ("window", "refresh") for B in (1, 8, 64)),
         ("window", 64, 16, 1024, 256), ("refresh", 1, 1, 16128, 256)],
        [("window", 2, 2, 16, 64), ("window", 4, 2, 16, 64), ("refresh", 2, 1, 16, 64)],
    ),
    "unmask_and_slide": Benchmark(
        unmask_and_slide_case, "rule batch prompt response",
        [*((rule, B, 1024, 256) for B in (1, 8, 64) for rule in RULES),
         ("threshold", 1, 1024, 4096)],
        [(rule, 2, 16, 64) for rule in RULES],
    ),
}  # fmt: skip


def words(value: Any) -> str:
    return " ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(
    ("op", "shape", "contender"),
    [
        (op, shape, contender)
        for op, each in BENCHMARKS.items()
        for shape in each.shapes
        for contender in ("op", *each.others, *DEFINITIONS)
    ],
    ids=words,
)
def test_op(benchmark: Any, op: str, shape: Shape, contender: str) -> None:
    """Check a contender, then time it under pytest-benchmark, whose own clock times the replay of a
    graph of one call on a GPU; `extra_info` gets the figures."""
    make = functools.partial(BENCHMARKS[op].case, **shape)
    case = make()
    if contender not in (*case.others, "op", *DEFINITIONS):
        pytest.skip(f"{contender} is not installed or does not compute this")
    error = check(case, contender)
    assert error <= 1, f"{contender}: {error:.2f} times the error that is allowed"
    call, benchmark.group = case.call(contender), f"{op} {words(shape)}"
    benchmark.extra_info["error"] = error
    if not on_gpu():
        benchmark.pedantic(call.run, setup=call.restore, rounds=5, warmup_rounds=1)
        return
    benchmark.extra_info.update(time_contender(make, contender))
    replay = functools.partial(timed, capture_calls([call.run]).replay, device())
    benchmark.pedantic(replay, setup=call.restore, rounds=15, warmup_rounds=2)


def measure(name: str, *, definitions: bool) -> Iterator[dict[str, Any]]:
    """The figures of every shape and contender of an op, whose results are checked first."""
    for shape in BENCHMARKS[name].shapes:
        make = functools.partial(BENCHMARKS[name].case, **shape)
        cold: dict[str, float] = {}
        for contender in ("op", *make().others, *(DEFINITIONS if definitions else ())):
            line: dict[str, Any] = {"op": name, "shape": shape, "contender": contender}
            try:
                line["error"] = check(make(), contender)
                line |= time_contender(make, contender)
                cold[contender] = line["cold_us"]
            except Exception as error:  # a contender may not take this shape
                line["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if contender != "op" and {contender, "op"} <= cold.keys():
                line["over_op"] = round(cold[contender] / cold["op"], 3)
            yield line
        rivals = {other: us for other, us in cold.items() if other not in ("op", *DEFINITIONS)}
        if rivals and "op" in cold:
            best = min(rivals, key=rivals.__getitem__)
            yield {"op": name, "shape": shape, "contender": "best of the others", "best": best,
                   "over_op": round(rivals[best] / cold["op"], 3)}  # fmt: skip


def run_lines(record: dict[str, Any], lines: Iterable[dict[str, Any]], path: Path | None) -> int:
    """Print the lines and write them as they come. Returns 1 if an op is wrong, else 0."""
    record["lines"], right = [], True
    for line in lines:
        right &= line["contender"] != "op" or line.get("error", math.inf) <= 1
        record["lines"].append(line)
        print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)
        if path:
            write_json(path, record)
    return int(not right)


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("ops", __doc__)
    add = parser.add_argument
    add("--op", choices=BENCHMARKS, nargs="+", metavar="OP",
        help=f"these of {', '.join(BENCHMARKS)}")  # fmt: skip
    add("--definitions", action="store_true", help="time the definitions as well")
    add("--json", type=Path, metavar="FILE", help="written after every line")
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    measured = (measure(op, definitions=args.definitions) for op in args.op or BENCHMARKS)
    record = describe_benchmark("ops", argv, device())
    return run_lines(record, itertools.chain.from_iterable(measured), args.json)


if __name__ == "__main__":
    sys.exit(run_process("ops", main))
