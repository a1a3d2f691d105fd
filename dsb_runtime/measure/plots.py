"""The pictures that `dsb eval`, `dsb bench` and the benchmarks draw from their JSON.

matplotlib is imported where a picture is drawn: it is slow to import.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

from dsb_runtime.files import check_writable

STEP_COLORS = {"window": "#5b8cc9", "response": "#7fb069", "refresh": "#e0a63a"}
ROW_COLORS = {"continuous": "#5b8cc9", "static": "#e0a63a"}  # of the ways to batch
LIMIT_STYLES: tuple[dict[str, Any], ...] = ({"color": "black"}, {"color": "#b02a2a", "ls": ":"})
CURVE_COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1")
TICKS = (1, 2, 3, 4, 5, 6, 8, 10, 14, 20, 28, 36, 50, 64, 100, 200, 500)  # of forwards
LABEL_SPACE = 0.06  # between two names, as a share of the picture's height

P = ParamSpec("P")


def check_picture(name: str, path: Path | None) -> None:
    """Raise ValueError unless the picture `path` of the argument `name` can be written."""
    check_writable(name, path)
    if path is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"{name} {path}: expected a file ending in .{', .'.join(known)}")


def without_formulas(draw: Callable[P, None]) -> Callable[P, None]:
    """Let a function draw text as it stands: a name may have dollars, which matplotlib would take
    for the ends of a formula."""

    @functools.wraps(draw)
    def plain(*args: P.args, **kwargs: P.kwargs) -> None:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False}):
            draw(*args, **kwargs)

    return plain


class Point(NamedTuple):
    """A setting in the picture of `draw_fronts`: shares of exact answers are in percent."""

    forwards: float
    exact: float
    low: float  # the ends of the interval of `exact`
    high: float


@without_formulas
def draw_fronts(
    curves: dict[str, list[Point]], points: list[Point], title: str, path: Path
) -> None:
    """Draw exact answers against forwards: each curve with its intervals and its name beside it,
    and all `points` as faint dots. A curve's points are in the order of their forwards."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    for p in points:
        axes.plot(p.forwards, p.exact, ".", ms=5, color="#b9bec6", mew=0)
    colors = {name: CURVE_COLORS[i % len(CURVE_COLORS)] for i, name in enumerate(curves)}
    for name, curve in curves.items():
        x, y = [p.forwards for p in curve], [p.exact for p in curve]
        # At 0 and 100% an end of the interval may lie a rounding error inside of it.
        ends = [(max(0.0, p.exact - p.low), max(0.0, p.high - p.exact)) for p in curve]
        axes.errorbar(
            x, y, list(zip(*ends, strict=True)), color=colors[name], marker="o", ms=4.5, lw=1.8,
            elinewidth=0.9, capsize=2,
        )  # fmt: skip
    low, high = min(p.forwards for p in points), max(p.forwards for p in points)
    axes.set_xlim(low / 1.12, high * 2.1)  # the names stand on the right
    axes.xaxis.set_major_locator(FixedLocator([t for t in TICKS if low / 1.12 <= t <= high * 1.1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel="forwards per problem (logarithmic)")
    axes.set(ylabel="exact answers, %, with 95% interval")
    axes.set_title(title, fontsize=10.5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    bottom, top = min(p.low for p in points), max(p.high for p in points)
    margin = max(0.05 * (top - bottom), 0.5)
    axes.set_ylim(bottom - margin, top + margin)
    axes.set_yticks([t for t in axes.get_yticks() if bottom - margin <= t <= 100])
    last = {name: curve[-1] for name, curve in curves.items()}
    right = 1.1 * max(p.forwards for p in last.values())
    apart = LABEL_SPACE * (top - bottom + 2 * margin)
    for name, height in spread({name: p.exact for name, p in last.items()}, apart).items():
        axes.annotate(
            name, (last[name].forwards, last[name].exact), (right, height), color=colors[name],
            va="center", fontsize=10, fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": colors[name], "alpha": 0.4, "lw": 0.8},
        )  # fmt: skip
    figure.savefig(path, dpi=140)


def spread(heights: dict[str, float], apart: float) -> dict[str, float]:
    """The heights moved until each is at least `apart` from the next, in the same order, about
    their mean."""
    order = sorted(heights, key=lambda name: heights[name])
    moved: dict[str, float] = {}
    for name in order:
        below = max(moved.values(), default=-1e9)
        moved[name] = max(heights[name], below + apart)
    shift = sum(heights.values()) / len(heights) - sum(moved.values()) / len(moved)
    return {name: height + shift for name, height in moved.items()}


@without_formulas
def draw_runs(
    runs: list[dict[str, Any]],
    limits: dict[str, str],
    rates: dict[str, str],
    title: str,
    path: Path,
) -> None:
    """Draw the time per step against its limits, and for several batches tokens/s. `limits` and
    `rates` label the keys of a step's limits in ms and of a run's tokens/s."""
    from matplotlib.figure import Figure

    several = len(runs) > 1
    figure = Figure(figsize=(11 if several else 6.5, 4.5), layout="constrained")
    axes = figure.subplots(1, 1 + several, squeeze=False)[0]
    kinds = [kind for kind in STEP_COLORS if any(kind in run["steps"] for run in runs)]
    width = 0.76 / len(kinds)
    for index, run in enumerate(runs):
        for kind, step in run["steps"].items():
            x = index + (kinds.index(kind) - 0.5 * (len(kinds) - 1)) * width
            axes[0].bar(x, step["ms"], 0.95 * width, color=STEP_COLORS[kind], label=kind)
            for style, (key, label) in zip(LIMIT_STYLES, limits.items(), strict=False):
                if step[key] is not None:
                    edges = (x - 0.5 * width, x + 0.5 * width)
                    axes[0].hlines(step[key], *edges, lw=2, label=label, **style)
    axes[0].set(ylabel="ms per step", title="time per step against its limit")
    places = range(len(runs))  # batches stand at equal distances, whatever their size
    for key, label in rates.items() if several else ():
        values = [run[key] for run in runs]
        if None not in values:
            axes[1].plot(places, values, marker="o", label=label)
            for index, value in zip(places, values, strict=True):
                axes[1].annotate(
                    f"{value:.0f}", (index, value), (0, 6), textcoords="offset points", ha="center"
                )
    if several:
        axes[1].set(ylabel="tokens/s", title="throughput by batch")
        axes[1].set_ylim(0, 1.15 * axes[1].get_ylim()[1])
    for each in axes:
        each.set(xlabel="batch", xticks=places, xticklabels=[run["batch"] for run in runs])
        each.grid(axis="y", alpha=0.3)
        handles, labels = each.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        each.legend(once.values(), once.keys(), fontsize=8, loc="upper left")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


@without_formulas
def draw_rows(rows: dict[str, list[tuple[float, int]]], max_rows: int, path: Path) -> None:
    """Draw how many rows were in use over time, one panel for each way of batching. Each of `rows`
    has (seconds, rows from then on)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.9 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), sharex=True, squeeze=False)[:, 0]
    for axes, (name, color), points in zip(panels, ROW_COLORS.items(), rows.values(), strict=True):
        seconds, in_use = zip(*points, strict=True)
        axes.fill_between(seconds, in_use, step="post", color=color, alpha=0.8, lw=0)
        axes.axvline(seconds[-1], color="black", lw=1, ls=":")
        axes.set(ylabel="rows in use", ylim=(0, 1.05 * max_rows), title=f"{name} batching")
        axes.grid(axis="y", alpha=0.3)
    panels[-1].set(xlabel="seconds", xlim=(0, None))
    figure.savefig(path, dpi=120)
