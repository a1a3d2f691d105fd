"""The Sudoku puzzles of the embedded model, their tokenizer and the course that trains on them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from dsb_runtime.demo import sudoku
from dsb_runtime.demo.sudoku import Puzzle
from dsb_runtime.demo.tokenizer import build_sudoku_tokenizer, chat_text
from tools.embedded_model import train
from tools.embedded_model.sudoku import COURSE


@pytest.fixture(scope="module")
def many() -> list[Puzzle]:
    return [sudoku.puzzle(seed) for seed in range(200)] + sudoku.heldout(200)


def units() -> list[list[int]]:
    """The cells of every row, column and box."""
    rows = [[6 * row + column for column in range(6)] for row in range(6)]
    boxes = [
        [6 * (row + i) + column + j for i, j in product(range(2), range(3))]
        for row, column in product((0, 2, 4), (0, 3))
    ]
    return rows + [list(column) for column in zip(*rows, strict=True)] + boxes


def solutions(cells: str) -> list[str]:
    """All solutions of a puzzle, by trying every digit in every blank cell in turn."""
    cell = cells.find(".")
    if cell < 0:
        return [cells]
    near = {other for unit in units() if cell in unit for other in unit}
    digits = set("123456") - {cells[other] for other in near}
    return [
        text
        for digit in sorted(digits)
        for text in solutions(cells[:cell] + digit + cells[cell + 1 :])
    ]


def test_a_seed_names_one_puzzle():
    assert sudoku.puzzle(7) == sudoku.puzzle(7) != sudoku.puzzle(8)
    assert sudoku.heldout(20, seed=3) == sudoku.heldout(20, seed=3) != sudoku.heldout(20, seed=4)
    pinned = sudoku.puzzle(0)  # the weights were trained on these very puzzles
    assert pinned.prompt == ".3...4 2.63.. ...... 4...12 5..... .2...."
    assert pinned.response == "135264 246351 612435 453612 564123 321546"


def test_every_puzzle_has_one_solution(many):
    for item in many:
        prompt, response = (text.replace(" ", "") for text in (item.prompt, item.response))
        assert all(sorted(response[cell] for cell in unit) == list("123456") for unit in units())
        assert all(given in (".", digit) for given, digit in zip(prompt, response, strict=True))
        assert 10 <= item.clues <= 18
    assert {item.clues for item in many} == set(range(10, 19))
    for item in many[::40]:
        prompt, response = (text.replace(" ", "") for text in (item.prompt, item.response))
        assert solutions(prompt) == [response]


def test_held_out_grids_are_never_trained_on(many):
    assert not any(sudoku.is_heldout(item) for item in many[:200])
    assert all(sudoku.is_heldout(item) for item in many[200:])
    assert len({item.prompt for item in many[200:]}) == 200


def test_an_answer_is_the_whole_grid():
    item = sudoku.puzzle(0)
    assert sudoku.is_exact(item, item.response.replace(" ", ""))
    assert not sudoku.is_exact(item, item.response[:-1])
    assert not sudoku.is_exact(item, item.response.replace("135264", "135246"))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"^split='test'"):
        sudoku.puzzle(0, "test")
    with pytest.raises(ValueError, match=r"^n=0"):
        sudoku.heldout(0)


def test_a_batch_is_masked_grids_with_a_token_for_each_cell(many):
    tokenizer = build_sudoku_tokenizer()
    assert len(tokenizer(chat_text(many[0].prompt))["input_ids"]) == 38
    ids = tokenizer(many[0].response)["input_ids"]
    assert tokenizer.decode(ids) == many[0].response.replace(" ", "")
    batch = COURSE.batch(replace(COURSE.settings, batch_size=16), tokenizer, 5)
    canvas = batch.input_ids[:, 38:]
    masked = canvas == tokenizer.mask_token_id
    assert canvas.shape == batch.targets.shape == (16, 36)
    assert torch.equal(batch.weights > 0, masked)
    assert torch.equal(canvas[~masked], batch.targets[~masked])
    torch.testing.assert_close(batch.weights.sum(-1), masked.any(-1).float())


def test_a_run_writes_its_losses_and_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    arguments = ["--course", "sudoku", "--out", str(tmp_path / "m"), "--device", "cpu"]
    assert train.main([*arguments, "--steps", "5", "--stop-after", "3"]) == 130
    log = tmp_path / "m.checkpoint.jsonl"
    log.write_text(log.read_text() + '{"step": 4, "lo')  # as if cut off
    assert train.main([*arguments, "--steps", "5"]) == 0
    lines = log.read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ['{"step": 2', '{"step": 4']


@pytest.mark.parametrize("course", train.COURSES)
def test_the_log_of_a_training_is_whole_and_what_the_docs_say(course):
    log = Path(f"benchmarks/train_{course}.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    steps = train.COURSES[course].settings.steps
    assert [line["step"] for line in lines] == list(range(100, steps + 1, 100))
    loss = {line["step"]: float(f"{line['loss']:.2g}") for line in lines}
    page = " ".join(Path("docs/results.md").read_text().split())
    sentence = page.split(f"`benchmarks/train_{course}.jsonl`")[1].split("loss fell from ")[1]
    said = re.findall(r"(\d\.\d+) \((?:mean of steps 401 to |at )?(\d+)\)", sentence.split(". ")[0])
    assert len(said) >= 4 and int(said[-1][1]) == steps
    assert {int(step): float(value) for value, step in said}.items() <= loss.items()
