"""The report of `decode.py`: the figures of its steps, its tables and its picture."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.roofline import KINDS, Budget, Ceilings, budget
from benchmarks.trajectory import Trajectory
from dsb_runtime.measure.command import table_of, wide_console
from dsb_runtime.measure.models import Preset
from dsb_runtime.measure.plots import draw_runs

WIDTH_CLASSES = (32, 64, 128, 256)  # bounds of a forward's widest window


def width_class(width: int) -> str:
    """The class of a width, in words; the last class has no bound."""
    return next((f"<= {most}" for most in WIDTH_CLASSES if width <= most), f"> {WIDTH_CLASSES[-1]}")


def median_ms(times: Sequence[tuple[str, float]], kind: str) -> float | None:
    """Median milliseconds of the steps of a kind; None where there was none."""
    seconds = [s for k, s in times if k == kind]
    return 1e3 * statistics.median(seconds) if seconds else None


def summarize(steps: list[tuple[float, Budget, int]]) -> dict[str, Any]:
    """Figures of similar steps, given their seconds, budgets and widths."""
    seconds, budgets, widths = zip(*steps, strict=True)
    time, phases = sum(seconds), [phase for b in budgets for phase in b.phases.values()]
    figures = {
        "steps": len(seconds),
        "width": statistics.mean(widths),
        "ms": 1e3 * statistics.median(seconds),
        "gb_per_s": 1e-9 * sum(phase["bytes"] for phase in phases) / time,
        "tflops": 1e-12 * sum(phase["flops"] for phase in phases) / time,
    }
    for limit in ("floor", "weights", "products"):
        ms = [getattr(b, f"{limit}_ms") for b in budgets]
        figures[f"{limit}_ms"] = statistics.median(ms)
        name = "floor" if limit == "floor" else f"{limit}_limit"
        figures[f"share_of_{name}"] = 1e-3 * sum(ms) / time
    return figures


def step_figures(
    record: Trajectory, times: Sequence[tuple[str, float]], preset: Preset, ceilings: Ceilings
) -> dict[str, dict[str, Any]]:
    """The figures of steps by kind, and of window steps also by width. They are medians over the
    rounds of each forward, then over forwards. A call's first step also allocates the call's
    tensors, so that it is left out where there are other steps of its kind."""
    kinds, count = record.kinds, len(record.kinds)
    if [kind for kind, _ in times] != kinds * (len(times) // max(count, 1)):
        raise RuntimeError("timed runs took other steps than the recorded one: nothing is reported")
    steps: dict[str, list[tuple[float, Budget, int]]] = {kind: [] for kind in KINDS}
    for i, (kind, size, work) in enumerate(zip(kinds, record.sizes, record.steps, strict=True)):
        seconds = statistics.median(s for _, s in times[i::count])
        steps[kind].append((seconds, budget(preset, kind, size, ceilings), work.widest))
    if kinds.count(kinds[0]) > 1:
        del steps[kinds[0]][0]
    by_kind = {kind: summarize(of_kind) for kind, of_kind in steps.items() if of_kind}
    if "window" in by_kind:
        widest = sorted(steps["window"], key=lambda step: step[2])
        classes = itertools.groupby(widest, lambda step: width_class(step[2]))
        by_kind["window"]["by_width"] = {name: summarize(list(each)) for name, each in classes}
    return by_kind


def step_table(run: dict[str, Any]) -> Table:
    """Our steps by kind and width, with their limits."""
    lines = []
    for kind in KINDS:
        if kind in run["steps"]:
            step = run["steps"][kind]
            lines.append((kind, step, run[f"eager_{kind}_step_ms"]))
            if len(step.get("by_width", {})) > 1:
                lines += [(f"  {name} positions", s, None) for name, s in step["by_width"].items()]
    return table_of(
        ["step", "positions", "steps", "ms", "eager ms", "GB/s", "TFLOP/s", "floor ms", "of floor",
         "weights ms", "of weights", "products ms", "of products"],
        [(name, f"{s['width']:.0f}", str(s["steps"]), f"{s['ms']:.2f}",
          "" if eager is None else f"{eager:.2f}", f"{s['gb_per_s']:.1f}",
          f"{s['tflops']:.3g}", f"{s['floor_ms']:.3f}", f"{s['share_of_floor']:.0%}",
          f"{s['weights_ms']:.3f}", f"{s['share_of_weights_limit']:.0%}",
          f"{s['products_ms']:.3f}", f"{s['share_of_products_limit']:.0%}")
         for name, s, eager in lines],
        title=f"batch {run['batch']}: time per step against its limits", title_justify="left",
    )  # fmt: skip


def print_runs(result: dict[str, Any]) -> None:
    say, settings, ceilings = wide_console().print, result["settings"], result["ceilings"]
    say(
        f"{settings['preset']}, {settings['dtype']}, on {result['machine']['device']}: copy "
        f"{ceilings['copy_gb_per_s']:.1f} GB/s, matrix product {ceilings['matmul_tflops']:.3g} "
        "TFLOP/s, measured in this run"
    )
    for run in result["runs"]:
        say()
        say(step_table(run))
        lines = [
            (name.replace("_", " "), f"{1e3 * seconds:.1f}", f"{run['tokens'] / seconds:.1f}",
             "" if name == "ours" else f"{run[f'ours_over_{name}']:.3f}")
            for name, seconds in run["seconds"].items()
        ]  # fmt: skip
        say(table_of(
            ["", "ms", "tokens/s", "ours over it"], lines, title_justify="left",
            title=f"batch {run['batch']}: prompt {settings['prompt']}, gen "
            f"{settings['gen_length']}, medians of {settings['rounds']} rounds",
        ))  # fmt: skip
        check = run["check"]
        if check is None:
            say("not compared with the eager loop (--no-eager)")
        elif check["same_tokens"]:
            say("the same tokens at the same forwards from both loops")
        else:
            say(
                f"{check['decisions']} decisions of one trajectory: both loops agree on "
                f"{check['decisions_agreed']:.1%} (position and token), on the position alone in "
                f"{check['positions_agreed']:.1%}"
            )
            flipped = check["flipped_by_rounding"]
            say(
                f"float32 would decide otherwise than ours in {flipped['ours']} of them, than the "
                f"eager loop in {flipped['eager']}"
            )
        if not run["timed_run_repeats_the_recorded"]:
            say("the timed run broke near ties otherwise; each forward committed as many tokens")
        idle, wait = run["gpu_idle_share"], run["gpu_wait_share"]
        say(
            f"{run['forwards']} forwards, {run['refresh_share']:.1%} of them refreshes, "
            f"{run['tokens_per_forward']:.2f} tokens per forward, {run['wasted_launches']:.1f} "
            "launches wasted; peak memory "
            f"{run['peak_memory_bytes'] / 1e9:.2f} GB"
            + ("" if idle is None else f"; GPU idle {idle:.1%}, of it between steps {wait:.1%}")
        )


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the time per step against its limit, and for several batches tokens/s as well."""
    settings = result["settings"]
    draw_runs(
        result["runs"], {"floor_ms": "floor of bytes and FLOPs"},
        {"tokens_per_second": "ours", "eager_tokens_per_second": "eager"},
        f"{settings['preset']}, {settings['dtype']}, {result['machine']['device']}: prompt "
        f"{settings['prompt']}, gen {settings['gen_length']}", path,
    )  # fmt: skip
