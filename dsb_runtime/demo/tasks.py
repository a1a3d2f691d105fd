"""The tasks of the embedded models: what each asks, and the model that answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsb_runtime.demo import MODEL_DIR, SUDOKU_DIR, problems, sudoku


@dataclass(frozen=True)
class Task:
    """Problems that a seed makes, with an attribute `prompt`, and how `dsb eval` decodes them."""

    name: str
    folder: Path  # of the model that was trained for it
    gen_length: int
    any_length: bool  # whether other values of gen_length leave room for an answer
    block_lengths: tuple[int, ...]  # shorter than gen_length
    compared: tuple[int, ...]  # of them those at which rules are compared; --quick takes the first
    heldout: Callable[[int, int], list[Any]]  # so many problems of a seed that training never sees
    is_exact: Callable[[Any, str], bool]  # whether a text answers a problem


TASKS = {
    task.name: task
    for task in (
        Task(
            "words", MODEL_DIR, 64, True, (4, 6, 8, 12, 16, 18, 32, 36), (16,),
            problems.heldout, problems.is_exact,
        ),
        Task(
            "sudoku", SUDOKU_DIR, sudoku.CELLS, False, (4, 6, 12, 18), (6, 12),
            sudoku.heldout, sudoku.is_exact,
        ),
    )
}  # fmt: skip
