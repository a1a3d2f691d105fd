"""`make demo`: Sudoku grids and word problems that the embedded models have never seen, live."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from dsb_runtime.cli import main as command
from dsb_runtime.cli.grid import Grid, LiveGrid
from dsb_runtime.cli.process import OneLineParser, ending, run_process
from dsb_runtime.demo import SUDOKU_DIR, problems, sudoku
from dsb_runtime.doors.openai.asked import prompt_ids
from dsb_runtime.engine.engine import generate
from dsb_runtime.families import check_model
from dsb_runtime.measure.command import PlainConsole
from dsb_runtime.models.load import load_model, load_tokenizer

# With so high thresholds there are some ten to twenty forwards to watch.
SUDOKU: dict[str, Any] = {"block_length": 6, "threshold": 0.99}
WORDS = ["--block-length", "16", "--max-block-length", "24", "--threshold", "0.999"]
PROBLEMS = ((1, 4), (4, 5), (1, 6))  # the seed and the steps of each
DRAWN, PUZZLES, CLUES = 100, 2, 10  # of so many held-out puzzles the first with these clues
FRAME_SECONDS, WORDS_FRAME_SECONDS = 0.4, 0.25


def show_grids(console: PlainConsole) -> None:
    """Fill held-out grids. The model knows no rules, and is not told which digits are
    wrong: they are marked at the end."""
    transformers_logging.disable_progress_bar()
    model, tokenizer = load_model(SUDOKU_DIR), load_tokenizer(SUDOKU_DIR)
    for puzzle in [p for p in sudoku.heldout(DRAWN) if p.clues == CLUES][:PUZZLES]:
        console.rule(characters="-", style="dim")
        console.print(f"6 x 6 Sudoku, {puzzle.clues} clues, by DSB greedy", style="bold")
        ids = prompt_ids(tokenizer, puzzle.prompt, raw=False)
        input_ids = torch.tensor([ids], device=model.device)
        grid = Grid(puzzle, tokenizer, input_ids.shape[1], check_model(model).mask_id)
        with LiveGrid(grid, FRAME_SECONDS, console) as live:
            out = generate(model, input_ids, on_step=live, **SUDOKU)
            wrong = live.finish(puzzle)
        says = f"wrong: {wrong} cells differ from" if wrong else "right: it is"
        console.print(f"{says} the one solution; {out.nfe} forwards for {sudoku.CELLS} cells")


def show_problems(console: PlainConsole) -> int:
    """Answer word problems, and return the exit status."""
    frame = ["--frame-seconds", str(WORDS_FRAME_SECONDS)]
    for seed, steps in PROBLEMS:
        (problem,) = problems.heldout(1, seed=seed, steps=steps)
        console.rule(characters="-", style="dim")
        console.print(problem.prompt, style="bold")
        status = command.main(["generate", problem.prompt, "--live", *frame, *WORDS])
        if status:
            return status
        console.print(f"expected: {problem.response}", style="dim")
    return 0


def run() -> int:
    console = PlainConsole()
    show_grids(console)
    return show_problems(console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, which takes no arguments, and return its exit status."""
    parser = OneLineParser(prog="demo", description=(__doc__ or "").partition(": ")[2])

    def both() -> int:
        parser.parse_args(argv)
        return run()

    return (run_process if argv is None else ending)("demo", both)


if __name__ == "__main__":
    sys.exit(main())
