"""The budget of a decoding step: bytes, FLOPs and the least time they take, phase by phase.

    python -m benchmarks.roofline --preset llada-8b --gpu h100

The command counts window steps and refreshes from the model's shapes (`step_cost.py`) and divides
by a bandwidth and a speed of matrix products: those of the data sheet (`--gpu`), of the options
`--bandwidth` and `--tflops`, or of a run of `benchmarks/decode.py` (`--measured`). The times of
that run then stand beside the floor, also those of phases if it had `--phases`.

A floor is not a measurement. What a phase hands on may stay in the L2 cache, so that a step can be
faster than its floor by what the activations take, and by no more.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import benchmark_parser
from benchmarks.step_cost import (
    LAYER_PHASES,
    OUTSIDE,
    StepSize,
    step_cost,
    total,
    total_cost,
    weight_bytes,
)
from dsb_runtime.cli.process import run_process
from dsb_runtime.config import MAX_INT
from dsb_runtime.files import read_json, write_json
from dsb_runtime.measure.command import check_arguments, table_of, wide_console
from dsb_runtime.measure.models import PRESETS, Preset

KINDS = ("window", "refresh")
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
# These hold where neither the command line nor the file of --measured says it.
SHAPE_DEFAULTS = {
    "preset": None, "prompt": 1024, "gen": 256, "block": 32, "batch": 1, "dtype": "bfloat16",
    "tokens_per_forward": 3.5,
}  # fmt: skip


@dataclass(frozen=True)
class Ceilings:
    """The bandwidth and the speed that floors divide by."""

    gb_per_s: float
    tflops: float  # dense
    source: str


# Memory bandwidth and dense bfloat16 (half of the sheets' figure, which is with sparsity).
GPUS = {
    "h100": Ceilings(3350, 989.5, "NVIDIA H100 data sheet, SXM"),
    "h200": Ceilings(4800, 989.5, "NVIDIA H200 data sheet, SXM"),
    "b200": Ceilings(8000, 2250, "NVIDIA HGX B200 data sheet, one of eight GPUs"),
}


@dataclass(frozen=True)
class Budget:
    """One kind of step at its floor."""

    kind: str
    size: StepSize
    phases: dict[str, dict[str, Any]]  # by phase: bytes, FLOPs, floor_us, one_layer_us, limit
    floor_ms: float
    weights_ms: float  # the weights alone, once
    products_ms: float  # the matrix products alone


def budget(preset: Preset, kind: str, size: StepSize, ceilings: Ceilings) -> Budget:
    """Cost and floor of every phase of a step."""
    bandwidth, flops, phases = ceilings.gb_per_s * 1e9, ceilings.tflops * 1e12, {}
    for name, costs in step_cost(preset, size).items():
        seconds = [cost.seconds(bandwidth, flops) for cost in costs]
        middle = (len(costs) - 1) // 2  # not the last layer, which is cheaper
        phases[name] = {
            **asdict(total(costs)),
            "bytes": total(costs).bytes,
            "floor_us": sum(seconds) * 1e6,
            "one_layer_us": seconds[middle] * 1e6 if name in LAYER_PHASES else None,
            "limit": "FLOPs" if costs[middle].flops / flops == seconds[middle] else "bytes",
        }
    whole, floor_us = total_cost(preset, size), sum(phase["floor_us"] for phase in phases.values())
    return Budget(
        kind, size, phases, floor_ms=floor_us * 1e-3, weights_ms=whole.weights / bandwidth * 1e3,
        products_ms=whole.flops / flops * 1e3,
    )  # fmt: skip


def refresh_share(block: int, tokens_per_forward: float) -> float:
    """Share of refreshes among forwards: the forward after `block` commits is one."""
    return 1 / math.ceil(block / tokens_per_forward)


def step_sizes(
    preset: Preset, batch: int, prompt: int, gen: int, block: int, width: int | None, itemsize: int
) -> dict[str, StepSize]:
    """Sizes of both kinds of step, every batch row in the same one. `width`: positions of a window,
    None for the block and the family's prefix window."""
    length = prompt + gen
    window = min(block + preset.family.prefix_window, length) if width is None else width
    scored = batch * block
    return {
        "window": StepSize(batch, batch * window, scored, length, gen, itemsize),
        "refresh": StepSize(batch, batch * length, scored, length, gen, itemsize),
    }


def read_measured(path: Path, batch: int | None) -> dict[str, Any]:
    """The run of that batch in a file that `benchmarks/decode.py` wrote, with the file's settings.
    Raise ValueError where it is not such a file or has no run of that batch."""
    record = read_json(path, "--measured")
    try:
        runs = {run["batch"]: run for run in record["runs"]}
        if batch is not None and batch not in runs:
            raise ValueError(f"--batch {batch}: --measured {path} has {sorted(runs)}")
        run = runs[batch] if batch is not None else next(iter(runs.values()))
        device = record["machine"]["device"]
        measured = {**record["settings"], **record["ceilings"], "device": device, **run}
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"--measured {path}: expected the JSON of benchmarks/decode.py") from error
    for name in ("window_step_ms", "refresh_step_ms", "window_width"):
        if measured.get(name) is None:
            raise ValueError(f"--measured {path} has no {name}: expected that of decode.py")
    return measured


def find_ceilings(args: argparse.Namespace, measured: dict[str, Any] | None) -> Ceilings:
    """The ceilings of the command line, else those of the data sheet, else the measured ones."""
    if (args.bandwidth is None) != (args.tflops is None):
        alone = "--bandwidth" if args.tflops is None else "--tflops"
        raise ValueError(f"{alone} alone: expected --bandwidth and --tflops together")
    if args.bandwidth is not None:
        return Ceilings(args.bandwidth, args.tflops, "command line")
    if args.gpu is not None:
        if args.dtype == "float32":
            raise ValueError(
                "--dtype float32: data sheet figures are for 16 bits; expected bfloat16 or "
                "float16, or --bandwidth and --tflops"
            )
        return GPUS[args.gpu]
    if measured is not None:
        source = f"measured on {measured['device']}"
        return Ceilings(measured["copy_gb_per_s"], measured["matmul_tflops"], source)
    raise ValueError("no ceilings: expected --gpu, --bandwidth and --tflops, or --measured")


def settle(args: argparse.Namespace) -> dict[str, Any] | None:
    """Fill in the shape from the measurement or the defaults; returns the measurement. Raise
    ValueError for an argument that contradicts another or the measurement."""
    measured = None if args.measured is None else read_measured(args.measured, args.batch)
    for name, default in SHAPE_DEFAULTS.items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        known = default if measured is None else measured.get(name, default)
        if value is None:
            setattr(args, name, known)
        elif measured is not None and name != "tokens_per_forward" and value != known:
            raise ValueError(f"{flag} {value}: --measured {args.measured} has {known}")
    if args.width is None and measured is not None:
        args.width = round(measured["window_width"])
    if args.preset not in PRESETS:
        raise ValueError(f"--preset {args.preset}: expected one of {', '.join(PRESETS)}")
    check_most("--block", args.block, "--gen", args.gen)
    check_most("--width", args.width or 0, "--prompt + --gen", args.prompt + args.gen)
    check_most("--tokens-per-forward", args.tokens_per_forward, "--block", args.block)
    return measured


def check_most(name: str, value: float, bound: str, most: int) -> None:
    """Raise ValueError if `value` is more than the value of the options that `bound` names."""
    if value > most:
        raise ValueError(f"{name} {value:g}: expected at most {bound}, {most}")


def phase_table(step: Budget, measured: dict[str, Any] | None) -> Table:
    """Phases down, cost and floor across, the measurement beside where there is one."""
    columns = ["phase", "weights MB", "K/V MB", "activations MB", "GFLOP", "floor µs",
               "limited by", "one layer µs"]  # fmt: skip
    times: dict[str, float] = {}
    if measured is not None:
        times = measured.get("phase_us", {}).get(step.kind, {})
        columns += ["measured µs", "floor / measured"]

    def line(name: str, cost: dict[str, Any], us: float | None) -> list[str]:
        one = cost.get("one_layer_us")
        cells = [name if one is None else f"layer: {name}"]
        cells += [f"{cost[kind] / 1e6:.1f}" for kind in ("weights", "cache", "activations")]
        cells += [f"{cost['flops'] / 1e9:.1f}", f"{cost['floor_us']:.1f}", cost.get("limit", "")]
        cells.append("" if one is None else f"{one:.2f}")
        if measured is not None:
            cells += ["", ""] if us is None else [f"{us:.1f}", f"{cost['floor_us'] / us:.0%}"]
        return cells

    size, caption = step.size, None
    lines = [line(name, phase, times.get(name)) for name, phase in step.phases.items()]
    if OUTSIDE in times:
        lines.append(["outside of phases", *[""] * 7, f"{times[OUTSIDE]:.1f}", ""])
        caption = "phases: of steps launched kernel by kernel; mlp with its norm; sum: timed"
    table = table_of(
        columns, lines, left=(0, columns.index("limited by")), title_justify="left",
        title=f"{step.kind} step: batch {size.batch}, {size.num_tokens} tokens, {size.scored} of "
        f"them scored, {size.length} positions", caption=caption,
    )  # fmt: skip
    table.add_section()
    kinds = ("weights", "cache", "activations", "flops", "floor_us")
    sums = {kind: sum(phase[kind] for phase in step.phases.values()) for kind in kinds}
    whole = None if measured is None else 1e3 * measured[f"{step.kind}_step_ms"]
    table.add_row(*line("sum", sums, whole), style="bold")
    return table


def positive(kind: type) -> Any:
    """A parser of numbers above 0."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            number = kind(text)
            if 0 < number < math.inf and (kind is float or number <= MAX_INT):
                return number
            if kind is int and number > MAX_INT:
                raise argparse.ArgumentTypeError(f"{text[:99]!r}: expected at most {MAX_INT}")
        accepted = "an int" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text[:99]!r}: expected {accepted} above 0")

    return parse


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser("roofline", __doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="which model's shapes")
    add("--gpu", choices=GPUS, help="ceilings of its data sheet")
    add("--bandwidth", type=positive(float), help="ceiling in GB/s, with --tflops")
    add("--tflops", type=positive(float), help="ceiling in dense TFLOP/s, with --bandwidth")
    add("--prompt", type=positive(int), help="prompt tokens (1024)")
    add("--gen", type=positive(int), help="response positions (256)")
    add("--block", type=positive(int), help="block length (32)")
    add("--width", type=positive(int), help="positions of a window (block + prefix window)")
    add("--batch", type=positive(int), help="prompts decoded together (1)")
    add("--dtype", choices=ITEMSIZE, help="of weights and activations (bfloat16)")
    add("--tokens-per-forward", type=positive(float), help="committed by a row's forward (3.5)")
    add("--refresh-share", type=positive(float), help="of forwards (one a --block commits)")
    add("--measured", type=Path, help="JSON of benchmarks/decode.py, to stand beside")
    add("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    try:
        measured = settle(args)
        ceilings = find_ceilings(args, measured)
        share = args.refresh_share or (measured or {}).get("refresh_share")
        share = share or refresh_share(args.block, args.tokens_per_forward)
        if share > 1:
            raise ValueError(f"--refresh-share {share:g}: expected a number in (0, 1]")
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    preset = PRESETS[args.preset]
    sizes = step_sizes(
        preset, args.batch, args.prompt, args.gen, args.block, args.width, ITEMSIZE[args.dtype]
    )
    steps = {kind: budget(preset, kind, sizes[kind], ceilings) for kind in KINDS}
    shares = {"window": 1 - share, "refresh": share}
    step_ms = sum(part * steps[kind].floor_ms for kind, part in shares.items())
    tokens = args.batch * args.tokens_per_forward
    result = {
        "preset": args.preset, "dtype": args.dtype, "prompt": args.prompt, "gen": args.gen,
        "block": args.block, "batch": args.batch, "ceilings": asdict(ceilings),
        "weight_bytes": weight_bytes(preset, ITEMSIZE[args.dtype]),
        "tokens_per_forward": args.tokens_per_forward, "refresh_share": share,
        "steps": {kind: asdict(step) for kind, step in steps.items()},
        "step_ms": step_ms, "tokens_per_second": tokens / step_ms * 1e3,
    }  # fmt: skip

    console = wide_console()
    console.print(
        f"{args.preset}, {args.dtype}, {result['weight_bytes'] / 1e9:.2f} GB of weights; ceilings "
        f"{ceilings.gb_per_s:g} GB/s and {ceilings.tflops:g} TFLOP/s ({ceilings.source})"
    )
    for step in steps.values():
        console.print(phase_table(step, measured))
        console.print(
            f"{step.kind} step: floor {step.floor_ms:.3f} ms; weights alone "
            f"{step.weights_ms:.3f} ms, matrix products alone {step.products_ms:.3f} ms\n"
        )
    lines = [("floor", step_ms)]
    if measured is not None:
        whole_ms = sum(part * measured[f"{kind}_step_ms"] for kind, part in shares.items())
        result["measured"] = {
            **{f"{kind}_step_ms": measured[f"{kind}_step_ms"] for kind in KINDS},
            "step_ms": whole_ms, "tokens_per_second": tokens / whole_ms * 1e3,
            "share_of_floor": step_ms / whole_ms,
        }  # fmt: skip
        lines.append((f"measured on {measured['device']}", whole_ms))
    for name, ms in lines:
        console.print(
            f"{name}: {ms:.3f} ms a step with {share:.1%} refreshes; {tokens / ms * 1e3:.1f} "
            f"tokens/s at {args.tokens_per_forward:g} tokens per forward"
        )
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    sys.exit(run_process("roofline", main))
