"""`dsb generate --live`: the canvas in the terminal while it fills."""

from __future__ import annotations

import time
from typing import Any, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dsb_runtime.engine.output import StepEvent
from dsb_runtime.measure.command import PlainConsole

STYLES = {
    "prompt": "cyan", "prefix": "black on bright_blue", "active": "bold black on yellow",
    "committed": "green", "mask": "grey50", "new": "bold black on bright_green",
}  # fmt: skip
LEGEND = {
    "prompt": "prompt or suffix", "prefix": "prefix window", "active": "mask in the active block",
    "mask": "mask beyond it", "new": "just committed", "committed": "committed",
}  # fmt: skip
MASK_GLYPH = "▢"

View = TypeVar("View", bound="LiveView")


def canvas_text(
    tokenizer: PreTrainedTokenizerBase, event: StepEvent, prompt_length: int, mask_id: int,
    leftpad: int = 0, glyph: str = MASK_GLYPH,
) -> Text:  # fmt: skip
    """Row 0 of the canvas after an event: a styled word for each position."""
    ids = event.canvas[0].tolist()
    row = event.table[0]
    start, end, prefix = row.start, row.end, row.start - row.prefix
    new = set(event.position[0][event.commit[0].nonzero().flatten()].tolist())
    text = Text()
    for index in range(leftpad, len(ids)):
        masked = index >= prompt_length and ids[index] == mask_id
        token = glyph if masked else tokenizer.convert_ids_to_tokens(ids[index])
        word = str(token or f"<{ids[index]}>")  # the tokenizer may not know the id
        if masked:
            style = "active" if start <= index < end else "mask"
        elif index in new:
            style = "new"
        elif prefix <= index < start:
            style = "prefix"
        else:
            given = index < prompt_length or index >= row.response_end
            style = "prompt" if given else "committed"
        text.append(word.replace("Ġ", "").replace("▁", "") or " ", STYLES[style])
        text.append(" ")
    return text


class LiveView:
    """An `on_step` callback that redraws row 0 after every forward. `spent` is the time that
    drawing and waiting took, which tokens/s leave out. A subclass says what a frame shows."""

    def __init__(self, frame_seconds: float = 0.1, console: Console | None = None) -> None:
        self.frame_seconds, self.spent = frame_seconds, 0.0
        self.live = Live(console=console or PlainConsole(), auto_refresh=False)

    @property
    def ascii_only(self) -> bool:
        """Whether the terminal's encoding lacks other characters."""
        return self.live.console.options.ascii_only

    @property
    def colors(self) -> bool:
        """Whether the terminal shows colours."""
        return self.live.console.color_system is not None and not self.live.console.no_color

    def __enter__(self: View) -> View:
        self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)
        if not self.live.console.is_terminal:  # rich leaves out the last newline there
            self.live.console.print()

    def frame(self, event: StepEvent) -> RenderableType:
        """What is shown after an event."""
        raise NotImplementedError

    def __call__(self, event: StepEvent) -> None:
        began = time.perf_counter()
        self.live.update(self.frame(event), refresh=True)
        time.sleep(self.frame_seconds)
        self.spent += time.perf_counter() - began


class LiveCanvas(LiveView):
    """The canvas, a word for each position."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        mask_id: int,
        frame_seconds: float = 0.1,
        console: Console | None = None,
    ) -> None:
        super().__init__(frame_seconds, console)
        self.tokenizer, self.prompt_length, self.mask_id = tokenizer, prompt_length, mask_id
        self.forwards = 0

    def frame(self, event: StepEvent) -> RenderableType:
        self.forwards += not event.draft
        legend = Text("  ").join([Text(f" {LEGEND[k]} ", STYLES[k]) for k in LEGEND])
        status = Text(
            f"forward {self.forwards}  {'draft' if event.draft else event.kind:<7}  "
            f"{int(event.commit.sum())} committed",
            "bold",
        )
        glyph = "_" if self.ascii_only else MASK_GLYPH
        canvas = canvas_text(self.tokenizer, event, self.prompt_length, self.mask_id, glyph=glyph)
        # Without colours there is nothing that a legend could explain.
        colors = self.live.console.is_terminal and self.colors
        return Group(canvas, Text(), status, *[legend] * colors)
