"""The pictures that `dsb eval`, `dsb bench` and the benchmarks draw from their JSON.

matplotlib is imported where a picture is drawn: it is slow to import.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsb_runtime.files import check_writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEP_COLORS = {"window": "#5b8cc9", "response": "#7fb069", "refresh": "#e0a63a"}


def check_picture(name: str, path: Path | None) -> None:
    """Raise ValueError unless the picture that the argument `name` named can be written."""
    check_writable(name, path)
    if path is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"{name} {path}: expected a file ending in .{', .'.join(known)}")


def draw_scores(scores: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against tokens per forward, a line for each rule's sweep; scores of `dsb eval`."""
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


def draw_bench(record: dict[str, Any], path: Path) -> None:
    """Time per step against its limit, and tokens/s by batch; the record of `dsb bench`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_steps(left, record["batches"])
    sizes = [b["batch"] for b in record["batches"]]
    rates = [b["tokens_per_second"] for b in record["batches"]]
    places = range(len(sizes))  # as on the left: batches side by side, whatever their size
    right.plot(places, rates, marker="o", color="#3b7a57")
    for place, rate in zip(places, rates, strict=True):
        right.annotate(
            f"{rate:.0f}", (place, rate), (0, 6), textcoords="offset points", ha="center"
        )
    right.set(
        xlabel="batch", ylabel="tokens/s", title="throughput by batch", xticks=places,
        xticklabels=sizes, ylim=(0, 1.15 * max(rates)),
    )  # fmt: skip
    right.grid(alpha=0.3)
    length = record["settings"]["gen_length"]
    figure.suptitle(
        f"{record['model']}, {record['machine']['device']}: "
        f"prompt {record['prompt_length']}, gen {length}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)


def draw_steps(axes: Axes, batches: list[dict[str, Any]]) -> None:
    """Bars of ms per step, and on each the marks of what the step cannot go below."""
    kinds = [kind for kind in STEP_COLORS if any(kind in b["steps"] for b in batches)]
    width = 0.76 / len(kinds)
    labels: set[str] = set()

    def once(label: str) -> str:
        """The label the first time; then one that matplotlib leaves out of the legend."""
        if label in labels:
            return f"_{label}"
        labels.add(label)
        return label

    for place, batch in enumerate(batches):
        for kind, step in batch["steps"].items():
            x = place + (kinds.index(kind) - 0.5 * (len(kinds) - 1)) * width
            axes.bar(x, step["ms"], 0.95 * width, color=STEP_COLORS[kind], label=once(kind))
            edges = (x - 0.5 * width, x + 0.5 * width)
            axes.hlines(
                step["linear_ms"], *edges, color="black", lw=2, label=once("linear layers alone")
            )
            if step["weights_ms"] is not None:
                axes.hlines(
                    step["weights_ms"], *edges, color="#b02a2a", lw=2, ls=":",
                    label=once("weights at copy bandwidth"),
                )  # fmt: skip
    axes.set(
        xlabel="batch", ylabel="ms per step", title="time per step against its limit",
        xticks=range(len(batches)), xticklabels=[b["batch"] for b in batches],
    )  # fmt: skip
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")
