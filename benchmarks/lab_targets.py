"""What the kernels and the decoding step are to reach on one H100 or H200, and how it is shown.

A target is compared with a figure that a part of `benchmarks/lab.py` measures. Shares of bandwidth
are of a large copy, and of FLOP/s of a large product, in the same run; microseconds are those of a
call with a cold L2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

KERNELS, STEP = "kernels", "decoding step"  # where a target comes from: what it is asked of


@dataclass(frozen=True)
class Target:
    """A figure, by its key, and what it is to be."""

    key: str
    part: str  # of the lab, which measures it
    figure: str
    comparison: str  # "at least" or "at most"
    value: float
    unit: str
    source: str

    def reached(self, measured: float) -> bool:
        """Never by NaN."""
        if self.comparison == "at least":
            return measured >= self.value
        return measured <= self.value


def _errors(op: str) -> Target:
    figure = f"{op}: error over what is allowed, worst"
    return Target(f"{op} error", "correct", figure, "at most", 1, "x", KERNELS)


TARGETS = (
    _errors("token_confidence"),
    _errors("lm_head_confidence"),
    _errors("window_attention"),
    _errors("rope_write_kv"),
    _errors("window_linear"),
    _errors("linear_add_norm"),
    Target("place differs", "correct", "place_rows: steps that differ", "at most", 0, "", KERNELS),
    Target("unmask differs", "correct", "unmask_and_slide: steps that differ",
           "at most", 0, "", KERNELS),
    Target("goldens failed", "goldens", "recorded trajectories, with and without CUDA graphs: "
           "tests failed", "at most", 0, "", STEP),
    Target("token bandwidth", "scoring", "token_confidence, 1024 rows and up: of bandwidth",
           "at least", 0.85, "share", KERNELS),
    Target("token 64", "scoring", "token_confidence, 64 rows", "at most", 8, "µs", KERNELS),
    Target("token float64", "scoring", "token_confidence: float64 eager scoring over it",
           "at least", 20, "x", KERNELS),
    *(
        Target(f"head {rows}", "scoring", f"lm_head_confidence, {rows} rows: of bandwidth",
               "at least", share, "share", KERNELS)
        for rows, share in ((32, 0.9), (64, 0.85), (128, 0.75))
    ),
    Target("head cublas", "scoring", "lm_head_confidence: cuBLAS + token_confidence over it, worst",
           "at least", 1, "x", KERNELS),
    Target("unmask", "small", "unmask_and_slide", "at most", 5, "µs", KERNELS),
    Target("rope 64", "small", "rope_write_kv, 64 rows", "at most", 3.5, "µs", KERNELS),
    *(
        Target(f"window {rows}", "decode", f"window step, {rows} rows: of the weight-streaming "
               "limit", "at least", share, "share", STEP)
        for rows, share in ((32, 0.75), (64, 0.7), (128, 0.6))
    ),
    Target("refresh", "decode", "refresh step: of the matmul limit", "at least", 0.75, "share",
           STEP),
    Target("eager", "decode", "plain eager loop over ours, end to end", "at least", 5, "x", STEP),
    Target("attention worst", "attention", "window_attention: best of the others over it, worst",
           "at least", 1, "x", KERNELS),
    Target("attention mean", "attention", "window_attention: the same, geometric mean",
           "at least", 1.3, "x", KERNELS),
    Target("attention 4k", "attention", "window_attention, LLaDA, 4k: of bandwidth, worst of "
           "32, 64, 128 rows", "at least", 0.6, "share", KERNELS),
    Target("attention 16k", "attention", "window_attention, LLaDA, 16k: likewise",
           "at least", 0.75, "share", KERNELS),
    Target("attention dream", "attention", "window_attention, Dream, 16k, 128 rows",
           "at least", 350, "TFLOP/s", KERNELS),
    *(
        Target(f"batch {batch}", "batches", f"batch {batch}: of the matmul limit's tokens/s",
               "at least", 0.85, "share", STEP)
        for batch in (8, 32)
    ),
    Target("idle", "profile", "GPU idle, batch 1", "at most", 0.03, "share", STEP),
)  # fmt: skip


def show(value: float, unit: str) -> str:
    if unit == "share":
        return f"{value:.1%}"
    if not math.isfinite(value):
        return str(value)
    number = f"{value:.0f}" if value == round(value) or value >= 1000 else f"{value:.3g}"
    return f"{number} {unit}".strip()


def outcome(target: Target, parts: dict[str, Any]) -> str:
    """Why there is no figure."""
    part = parts.get(target.part, {"status": "not run", "why": "not asked for"})
    if part["status"] == "ran":
        return "not measured on this machine"
    return f"{part['status']}: {part['why']}"


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The table's lines: every target, then the figures that have none.

    Args:
        found: `figures`, by key: `value`, `note` and, where there is no target, `figure` and
            `unit`; `parts`: `status` and `why`; `applies`: whether targets mean something here.
    """
    figures, lines = found["figures"], []
    for target in TARGETS:
        figure = figures.get(target.key)
        line = {"figure": target.figure, "source": target.source, "note": "",
                "target": f"{target.comparison} {show(target.value, target.unit)}"}  # fmt: skip
        if figure is None:
            line |= {"measured": outcome(target, found["parts"]), "reached": ""}
        else:
            reached = "yes" if target.reached(figure["value"]) else "NO"
            line |= {
                "measured": show(figure["value"], target.unit),
                "reached": reached if found["applies"] else "-",
                "note": figure["note"],
            }
        lines.append(line)
    keys = {target.key for target in TARGETS}
    for key, figure in figures.items():
        if key not in keys:
            measured = show(figure["value"], figure["unit"])
            lines.append({"figure": figure["figure"], "source": "", "target": "", "reached": "",
                          "measured": measured, "note": figure["note"]})  # fmt: skip
    return lines


COLUMNS = ("figure", "target", "measured", "reached", "note")


def table_of(lines: Iterable[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, overflow="fold")
    for line in lines:
        style = {"NO": "bold"}.get(line["reached"])
        table.add_row(*(line[name] for name in COLUMNS), style=style)
    return table


def markdown_of(lines: Iterable[dict[str, Any]]) -> str:
    """The same to be pasted into a page."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [tuple(line[name].replace("|", "/") for name in COLUMNS) for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
