"""6 x 6 Sudoku puzzles with one solution each; a seed makes each of them.

Every row, every column and every box of two rows by three columns has the digits 1 to 6. A puzzle
gives 10 to 18 of its 36 cells:

    1..4.. ...... .2..6. 3....1 ..5... ...2.3

The response is the whole grid, 36 digits, the given ones included. Cells are unevenly hard: some
follow from one look at their row, others only after many others are filled. So the order in which a
decoder fills them decides whether it ends in the solution, which is what schedules differ in.
"""

from __future__ import annotations

import itertools
import random
import zlib
from dataclasses import dataclass

from dsb_runtime.demo.problems import Split

SIZE = 6
BOX_ROWS, BOX_COLUMNS = 2, 3
CELLS = SIZE * SIZE
MIN_CLUES, MAX_CLUES = 10, 18
BLANK = "."

# One solved grid in ten is for evaluation only, whatever cells are given.
_HELDOUT_SHARE = 10
_ALL = (1 << SIZE) - 1  # a set of digits is a number with a bit for each
_ROW = [cell // SIZE for cell in range(CELLS)]
_COLUMN = [cell % SIZE for cell in range(CELLS)]
_BOX = [
    row // BOX_ROWS * (SIZE // BOX_COLUMNS) + column // BOX_COLUMNS
    for row, column in zip(_ROW, _COLUMN, strict=True)
]


@dataclass(frozen=True)
class Puzzle:
    """A puzzle as it is asked, and its solution; both have six groups of six characters."""

    prompt: str
    response: str

    @property
    def clues(self) -> int:
        """How many cells are given."""
        return sum(character.isdigit() for character in self.prompt)


class _Used:
    """Which digits each row, column and box of a grid has."""

    def __init__(self) -> None:
        self.rows, self.columns, self.boxes = [0] * SIZE, [0] * SIZE, [0] * SIZE

    def free(self, cell: int) -> int:
        """The digits that may stand in a cell."""
        return _ALL & ~(
            self.rows[_ROW[cell]] | self.columns[_COLUMN[cell]] | self.boxes[_BOX[cell]]
        )

    def flip(self, cell: int, digit: int) -> None:
        """Put a digit into a cell, or take it out again."""
        self.rows[_ROW[cell]] ^= digit
        self.columns[_COLUMN[cell]] ^= digit
        self.boxes[_BOX[cell]] ^= digit


def puzzle(seed: int, split: Split = "train") -> Puzzle:
    """Return the puzzle of `seed`, which is the same at every call and on every machine. No solved
    grid is in both splits."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r}: expected 'train' or 'heldout'")
    # Strings are seeded by their SHA-512, which no Python version or platform changes.
    rng = random.Random(f"sudoku {split} {seed}")
    while True:
        solution = _draw_grid(rng)
        if _belongs_to_heldout(_text(solution)) == (split == "heldout"):
            break
    while True:
        clues = rng.randint(MIN_CLUES, MAX_CLUES)
        grid = _dig(rng, solution, clues)
        if sum(map(bool, grid)) == clues:  # else no further cell could be taken away
            return Puzzle(_text(grid), _text(solution))


def heldout(n: int, seed: int = 0) -> list[Puzzle]:
    """`n` different puzzles whose solved grids training never sees."""
    if n < 1:
        raise ValueError(f"n={n!r}: expected at least 1")
    puzzles: dict[str, Puzzle] = {}
    for draw in itertools.count(seed * 1_000_003):
        item = puzzle(draw, "heldout")
        puzzles.setdefault(item.prompt, item)
        if len(puzzles) == n:
            break
    return list(puzzles.values())


def is_heldout(item: Puzzle) -> bool:
    """Whether the puzzle's solved grid belongs to the held-out split."""
    return _belongs_to_heldout(item.response)


def is_exact(item: Puzzle, text: str) -> bool:
    """Whether `text` is the solution, whatever its spaces."""
    return "".join(text.split()) == "".join(item.response.split())


def count_solutions(grid: list[int], limit: int = 2) -> int:
    """How many solutions a grid of CELLS digits (as bits, 0 where blank) has, up to `limit`."""
    used = _Used()
    blanks = []
    for cell, digit in enumerate(grid):
        if digit:
            used.flip(cell, digit)
        else:
            blanks.append(cell)

    def search() -> int:
        """Fill the cell with the fewest possible digits in every way, and count."""
        if not blanks:
            return 1
        cell = min(blanks, key=lambda c: used.free(c).bit_count())
        blanks.remove(cell)
        total = 0
        for digit in _digits(used.free(cell)):
            used.flip(cell, digit)
            total += search()
            used.flip(cell, digit)
            if total >= limit:
                break
        blanks.append(cell)
        return total

    return search()


def _digits(free: int) -> list[int]:
    """The members of a set of digits, each as its bit."""
    return [1 << index for index in range(SIZE) if free >> index & 1]


def _text(grid: list[int]) -> str:
    """A grid as text, a group of characters for each row."""
    characters = [str(digit.bit_length()) if digit else BLANK for digit in grid]
    return " ".join("".join(characters[row * SIZE : (row + 1) * SIZE]) for row in range(SIZE))


def _belongs_to_heldout(response: str) -> bool:
    return zlib.crc32(response.encode()) % _HELDOUT_SHARE == 0


def _draw_grid(rng: random.Random) -> list[int]:
    """Draw a solved grid: each cell takes a random digit that fits, with backtracking."""
    grid, used = [0] * CELLS, _Used()

    def fill(cell: int) -> bool:
        if cell == CELLS:
            return True
        digits = _digits(used.free(cell))
        rng.shuffle(digits)
        for digit in digits:
            grid[cell] = digit
            used.flip(cell, digit)
            if fill(cell + 1):
                return True
            used.flip(cell, digit)
        return False

    fill(0)
    return grid


def _dig(rng: random.Random, solution: list[int], clues: int) -> list[int]:
    """Take cells away in random order until `clues` are left, while the solution stays the only
    one. More are left if no other cell can be taken away."""
    grid, left, used = list(solution), CELLS, _Used()
    for cell, digit in enumerate(solution):
        used.flip(cell, digit)
    for cell in rng.sample(range(CELLS), CELLS):
        if left == clues:
            break
        digit, grid[cell] = grid[cell], 0
        used.flip(cell, digit)
        # Where no other digit fits there is nothing to search, which halves the time of a puzzle.
        if used.free(cell) == digit or count_solutions(grid) == 1:
            left -= 1
        else:
            grid[cell] = digit
            used.flip(cell, digit)
    return grid
