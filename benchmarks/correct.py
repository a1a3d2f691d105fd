"""Each op against its definition in float64, at production shapes and with every option.

    python -m benchmarks.correct --op window_attention --precision float16 --json correct.json

The shapes are those that `ops.py` times, one for each launch configuration of 16 bits, and one for
each option that a step may use. Nothing is timed. On a GPU the command compiles what `ops.py` then
times. On a CPU the shapes are small, and what is checked is that the command works. `gpu_hour.py`
runs one such process for each op and precision side by side, in the memory of one GPU: no check may
need more than about 10 GB.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import benchmark_parser, describe_benchmark
from benchmarks.attention_cases import MODELS
from benchmarks.gpu_hour import WITHOUT_PRECISION
from benchmarks.op_case import check, device, on_gpu, timed_precision
from benchmarks.op_cases import HEADS, LAYERS, OUTPUTS, RULES
from benchmarks.ops import BENCHMARKS, Shape, run_lines
from dsb_runtime.cli.process import run_process
from dsb_runtime.measure.command import check_arguments

# One number for each class of a table of `dsb_kernels/_configs.py` whose sizes are tokens or
# candidates (29 does not fill its tile), then one that cuBLAS computes.
TOKENS = (16, 29, 64, 128, 200)
MOST_ROWS = 8  # of a batch that is checked: 64 rows of float64 scores, keys and values take 40 GB
WAYS = [
    {"confidence": "margin"}, {"confidence": "entropy"}, {"way": "eligible"},
    {"way": "excluded"}, {"temperature": 1.0}, {"temperature": 0.7, "way": "seeds"},
]  # fmt: skip


def scoring_shapes(op: str) -> list[Shape]:
    """Both ops that propose tokens, with each confidence, sampling and skipped candidates."""
    V = HEADS["LLaDA-8B" if on_gpu() else "small"][0]
    if op == "lm_head_confidence":
        whose: Shape = {"model": "LLaDA-8B" if on_gpu() else "small"}
        counts = TOKENS[:4] if on_gpu() else (5,)
    else:
        whose = {"V": V, "confidence": "probability", "temperature": 0.0}
        counts = (29, 128, 256, 1024) if on_gpu() else (5,)
    return [{**whose, "candidates": n, **way} for n in counts for way in ({}, *WAYS)]


def linear_shapes(layers: Sequence[str]) -> list[Shape]:
    counts = TOKENS if on_gpu() else (5,)
    return [{"layer": layer, "num_tokens": n} for layer in layers for n in counts]


def attention_shapes() -> list[Shape]:
    """Windows of every class, whose sizes are a group's queries, and each way to see the cache."""
    widths = {"LLaDA-8B": TOKENS[:4], "Dream-7B": (2, 4, 9, 16)} if on_gpu() else {"Dream-7B": (4,)}
    positions = 1283 if on_gpu() else 83
    ways = ("plain", "fresh", "rows", "blocks", "blocks of heads", "visible", "lse")
    shapes: list[Shape] = [
        {"model": model, "batch": 2, "width": width, "positions": positions, "way": way}
        for model, some in widths.items() for width in some for way in ways
    ]  # fmt: skip
    one: Shape = {"model": "LLaDA-8B", "batch": 1, "positions": positions}
    width = 128 if on_gpu() else 4
    shapes += [{**one, "width": width, "splits": splits} for splits in (1, 3, 4, 8)]
    heads, some = ((64, 256), widths["LLaDA-8B"]) if on_gpu() else ((16,), (4,))
    return shapes + [{**one, "width": w, "head_dim": d} for d in heads for w in some]


def refresh_shapes() -> list[Shape]:
    positions = 1280 if on_gpu() else 32
    return [{"model": m, "positions": positions, "length": positions - n}
            for m in MODELS for n in (0, 7)]  # fmt: skip


def rope_shapes() -> list[Shape]:
    widths, positions = ((16, 29, 64), 1283) if on_gpu() else ((5,), 83)
    return [
        {"model": model, "batch": 3, "width": width, "positions": positions, "way": way}
        for model in ("LLaDA-8B", "Dream-7B") for width in widths
        for way in ("plain", "rows", "short", "listed")
    ]  # fmt: skip


def unmask_shapes() -> list[Shape]:
    """Blocks of every class."""
    response, blocks = (1024, (32, 200, 600)) if on_gpu() else (64, (20,))
    return [
        {"rule": rule, "batch": 2, "prompt": 16, "response": response, "block": block}
        for rule in RULES for block in blocks
    ]  # fmt: skip


def more_shapes(op: str) -> list[Shape]:
    """What is checked beside the shapes that `ops.py` times."""
    some = ("LLaDA-8B", "Dream-7B") if on_gpu() else ("small",)
    layers = [layer for layer in (*LAYERS, *OUTPUTS) if layer.startswith(some)]
    return {
        "token_confidence": lambda: scoring_shapes(op),
        "lm_head_confidence": lambda: scoring_shapes(op),
        "window_attention": attention_shapes,
        "refresh_attention": refresh_shapes,
        "rope_write_kv": rope_shapes,
        "unmask_and_slide": unmask_shapes,
        "window_linear": lambda: linear_shapes([x for x in layers if x in LAYERS]),
        "linear_add_norm": lambda: linear_shapes([x for x in layers if x in OUTPUTS]),
    }.get(op, list)()


def shapes_of(op: str, is_timed: bool) -> list[Shape]:
    """What is checked: the shapes that `ops.py` times, where they are timed in this precision, and
    others. Fewer rows stand for large batches, whose launches have the same configuration."""
    shapes = [*(BENCHMARKS[op].shapes if is_timed else ()), *more_shapes(op)]
    if op == "window_attention":
        shapes = [{**shape, "batch": min(shape["batch"], MOST_ROWS)} for shape in shapes]
    return [shape for i, shape in enumerate(shapes) if shape not in shapes[:i]]


def check_op(op: str, precision: str) -> Iterator[dict[str, Any]]:
    """A line for each shape of an op."""
    options: Shape = {"precision": precision}
    if op in WITHOUT_PRECISION:
        if precision != timed_precision():
            return
        options = {}
    for shape in shapes_of(op, precision == timed_precision()):
        line = {"op": op, "shape": shape | options, "contender": "op"}
        try:
            yield line | {"error": check(BENCHMARKS[op].case(**shape, **options), "op")}
        except Exception as error:  # the other shapes are checked all the same
            yield line | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("correct", __doc__)
    add = parser.add_argument
    add("--op", choices=BENCHMARKS, nargs="+", metavar="OP",
        help=f"these of {', '.join(BENCHMARKS)}")  # fmt: skip
    add("--precision", choices=["bfloat16", "float16", "float32"], default=timed_precision(),
        help="of weights and activations (bfloat16 on a GPU, float32 on a CPU)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="written after every line")
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    lines = (line for op in args.op or BENCHMARKS for line in check_op(op, args.precision))
    return run_lines(describe_benchmark("correct", argv, device()), lines, args.json)


if __name__ == "__main__":
    sys.exit(run_process("correct", main))
