"""The animation of README: a Sudoku grid filled by naive blocks and by DSB greedy, side by side.

    python -m tools.animation docs/sudoku.gif

Each frame is a forward of both. The puzzle is a typical one: of the first 100 held-out puzzles the
one that both solve and whose forwards are nearest to the means over all 100.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import dsb_runtime as dsb
from dsb_runtime.cli.grid import Cell, Grid, color_of
from dsb_runtime.demo import SUDOKU_DIR, sudoku
from dsb_runtime.demo.sudoku import BOX_COLUMNS, BOX_ROWS, CELLS, SIZE, Puzzle
from dsb_runtime.measure.evaluate import encode_prompts

SIDES: dict[str, dict[str, Any]] = {
    "naive blocks": {"schedule": "naive"}, "DSB greedy": {"schedule": "dsb"}
}  # fmt: skip
SETTINGS: dict[str, Any] = {"block_length": 12, "threshold": 0.9, "cache": "none"}
FIRST = 100  # so many held-out puzzles are those among which the typical one is

CELL, MARGIN, HEAD, FOOT = 44, 18, 34, 36  # pixels
FRAME_MS, LAST_MS = 900, 4000
PAPER, INK, FAINT, LINE = "white", "#20242b", "#9aa3af", "#d5d9df"
BLOCK, NEW = "#fbe7b2", "#a7e3b0"  # of the active block, and of what was just committed

Frames = list[list[Cell]]  # the cells before the first forward and after each


def typical(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> Puzzle:
    """The puzzle that the animation shows, of the first `count`."""
    puzzles, solved, away = sudoku.heldout(count), set(range(count)), [0.0] * count
    for schedule in SIDES.values():
        forwards = [0] * count
        prompts = encode_prompts(tokenizer, puzzles)
        for index, out in dsb.generate_batch(model, prompts, **SETTINGS, **schedule):
            forwards[index] = out.nfe
            answer = str(tokenizer.decode(out.sequences[0, len(prompts[index]) :]))
            if not sudoku.is_exact(puzzles[index], answer):
                solved.discard(index)
        mean = statistics.fmean(forwards)
        away = [old + abs(nfe - mean) for old, nfe in zip(away, forwards, strict=True)]
    if not solved:
        raise ValueError(f"both solve none of the first {count} puzzles; expected a trained model")
    return puzzles[min(sorted(solved), key=away.__getitem__)]


def decode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, puzzle: Puzzle, side: str
) -> Frames:
    """The frames of one side."""
    ids = torch.tensor(encode_prompts(tokenizer, [puzzle]), device=model.device)
    grid = Grid(puzzle, tokenizer, ids.shape[1], model.dsb.mask_id)
    first = [
        replace(cell, active=i < SETTINGS["block_length"]) for i, cell in enumerate(grid.cells)
    ]
    frames = [first]
    dsb.generate(
        model, ids, on_step=lambda event: frames.append(list(grid.follow(event))),
        **SETTINGS, **SIDES[side],
    )  # fmt: skip
    return frames


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def draw_grid(draw: ImageDraw.ImageDraw, left: int, cells: list[Cell]) -> None:
    """Draw the cells of one side, whose left edge is at `left`."""
    for index, cell in enumerate(cells):
        x, y = left + index % SIZE * CELL, HEAD + index // SIZE * CELL
        back = NEW if cell.new else BLOCK if cell.active else PAPER
        draw.rectangle((x, y, x + CELL, y + CELL), fill=back, outline=LINE)
        middle = (x + CELL / 2, y + CELL / 2)
        if cell.digit or cell.clue:
            ink = FAINT if cell.clue else INK
            draw.text(middle, cell.digit or cell.clue, ink, font(22, bool(cell.digit)), anchor="mm")
        elif cell.active and cell.confidence is not None:
            size = 3 + 9 * cell.confidence
            box = [v + s for s in (-size, size) for v in middle]
            draw.ellipse(box, fill=color_of(cell.confidence))
    width = SIZE * CELL
    for column in range(0, SIZE + 1, BOX_COLUMNS):
        x = left + column * CELL
        draw.line((x, HEAD, x, HEAD + width), INK, 2)
    for row in range(0, SIZE + 1, BOX_ROWS):
        y = HEAD + row * CELL
        draw.line((left, y, left + width, y), INK, 2)


def draw_frame(sides: dict[str, Frames], step: int) -> Image.Image:
    """The picture after `step` forwards."""
    width = SIZE * CELL
    size = (len(sides) * (width + 2 * MARGIN), HEAD + width + FOOT)
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    for number, (side, frames) in enumerate(sides.items()):
        left = MARGIN + number * (width + 2 * MARGIN)
        forwards = min(step, len(frames) - 1)
        cells = frames[forwards]
        filled, done = sum(bool(c.digit) for c in cells), forwards == len(frames) - 1
        if done and step > forwards:
            cells = [replace(cell, new=False) for cell in cells]
        draw.text((left, HEAD / 2), side, INK, font(16, bold=True), anchor="lm")
        draw_grid(draw, left, cells)
        words = f"{forwards} forward" + "s" * (forwards != 1)
        words += ": solved" if done else f", {filled} of {CELLS} cells"
        where = (left, HEAD + width + FOOT / 2)
        draw.text(where, words, INK, font(15, bold=done), anchor="lm")
    return image


def save(sides: dict[str, Frames], path: Path) -> None:
    """Write an animated GIF that loops, with a pause at its end."""
    steps = max(len(frames) for frames in sides.values())
    images = [
        draw_frame(sides, step).quantize(64, dither=Image.Dither.NONE) for step in range(steps)
    ]
    times = [FRAME_MS] * (steps - 1) + [LAST_MS]
    images[0].save(path, save_all=True, append_images=images[1:], duration=times, loop=0)


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns 0 after the animation is written, 2 where it cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m tools.animation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", type=Path, metavar="FILE.gif")
    parser.add_argument("--model", default=str(SUDOKU_DIR), help="default: the embedded one")
    args = parser.parse_args(arguments)
    if args.path.suffix != ".gif":
        parser.error(f"{args.path}: expected a file ending in .gif")
    try:
        model, tokenizer = dsb.load_model(args.model), dsb.load_tokenizer(args.model)
        puzzle = typical(model, tokenizer, FIRST)
        sides = {side: decode(model, tokenizer, puzzle, side) for side in SIDES}
        save(sides, args.path)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{side} {len(frames) - 1}" for side, frames in sides.items())
    print(f"{args.path}: {puzzle.prompt} in {counts} forwards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
