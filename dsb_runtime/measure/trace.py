"""A picture of one decoding: its windows and commits, by position and forward."""

from __future__ import annotations

from pathlib import Path

from dsb_runtime.engine.output import StepEvent
from dsb_runtime.measure.plots import check_picture

REFRESH_COLOR, RESPONSE_COLOR = "#dfe7f5", "#d3e8cd"  # what a forward recomputes, ...
BLOCK_COLOR, PREFIX_COLOR = "#fbe7b2", "#bcd0ee"  # ... and the window in it


class Trace:
    """An `on_step` callback that records batch row `row`; `save` draws it."""

    def __init__(self, prompt_length: int, gen_length: int, row: int = 0) -> None:
        self.prompt_length, self.gen_length, self.row = prompt_length, gen_length, row
        self.kinds: list[str] = []
        self.windows: list[tuple[int, int, int]] = []  # start, end, prefix of each forward
        self.commits: list[list[tuple[int, float]]] = []  # (position, confidence)
        self.what = "forward pass"  # what a line of the picture is

    def __call__(self, event: StepEvent) -> None:
        if self.row not in event.rows:
            return
        picked = event.commit[self.row].nonzero().flatten()
        positions = event.position[self.row][picked].tolist()
        confidences = event.confidence[self.row][picked].tolist()
        if event.draft:
            self.what = "step (with drafts, a forward pass may be two)"
        self.kinds.append(event.kind)
        self.windows.append(event.before[event.rows.index(self.row)])
        self.commits.append(list(zip(positions, confidences, strict=True)))

    def save(self, path: str | Path, title: str = "") -> None:
        """Write the picture (PNG, SVG or PDF by suffix).

        Raises:
            ValueError: nothing was recorded, or no picture can be written there.
        """
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        check_picture("path", Path(path))
        if not self.kinds:
            raise ValueError("trace: nothing was recorded; pass it as on_step to generate")
        steps, prompt = len(self.kinds), self.prompt_length
        inches = (min(4 + self.gen_length / 14, 16), min(2.4 + steps / 5, 12))
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.subplots()
        for step, (start, end, prefix) in enumerate(self.windows):
            if self.kinds[step] == "refresh":
                axes.axhspan(step - 0.5, step + 0.5, color=REFRESH_COLOR, lw=0)
            elif self.kinds[step] == "response":
                axes.barh(step, self.gen_length, height=1, color=RESPONSE_COLOR)
            else:
                axes.barh(step, prefix, left=start - prefix - prompt, height=1, color=PREFIX_COLOR)
            axes.barh(step, end - start, left=start - prompt, height=1, color=BLOCK_COLOR)
            edges = (start - prompt, end - prompt)
            axes.vlines(edges, step - 0.5, step + 0.5, color="#b07d00")
        each = [(p, step, c) for step, commits in enumerate(self.commits) for p, c in commits]
        positions, y, confidence = zip(*each, strict=True)
        x = [position - prompt + 0.5 for position in positions]
        dots = axes.scatter(x, y, c=confidence, cmap="viridis_r", vmin=0, vmax=1, s=16, zorder=3)
        figure.colorbar(dots, ax=axes, label="confidence at commit", pad=0.01)
        low = min([0, *(s - p - prompt for s, _, p in self.windows)])
        axes.set(xlim=(low, self.gen_length), ylim=(steps - 0.5, -0.5))
        axes.set(xlabel="response position", ylabel=self.what)
        axes.set_title(title or self.legend(), fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.savefig(path, dpi=120)

    def legend(self) -> str:
        """What the colours mean."""
        response = "green: response refresh;\n" if "response" in self.kinds else ""
        return f"pale blue: refresh; {response}yellow: active block; blue: prefix window"
