"""The pictures that `dsb eval`, `dsb bench` and the benchmarks draw from their JSON.

matplotlib is imported where a picture is drawn: it is slow to import.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

from dsb_runtime.files import check_writable

STEP_COLORS = {"window": "#5b8cc9", "response": "#7fb069", "refresh": "#e0a63a"}
ROW_COLORS = {"continuous": "#5b8cc9", "static": "#e0a63a"}  # of the ways to batch
LIMIT_STYLES: tuple[dict[str, Any], ...] = ({"color": "black"}, {"color": "#b02a2a", "ls": ":"})
# Colours that the colour-blind tell apart (Okabe and Ito's, and grey), and a mark for each.
CURVES: tuple[dict[str, Any], ...] = (
    {"color": "#0072b2", "marker": "o"}, {"color": "#d55e00", "marker": "s"},
    {"color": "#009e73", "marker": "D"}, {"color": "#6b7280", "marker": "^", "ls": "--"},
)  # fmt: skip
AWAY = (12, 30, 55, 85, 120, 160, 200)  # pixels from a curve's end to its name

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


class Box(NamedTuple):
    """A rectangle of the picture, in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, middle: tuple[float, float], size: tuple[float, float]) -> Box:
        (x, y), (width, height) = middle, size
        return cls(x - width / 2, y - height / 2, x + width / 2, y + height / 2)

    @property
    def middle(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.bottom + self.top) / 2

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)

    def has(self, x: float, y: float) -> bool:
        return self.left <= x <= self.right and self.bottom <= y <= self.top

    def meets(self, other: Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top


@without_formulas
def draw_fronts(
    curves: dict[str, list[Point]], points: list[Point], title: str, note: str, path: Path
) -> None:
    """Draw exact answers against forwards: each curve with its intervals and its name beside its
    end, all `points` as faint dots, and a `note` below. A curve's points are in the order of their
    forwards; a curve without points is left out, and its colour too. The axis ends behind the
    curves: dots further right are counted alone."""
    from matplotlib.figure import Figure

    styles = dict(zip(curves, itertools.cycle(CURVES), strict=False))
    curves = {name: curve for name, curve in curves.items() if curve}
    figure = Figure(figsize=(7.2, 4.8), dpi=140, layout="constrained")
    axes = figure.subplots()
    left, right = axis_of([p.forwards for curve in curves.values() for p in curve])
    dots = [p for p in points if p.forwards <= right]
    axes.plot([p.forwards for p in dots], [p.exact for p in dots], ".", ms=4, mew=0, c="#c9cdd3")
    for name, curve in curves.items():
        forwards, exact, low, high = zip(*curve, strict=True)
        axes.vlines(forwards, low, high, styles[name]["color"], lw=0.9, alpha=0.5)
        axes.plot(forwards, exact, lw=1.8, ms=6, mec="white", mew=0.7, **styles[name])
    bottom, top = axes.dataLim.intervaly
    margin = max(0.05 * (top - bottom), 0.5)
    axes.set(xlim=(left, right), ylim=(bottom - margin, top + margin))
    ticks = [t for t in axes.get_yticks() if max(0, bottom - margin) <= t <= min(100, top + margin)]
    axes.set_yticks(ticks)
    axes.set(xlabel="forwards per problem", ylabel="exact answers, %, with 95% interval")
    axes.set_title(title, fontsize=10.5)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    says = "Up and to the left is better."
    if len(points) > sum(map(len, curves.values())):
        further = len(points) - len(dots)
        says += " Grey dots: the other settings"
        says += f" (and {further} further right)." if further else "."
    figure.supxlabel(f"{says}\n{note}".strip(), x=0.01, ha="left", fontsize=8.5, color="#4a4f57")
    figure.draw_without_rendering()  # the layout is known from here on
    write_names(axes, curves, {name: styles[name]["color"] for name in curves})
    figure.savefig(path)


def axis_of(forwards: list[float]) -> tuple[float, float]:
    """The ends of the axis around the curves' forwards, with room on the right for names."""
    low, high = min(forwards), max(forwards)
    wide = max(high - low, 0.1 * high)
    return low - 0.05 * wide, high + 0.3 * wide


def write_names(axes: Any, curves: dict[str, list[Point]], colors: dict[str, str]) -> None:
    """Write each curve's name near its end; a line leads to an end that is further off."""
    from matplotlib.patheffects import withStroke

    pixels, inside = axes.transData, Box(*axes.get_window_extent().extents)
    drawn: list[tuple[float, float]] = []  # on the curves, and on their intervals
    for curve in curves.values():
        lines = [[p[:2] for p in curve], *([(p[0], p.low), (p[0], p.high)] for p in curve)]
        for line in lines:
            for a, b in itertools.pairwise(pixels.transform(line)):
                drawn += [tuple(a + (b - a) * i / 40) for i in range(41)]
    names: list[Box] = []
    # From the right on: there names have the least room.
    for name in sorted(curves, key=lambda name: -curves[name][-1].forwards):
        color, end = colors[name], pixels.transform(curves[name][-1][:2])
        text = axes.text(
            0, 0, name, color=color, fontsize=10, fontweight="bold", ha="center", va="center",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
        box = place_name(text.get_window_extent().size, end, inside, names, drawn)
        text.set_position(pixels.inverted().transform(box.middle))
        near = box.nearest(*end)
        if math.dist(near, end) > 1.5 * AWAY[0]:
            ends = pixels.inverted().transform((near, end))
            axes.plot(*ends.T, color=color, lw=0.8, alpha=0.6, zorder=1)
        names.append(box)


def place_name(
    size: tuple[float, float],
    end: tuple[float, float],
    inside: Box,
    names: list[Box],
    drawn: list[tuple[float, float]],
) -> Box:
    """Where a name of this size goes: inside the axes, on none of `names`, and so that it is near
    its curve's end and covers few of the points `drawn`. All is in pixels."""
    best, least = Box.around(end, size), math.inf
    for away, turn in itertools.product(AWAY, range(24)):
        angle = 2 * math.pi * turn / 24  # the first is on the right
        across, up = away + size[0] / 2, away + size[1] / 2
        middle = end[0] + across * math.cos(angle), end[1] + up * math.sin(angle)
        box = Box.around(middle, size)
        air = Box.around(middle, (size[0] + 16, size[1] + 16))
        cost = away + 20 * (1 - math.cos(angle)) + 30 * sum(air.has(*p) for p in drawn)
        free = inside.has(*box[:2]) and inside.has(*box[2:])
        if cost < least and free and not any(box.meets(name) for name in names):
            best, least = box, cost
    return best


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
