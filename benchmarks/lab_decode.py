"""The decoding parts of `benchmarks/lab.py`: the step at real shapes, by `benchmarks/decode.py`.

bfloat16, prompt 1024, gen 256, block 32, DSB Cache, 3.5 tokens per forward; on a CPU a tiny model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import decode
from benchmarks.decode import Case, idle_share, measure, time_steps
from benchmarks.decode_report import step_figures
from benchmarks.lab_state import MODELS, Lab
from benchmarks.measure import device, on_gpu
from benchmarks.presets import PRESETS, Preset, random_model, random_prompt
from benchmarks.step_times import TimedEngine, phase_times
from benchmarks.trajectory import Recorder, StepTimes
from dsb_runtime import StepEvent

ROUNDS = 3
BATCHES = (8, 32)
# Rows of a window: a block that does not grow and a prefix window of the rest, which is wider where
# the window moved further at once.
PREFIXES = {32: 0, 64: 32, 128: 96}
GPU_SHAPE = ("--prompt", "1024", "--gen", "256", "--block", "32")
CPU_SHAPE = ("--prompt", "24", "--gen", "32", "--block", "8")


@dataclass
class Bench:
    """A model with an engine, and prompts for it."""

    name: str
    preset: Preset
    engine: TimedEngine
    prompts: Tensor

    def settings(self, *options: str) -> tuple[argparse.Namespace, dict[str, Any]]:
        """What `benchmarks.decode` would do with these options."""
        shape = GPU_SHAPE if on_gpu() else CPU_SHAPE
        args = decode.build_parser().parse_args(
            ["--preset", self.name, "--device", device().type, "--dtype", "bfloat16", *shape,
             *options]
        )  # fmt: skip
        return args, decode.settings_of(args, self.preset)


def bench(lab: Lab, name: str) -> Bench:
    """Made once; a CPU takes a tiny model of the family. Another model's memory is given back."""
    if not on_gpu():
        name = "tiny-dream" if name == "dream-7b" else "tiny"
    key = f"model {name}"
    if key not in lab.kept:
        lab.release(MODELS)
        preset, (_, prompt, *_) = PRESETS[name], GPU_SHAPE if on_gpu() else CPU_SHAPE
        model = random_model(preset, torch.bfloat16, device())
        prompts = random_prompt(preset, max(BATCHES), int(prompt)).to(device())
        lab.kept[key] = Bench(name, preset, TimedEngine(model), prompts)
    return lab.kept[key]


def main_run(lab: Lab, name: str) -> tuple[Case, dict[str, Any]]:
    """Batch 1 beside the eager loop, measured once; its record goes into a file of its own, for
    `benchmarks.roofline --measured`."""
    made = bench(lab, name)
    key = f"main {made.name}"
    if key not in lab.kept:
        args, settings = made.settings()
        case = Case(made.engine, made.prompts[:1], settings)
        run = measure(case, made.engine, lab.ceilings(), made.preset, ROUNDS)
        lab.kept[key] = (case, run)
        keep_run(lab, made, args, settings, run)
    return lab.kept[key]


def keep_run(
    lab: Lab, made: Bench, args: argparse.Namespace, settings: dict[str, Any], run: dict[str, Any]
) -> None:
    """Write a run beside the lab's file, with the model's other batches."""
    ceilings, key = lab.ceilings(), f"decode {made.name}"
    others = [r for r in lab.details.get(key, {"runs": []})["runs"] if r["batch"] != run["batch"]]
    lab.details[key] = {
        **lab.about, "benchmark": "decode",
        "settings": {"preset": made.name, "dtype": args.dtype, "prompt": args.prompt,
                     "gen": args.gen, "block": args.block, "rounds": ROUNDS, **settings},
        "ceilings": {"copy_gb_per_s": ceilings.gb_per_s, "matmul_tflops": ceilings.tflops},
        "runs": [*others, run],
    }  # fmt: skip
    lab.beside(made.name, lab.details[key])


def decode_part(lab: Lab) -> None:
    """LLaDA-8B, batch 1, beside the eager loop; then windows of 32, 64 and 128 rows."""
    _, run = main_run(lab, "llada-8b")
    made = bench(lab, "llada-8b")
    report_run(lab, run, made.name)
    lab.figure("refresh", run["steps"]["refresh"]["share_of_products_limit"],
               f"{run['refresh_step_ms']:.2f} ms")  # fmt: skip
    lab.figure("eager", 1 / run["ours_over_eager"], f"{1e3 * run['seconds']['eager']:.0f} ms over "
               f"{1e3 * run['seconds']['ours']:.0f} ms; they agree on "
               f"{run['check']['decisions_agreed']:.1%}")  # fmt: skip
    for rows in PREFIXES:
        step = window_steps(lab, made, rows)
        lab.details[f"window {rows}"] = step
        lab.figure(f"window {rows}", step["share_of_weights_limit"],
                   f"{step['rows']:.0f} rows on average, {step['ms']:.2f} ms")  # fmt: skip


def window_steps(lab: Lab, made: Bench, rows: int) -> dict[str, Any]:
    """Figures of the window steps of a decoding, of so many rows. Watched runs alone: in 16 bits a
    near tie may fall otherwise in others, and then a bounded block may not hold what the quota asks
    for."""
    block, prefix = (32, PREFIXES[rows]) if on_gpu() else (8, PREFIXES[rows] // 4)
    _, settings = made.settings("--max-block", str(block), "--prefix-window", str(prefix))

    def run(each: Callable[[StepEvent], None]) -> None:
        made.engine.generate(made.prompts[:1], on_step=each, **settings)

    record = Recorder(made.prompts.shape[1], torch.bfloat16.itemsize)
    run(lambda event: None)  # compiles and captures
    run(record)
    times = StepTimes()
    for _ in range(ROUNDS):
        times.add(time_steps(run, made.engine))
    return step_figures(record, times, made.preset, lab.ceilings())["window"]


def report_run(lab: Lab, run: dict[str, Any], model: str) -> None:
    """Figures without a target of a batch."""
    batch, window = run["batch"], run["steps"]["window"]
    what = f"{model}, batch {batch}"
    lab.fact(f"{what}: tokens/s", run["tokens_per_second"], "tokens/s",
             f"{run['tokens_per_forward']:.2f} tokens per forward; {run['ours_over_floor']:.2f} of "
             "its linear layers' time")  # fmt: skip
    lab.fact(f"{what}: window step", window["ms"], "ms",
             f"{window['rows']:.0f} rows; {window['share_of_weights_limit']:.0%} of the weights' "
             f"limit, {window['share_of_floor']:.0%} of its floor")  # fmt: skip
    lab.fact(f"{what}: peak memory", run["peak_memory_bytes"] * 1e-9, "GB")


def batches(lab: Lab) -> None:
    """LLaDA-8B at larger batches, without the eager loop."""
    made = bench(lab, "llada-8b")
    args, settings = made.settings()
    for batch in BATCHES if on_gpu() else (2, 3):
        case = Case(made.engine, made.prompts[:batch], settings, compare=False)
        run = measure(case, made.engine, lab.ceilings(), made.preset, 1)
        keep_run(lab, made, args, settings, run)
        report_run(lab, run, made.name)
        name = batch if on_gpu() else BATCHES[batch - 2]  # a CPU takes a smaller one for each
        lab.figure(f"batch {name}", run["share_of_products_limit"],
                   f"batch {batch}: {run['tokens_per_second']:.0f} tokens/s")  # fmt: skip


def profile(lab: Lab) -> None:
    """GPU idle share and the time of each phase. After what is timed: a profiler leaves hooks."""
    case, run = main_run(lab, "llada-8b")
    made = bench(lab, "llada-8b")
    args, settings = made.settings()
    run["gpu_idle_share"] = idle_share(case, run)
    if run["gpu_idle_share"] is not None:  # before a second profiler beside captured graphs
        note = f"{run['gpu_wait_share']:.1%} between steps"
        lab.figure("idle", run["gpu_idle_share"], note)
    run["phase_us"] = phase_times(case.model, case.prompt, settings, case.record.kinds)
    keep_run(lab, made, args, settings, run)
    for kind, times in run["phase_us"].items():
        whole = sum(times.values())
        longest = sorted(times, key=times.get, reverse=True)[:4]
        note = ", ".join(f"{name} {times[name] / whole:.0%}" for name in longest)
        lab.fact(f"{made.name}, batch 1: {kind} step, kernel by kernel", whole * 1e-3, "ms", note)


def dream(lab: Lab) -> None:
    """Dream-7B, batch 1, beside the eager loop."""
    _, run = main_run(lab, "dream-7b")
    name = bench(lab, "dream-7b").name
    report_run(lab, run, name)
    lab.fact(f"{name}, batch 1: eager loop over ours", 1 / run["ours_over_eager"], "x")
    lab.fact(f"{name}, batch 1: refresh step of the matmul limit",
             run["steps"]["refresh"]["share_of_products_limit"], "share")  # fmt: skip
