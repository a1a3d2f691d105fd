"""A Sudoku grid in the terminal while it fills."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.console import Console, Group, RenderableType
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dsb_runtime.cli.live import LiveView
from dsb_runtime.demo.sudoku import BOX_COLUMNS, BOX_ROWS, CELLS, SIZE, Puzzle
from dsb_runtime.engine.output import StepEvent

LOW, MIDDLE, HIGH = (224, 82, 60), (230, 180, 60), (92, 190, 100)  # colours of a confidence
LEGEND = {
    " clue ": "dim", " active block ": "on grey30", " just committed ": "bold black on bright_green"
}  # fmt: skip
WRONG = "bold white on red"
MARKS = "-+*#"  # of a masked cell's confidence, in a terminal without colours


@dataclass(frozen=True)
class Cell:
    """A cell of a grid as it is shown."""

    digit: str = ""  # "" while it is masked
    clue: str = ""  # the digit that the puzzle gives
    active: bool = False  # whether it is masked and in the active block
    new: bool = False  # whether the last forward committed it
    confidence: float | None = None  # in the last forward that had it as a candidate


class Grid:
    """The cells of batch row 0 of a decoding, whose response is a grid from position
    `prompt_length` on."""

    def __init__(
        self, puzzle: Puzzle, tokenizer: PreTrainedTokenizerBase, prompt_length: int, mask_id: int
    ) -> None:
        self.tokenizer, self.start, self.mask_id = tokenizer, prompt_length, mask_id
        clues = "".join(puzzle.prompt.split())
        self.cells = [Cell(clue=c if c.isdigit() else "") for c in clues]

    def word(self, token: int) -> str:
        """A committed digit, or ? for another token."""
        word = str(self.tokenizer.convert_ids_to_tokens(token))
        return word if word.isdigit() else "?"

    def follow(self, event: StepEvent) -> list[Cell]:
        """The cells after an event."""
        ids = event.canvas[0, self.start : self.start + CELLS].tolist()
        row = event.table[0]
        position, commit, confidence = (
            x[0].tolist() for x in (event.position, event.commit, event.confidence)
        )
        each = zip(position, confidence, commit, strict=True)
        scored = {place - self.start: (sure, new) for place, sure, new in each}
        for index, (cell, token) in enumerate(zip(self.cells, ids, strict=True)):
            masked = token == self.mask_id
            sure, new = scored.get(index, (cell.confidence, False))
            self.cells[index] = replace(
                cell, digit="" if masked else self.word(token),
                active=masked and row.start <= index + self.start < row.end, new=new,
                confidence=sure,
            )  # fmt: skip
        return self.cells


def share_of(confidence: float) -> float:
    """How far up a confidence is, from 0 to 1."""
    # A model that has six digits to choose from is rarely less sure than this.
    return max(0.0, min(1.0, (confidence - 0.2) / 0.8))


def mark_of(confidence: float) -> str:
    """The mark of a confidence from 0 to 1."""
    return MARKS[min(int(len(MARKS) * share_of(confidence)), len(MARKS) - 1)]


def color_of(confidence: float) -> tuple[int, int, int]:
    """The red, green and blue of a confidence from 0 to 1, 0 to 255 each."""
    share = share_of(confidence)
    low, high, part = (LOW, MIDDLE, 2 * share) if share < 0.5 else (MIDDLE, HIGH, 2 * share - 1)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return red, green, blue


def cell_text(cell: Cell, solution: str, glyph: str, colors: bool) -> Text:
    """Three columns of a cell. Where a `solution` digit is given, a wrong digit is marked."""
    if cell.confidence is not None and not colors:
        glyph = mark_of(cell.confidence)
    word = cell.digit or cell.clue or glyph
    style = ""
    if solution and cell.digit != solution:
        style = WRONG
    elif cell.new:
        style = LEGEND[" just committed "]
    elif cell.clue:
        style = "dim"
    elif cell.confidence is not None:
        style = "rgb({},{},{})".format(*color_of(cell.confidence))
    if cell.active:
        style += f" {LEGEND[' active block ']}"
    return Text(f" {word} " if colors or not cell.active else f"[{word}]", style)


class LiveGrid(LiveView):
    """A grid with its boxes, and how many forwards have run. Without colours, brackets mark the
    active block, and a mark says how sure the model is of a cell."""

    def __init__(
        self, grid: Grid, frame_seconds: float = 0.1, console: Console | None = None
    ) -> None:
        super().__init__(frame_seconds, console)
        self.grid, self.status = grid, Text("forward 0", "bold")

    def __enter__(self) -> LiveGrid:
        super().__enter__()
        if self.live.console.is_terminal:
            self.live.update(self.picture(), refresh=True)
        return self

    def frame(self, event: StepEvent) -> RenderableType:
        cells = self.grid.follow(event)
        filled = sum(bool(cell.digit) for cell in cells)
        self.status = Text(f"forward {event.index + 1}: {filled} of {CELLS} cells", "bold")
        return self.picture()

    def finish(self, puzzle: Puzzle) -> int:
        """Mark what differs from the puzzle's solution, and return how many cells do."""
        solution = "".join(puzzle.response.split())
        self.grid.cells = [replace(cell, new=False) for cell in self.grid.cells]
        self.live.update(self.picture(solution), refresh=True)
        return sum(c.digit != s for c, s in zip(self.grid.cells, solution, strict=True))

    def picture(self, solution: str = "") -> RenderableType:
        """The grid, the forwards and a legend; with a `solution`, wrong digits are marked."""
        plain, colors = self.ascii_only, self.colors
        bar, glyph = ("|", ".") if plain else ("│", "·")
        # The corners and crossings of the top, of a line between boxes, and of the bottom.
        top, middle, bottom = ("+++",) * 3 if plain else ("┌┬┐", "├┼┤", "└┴┘")
        boxes = [("-" if plain else "─") * 3 * BOX_COLUMNS] * (SIZE // BOX_COLUMNS)

        def line(ends: str) -> str:
            return ends[0] + ends[1].join(boxes) + ends[2]

        text = Text()
        for row in range(SIZE):
            if row % BOX_ROWS == 0:
                text.append(f"{line(middle if row else top)}\n", "dim")
            for column in range(SIZE):
                if column % BOX_COLUMNS == 0:
                    text.append(bar, "dim")
                index = row * SIZE + column
                text.append_text(
                    cell_text(self.grid.cells[index], solution[index : index + 1], glyph, colors)
                )
            text.append(f"{bar}\n", "dim")
        text.append(line(bottom), "dim")
        if colors:
            legend = Text("  ").join([Text(word, style) for word, style in LEGEND.items()])
            legend.append("  colour: how sure the model is")
        else:
            legend = Text(f"[ ] active block  {' '.join(MARKS)} how sure the model is")
        # Where nothing is redrawn, the full grid is all that is seen.
        shown = [legend] if self.live.console.is_terminal else []
        return Group(text, Text(), self.status, *shown)
