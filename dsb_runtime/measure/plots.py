"""The pictures that `dsb eval`, `dsb bench` and the benchmarks draw from their JSON.

matplotlib is imported where a picture is drawn: it is slow to import.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

from dsb_runtime.files import check_writable

STEP_COLORS = {"window": "#5b8cc9", "response": "#7fb069", "refresh": "#e0a63a"}
LIMIT_STYLES: tuple[dict[str, Any], ...] = ({"color": "black"}, {"color": "#b02a2a", "ls": ":"})

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


@without_formulas
def draw_scores(scores: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against tokens per forward from scores of `dsb eval`, a line for each sweep."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in scores:
        lines[f"{item['rule']}, {item['schedule']}, cache {item['cache']}"].append(item)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["tab20"]
    for index, (label, items) in enumerate(lines.items()):
        items = sorted(items, key=lambda s: s["tokens_per_forward"])
        axes.plot(
            [s["tokens_per_forward"] for s in items], [100 * s["exact"] for s in items],
            marker="o" if len(items) > 1 else "D", label=label, color=colors(index % 20),
        )  # fmt: skip
    axes.set(
        xlabel="tokens per forward", ylabel="exact answers, %",
        title=f"Embedded model, {scores[0]['problems']} held-out problems",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower left")
    figure.savefig(path, dpi=120)


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
