"""Decoding end to end against a plain eager loop, the bare linear layers and the machine's limits.

    python -m benchmarks.decode --preset 60m --device cpu --json decode.json --plot decode.png
    python -m benchmarks.decode --preset llada-8b --device cuda --dtype bfloat16 --batch 1 8 32

builds a random model of real shapes on the device and decodes with it in this package and in the
loop of `eager.py`, which runs the prompts of a batch one after another.

float32: the LM head is scaled so that the threshold rule commits about `--tokens-per-forward`;
unless both loops commit the same tokens at the same forwards, nothing is timed. 16 bits: rounding
flips near ties, so our run under the quota rule, of gen / tokens-per-forward forwards, is recorded
and the eager loop is driven along it: each forward starts from the recorded canvas and window, and
the share of decisions on which both agree there is printed.

Timed in turn with both loops are the linear layers alone, of the same forwards (`floor.py`): with
the LM head on the rows that can be unmasked, as ours, or on all rows of a forward, as published
loops. Ratios are medians pair by pair, so that a drifting machine cancels. Steps are timed one by
one in further runs, in which the host looks at each before it launches the next; `--phases` times
the phases in them in a run of its own.

A GPU's idle share is the time in which no kernel runs, the gaps between kernels included; of it
"between steps" is what the GPU waits for the host. `--no-eager` leaves the eager loop out, which
takes a large batch's prompts one by one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import dsb_runtime as dsb
from benchmarks.ceilings import (
    copy_gb_per_s,
    gpu_busy_seconds,
    matmul_tflops,
    peak_memory,
    reset_peak_memory,
)
from benchmarks.decode_report import draw_runs, print_runs, step_figures
from benchmarks.eager import EagerOutput, eager_generate
from benchmarks.floor import ForwardRows, LinearFloor
from benchmarks.presets import (
    PRESETS,
    Preset,
    check_device,
    check_prompt_length,
    check_tokens,
    random_model,
    random_prompt,
)
from benchmarks.roofline import Ceilings, positive
from benchmarks.step_cost import total_cost
from benchmarks.step_times import TimedEngine, phase_times
from benchmarks.trajectory import Agreement, Recorder, StepClock, StepTimes, agreement
from dsb_runtime.cli.main import OneLineParser
from dsb_runtime.config import check_int
from dsb_runtime.files import check_writable, write_json
from dsb_runtime.measure.bench import describe_machine, describe_versions
from dsb_runtime.measure.limits import timed
from dsb_runtime.measure.plots import check_picture

DTYPES = ("float32", "bfloat16", "float16")


@torch.no_grad()
def scale_head(engine: dsb.Engine, prompt: Tensor, settings: dict[str, Any], target: float) -> None:
    """Scale the logits until about `target` tokens commit per forward.

    A random model is never sure; sharper logits stand in for a trained one's confidence. The final
    norm's gain is scaled, since the LM head may be the embedding as well.
    """
    gain = engine.model.model.norm.weight
    low, high, original = 8.0, 512.0, gain.clone()
    for _ in range(8):
        scale = (low * high) ** 0.5
        gain.copy_(original * scale)
        reached = settings["gen_length"] / engine.generate(prompt, **settings).nfe
        if abs(reached - target) < 0.5:
            return
        low, high = (scale, high) if reached < target else (low, scale)


class Case:
    """One batch of prompts: both loops over it, checked against each other when it is made; or,
    without `compare`, ours alone.

    Raises:
        SystemExit: what would be timed does other work.
    """

    def __init__(
        self, engine: dsb.Engine, prompt: Tensor, settings: dict[str, Any], compare: bool = True
    ) -> None:
        self.engine, self.prompt, self.settings = engine, prompt, settings
        self.model = model = engine.model
        self.exact = model.dtype == torch.float32
        self.record = Recorder(prompt.shape[1], model.dtype.itemsize)
        reset_peak_memory(model.device)
        self.out = self.ours(self.record)
        self.peak = peak_memory(model.device)
        # What is timed is not watched, and then steps may be wider: in 16 bits that may round
        # otherwise and flip a near tie, but never change how many commit.
        free = self.ours()
        self.repeats = torch.equal(free.sequences, self.out.sequences)
        self.agreed = self.check(self.eager()) if compare else None
        same_work = free.tokens_per_forward == self.out.tokens_per_forward
        if not same_work or (self.exact and not self.repeats):
            raise SystemExit("decode: a watched run decides differently: nothing is timed")

    def ours(self, on_step: Callable[[dsb.StepEvent], None] | None = None) -> dsb.GenerationOutput:
        return self.engine.generate(self.prompt, on_step=on_step, **self.settings)

    def eager(self, clock: StepClock | None = None) -> list[EagerOutput]:
        """One prompt after another, driven along our run where rounding may flip a decision."""
        names = ("gen_length", "block_length", "max_block_length", "threshold", "steps")
        settings = {name: self.settings.get(name) for name in names}
        found = []
        for row in range(len(self.prompt)):
            if clock is not None:
                clock.restart()
            found.append(
                eager_generate(
                    self.model,
                    self.prompt[row : row + 1],
                    prefix_window=self.settings["prefix_window"],
                    follow=None if self.exact else self.record.rows[row],
                    on_step=clock,
                    **settings,
                )
            )
        return found

    def check(self, eager: list[EagerOutput]) -> Agreement:
        """How far both loops' decisions agree; float32 accepts nothing but all."""
        found = Agreement(0, 0, 0)
        for row, other in enumerate(eager):
            steps = self.record.rows[row]
            if self.exact and not torch.equal(self.out.sequences[row], other.sequences[0]):
                raise SystemExit("decode: the loops return different tokens: nothing is timed")
            if self.exact and [step.commits for step in steps] != other.commits:
                raise SystemExit("decode: the loops commit differently: nothing is timed")
            found += agreement(steps, other.commits)
        return found


def time_steps(
    run: Callable[[Callable[[dsb.StepEvent], None]], object], engine: TimedEngine
) -> StepTimes:
    """One run, given an `on_step`: watched, so that its steps are those that were recorded."""
    engine.take()
    run(lambda event: None)
    return engine.take()


def measure(
    case: Case, engine: TimedEngine, ceilings: Ceilings, preset: Preset, rounds: int
) -> dict[str, Any]:
    """Everything that is reported of one batch."""
    device, record = case.model.device, case.record
    forwards = record.forwards
    floor = LinearFloor(case.model, max(f.hidden for f in forwards))
    ours, eager, inside = StepTimes(), StepClock(device), []
    runs: dict[str, Callable[[], object]] = {
        "ours": case.ours,
        "eager": lambda: case.eager(eager),
        "floor": lambda: floor.run(forwards),
        "floor_all_rows": lambda: floor.run([ForwardRows(f.hidden, f.hidden) for f in forwards]),
    }
    if case.agreed is None:
        del runs["eager"]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(rounds), desc=f"batch {len(case.prompt)}", disable=None):
        for name, run in runs.items():
            engine.take()
            seconds[name].append(timed(run, device)[1])
            if name == "ours":
                inside.append(sum(engine.take().seconds) / seconds[name][-1])
        ours.add(time_steps(case.ours, engine))

    def ratio(a: str, b: str) -> float | None:
        if not {a, b} <= runs.keys():
            return None
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = sum(case.out.row_tokens)
    steps = step_figures(record, ours, preset, ceilings)
    flops = sum(total_cost(preset, shape).flops for shape in record.shapes)
    agreed = case.agreed
    window = [w for w, kind in zip(record.windows, record.kinds, strict=True) if kind == "window"]
    eager_ms = {
        kind: 1e3 * statistics.median(found)
        for kind in ("window", "refresh")
        if (found := [s for s, k in zip(eager.seconds, eager.kinds, strict=True) if k == kind])
    }
    return {
        "batch": len(case.prompt),
        "forwards": case.out.nfe,
        "tokens": tokens,
        "tokens_per_forward": record.tokens / record.row_forwards,
        "refresh_share": record.kinds.count("refresh") / len(record.kinds),
        "window_rows": statistics.mean(window) if window else None,
        "check": None if agreed is None else {
            "same_tokens": case.exact,
            "decisions": agreed.decisions,
            "positions_agreed": agreed.positions / agreed.decisions,
            "decisions_agreed": agreed.both / agreed.decisions,
        },
        "timed_run_repeats_the_recorded": case.repeats,
        "seconds": medians,
        "tokens_per_second": tokens / medians["ours"],
        "eager_tokens_per_second": None if agreed is None else tokens / medians["eager"],
        "share_of_products_limit": flops / ceilings.flops / medians["ours"],
        "ours_over_eager": ratio("ours", "eager"),
        "ours_over_floor": ratio("ours", "floor"),
        "ours_over_floor_all_rows": ratio("ours", "floor_all_rows"),
        "floor_over_eager": ratio("floor", "eager"),
        "floor_all_rows_over_eager": ratio("floor_all_rows", "eager"),
        "steps": steps,
        "window_step_ms": steps["window"]["ms"] if "window" in steps else None,
        "refresh_step_ms": steps["refresh"]["ms"] if "refresh" in steps else None,
        "eager_window_step_ms": eager_ms.get("window"),
        "eager_refresh_step_ms": eager_ms.get("refresh"),
        "gpu_wait_share": 1 - statistics.median(inside) if device.type == "cuda" else None,
        "peak_memory_bytes": case.peak,
    }  # fmt: skip


def idle_share(case: Case, run: dict[str, Any]) -> float | None:
    """Share of a decoding in which the GPU runs nothing. After all timing: what the profiler hooks
    into the driver stays there."""
    case.ours()  # a larger batch may have displaced what was captured
    busy = gpu_busy_seconds(case.ours, case.model.device)
    return None if busy is None else 1 - busy / run["seconds"]["ours"]


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="decode", description=__doc__.split("\n")[0])
    add, above = parser.add_argument, positive(int)
    add("--preset", choices=PRESETS, default="60m", help="model shapes (60m)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=DTYPES, help="bfloat16 on cuda, float32 on cpu")
    add("--batch", type=above, nargs="+", default=[1], metavar="N", help="one run for each")
    add("--prompt", type=above, default=512, help="prompt tokens (512)")
    add("--gen", type=above, default=128, help="response positions (128)")
    add("--block", type=above, default=32, help="block length (32)")
    add("--max-block", type=above, help="maximal block length; unbounded without it")
    add("--prefix-window", type=int, help="rows before the window; the family's without it")
    add("--threshold", type=float, default=0.9, help="of the rule in float32 (0.9)")
    add("--tokens-per-forward", type=positive(float), default=3.5, help="aimed at (3.5)")
    add("--rounds", type=above, default=7, help="timed rounds (7)")
    add("--no-graphs", action="store_true", help="launch every kernel instead of CUDA graphs")
    add("--no-eager", action="store_true", help="do not compare with the eager loop")
    add("--phases", action="store_true", help="time the phases of steps as well, for roofline")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write the figures here")
    add("--plot", type=Path, metavar="FILE.png", help="draw them")
    return parser


def settings_of(args: argparse.Namespace, preset: Preset) -> dict[str, Any]:
    """The decoding's settings; ValueError for what cannot be."""
    check_device(args.device)
    if args.device == "cpu" and args.no_graphs:
        raise ValueError("--no-graphs: a CPU has none; expected it with --device cuda")
    check_tokens(args.tokens_per_forward, args.block)
    check_int("--seed", args.seed, 0, 2**63 - 1)
    check_prompt_length(args.prompt, args.gen)
    check_writable("--json", args.json)
    check_picture("--plot", args.plot)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    prefix = preset.family.prefix_window if args.prefix_window is None else args.prefix_window
    rule: dict[str, Any] = {"threshold": args.threshold}
    if args.dtype != "float32":
        rule = {"steps": max(1, round(args.gen / args.tokens_per_forward))}
    settings = {
        "gen_length": args.gen, "block_length": args.block, "max_block_length": args.max_block,
        "prefix_window": prefix, "schedule": "dsb", "cache": "dsb", **rule,
    }  # fmt: skip
    dsb.DecodingConfig(**settings)
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    try:
        settings = settings_of(args, preset)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    model = random_model(preset, dtype, device, args.seed)
    engine = TimedEngine(model, graphs=False if args.no_graphs else None)
    batches = list(dict.fromkeys(args.batch))
    prompts = random_prompt(preset, max(batches), args.prompt, args.seed).to(device)
    if dtype == torch.float32:
        scale_head(engine, prompts[:1], settings, args.tokens_per_forward)
    ceilings = Ceilings(copy_gb_per_s(device), matmul_tflops(dtype, device), "this run")
    result: dict[str, Any] = {
        "benchmark": "decode",
        "command": " ".join(["python -m benchmarks.decode", *(argv or sys.argv[1:])]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": describe_machine(device)["device"],
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "settings": {
            "preset": args.preset, "dtype": args.dtype, "prompt": args.prompt, "gen": args.gen,
            "block": args.block, "seed": args.seed, "rounds": args.rounds,
            "graphs": device.type == "cuda" and not args.no_graphs, **settings,
        },
        "ceilings": {"copy_gb_per_s": ceilings.gb_per_s, "matmul_tflops": ceilings.tflops},
        "eager": "the prompts of a batch one after another",
        "runs": [],
    }  # fmt: skip

    def keep() -> None:
        if args.json:
            write_json(args.json, result)

    cases = []
    for batch in batches:
        cases.append(Case(engine, prompts[:batch], settings, compare=not args.no_eager))
        result["runs"].append(measure(cases[-1], engine, ceilings, preset, args.rounds))
        keep()  # a larger batch may fail, and takes nothing along
    for case, run in zip(cases, result["runs"], strict=True):
        run["gpu_idle_share"] = idle_share(case, run)
        if args.phases:
            run["phase_us"] = phase_times(model, case.prompt, settings, case.record.kinds)
        keep()
    print_runs(result)
    if args.plot:
        draw_runs(result, args.plot)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("decode: interrupted; the batches that ended are in the file of --json, if given")
