"""The Sudoku grid in the terminal, and the animation; a random model fills them."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

import dsb_runtime as dsb
from dsb_runtime.cli import demo
from dsb_runtime.cli.grid import Grid, LiveGrid, color_of, mark_of
from dsb_runtime.demo import sudoku
from dsb_runtime.measure.command import PlainConsole
from dsb_runtime.measure.evaluate import encode_prompts
from tools import animation
from tools.embedded_model.course import Settings
from tools.embedded_model.sudoku import COURSE
from tools.embedded_model.train import build_model, export

PUZZLE = sudoku.heldout(1)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sudoku")
    tiny = Settings("sudoku", steps=1, hidden=16, layers=1, heads=2, mlp=16)
    model, tokenizer = build_model(tiny, COURSE.tokenizer()), COURSE.tokenizer()
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("123456")))
    with torch.no_grad():  # digits are likelier than other tokens
        model.lm_head.weight.mul_(
            torch.zeros(len(model.lm_head.weight), 1).index_fill(0, digits, 9)
        )
    export(model, COURSE, path)
    return path


@pytest.fixture(scope="module")
def sudoku_model(folder) -> SimpleNamespace:
    model, tokenizer = dsb.load_model(folder, device="cpu"), dsb.load_tokenizer(folder)
    ids = torch.tensor(encode_prompts(tokenizer, [PUZZLE]))
    return SimpleNamespace(model=model, tokenizer=tokenizer, ids=ids)


def fill(it: SimpleNamespace, console: Console) -> tuple[LiveGrid, Any, int]:
    grid = Grid(PUZZLE, it.tokenizer, it.ids.shape[1], it.model.dsb.mask_id)
    with LiveGrid(grid, 0, console) as live:
        out = dsb.generate(it.model, it.ids, on_step=live, steps=12, block_length=6)
        return live, out, live.finish(PUZZLE)


def test_a_grid_follows_its_decoding(sudoku_model):
    it = sudoku_model
    grid = Grid(PUZZLE, it.tokenizer, it.ids.shape[1], it.model.dsb.mask_id)
    clues = PUZZLE.prompt.replace(" ", "").replace(".", "")
    assert "".join(cell.clue for cell in grid.cells) == clues

    def watch(event: dsb.StepEvent) -> None:
        cells, row = grid.follow(event), event.table[0]
        new = (event.position[0][event.commit[0]] - it.ids.shape[1]).tolist()
        assert [i for i, cell in enumerate(cells) if cell.new] == sorted(new)
        for index, cell in enumerate(cells, it.ids.shape[1]):
            assert cell.active == (cell.digit == "" and row.start <= index < row.end)
            assert cell.confidence is not None or cell.digit == ""

    out = dsb.generate(it.model, it.ids, on_step=watch, steps=12, block_length=6)
    words = it.tokenizer.convert_ids_to_tokens(out.sequences[0, it.ids.shape[1] :].tolist())
    want = [word if word in tuple("123456") else "?" for word in words]
    assert [cell.digit for cell in grid.cells] == want


def test_a_terminal_sees_it_fill_and_then_what_is_wrong(sudoku_model):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system="truecolor")
    live, out, wrong = fill(sudoku_model, console)
    shown = stream.getvalue()
    assert all(f"forward {index}" in shown for index in range(out.nfe + 1))
    assert "┌─────────┬─────────┐" in shown and " active block " in shown
    solution = PUZZLE.response.replace(" ", "")
    digits = [cell.digit for cell in live.grid.cells]
    assert wrong == sum(a != b for a, b in zip(digits, solution, strict=True)) > 0
    before, _, after = shown.partition(f"forward {out.nfe}:")
    assert "\x1b[1;37;41m" not in before, "no digit is marked while the grid fills"
    assert after.partition(f"forward {out.nfe}:")[0].count("\x1b[1;37;41m") == wrong


@pytest.mark.parametrize("how", [{"color_system": None}, {"no_color": True}])
def test_ascii_without_colours(sudoku_model, how):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    fill(sudoku_model, Console(file=stream, force_terminal=True, width=80, **how))
    stream.seek(0)
    shown = re.sub("\x1b\\[.*?[a-zA-Z]", "", stream.read())
    assert "+---------+---------+" in shown and "colour" not in shown
    assert "[-]" in shown and "- + * # how sure the model is" in shown


def test_a_mark_for_each_confidence():
    marks = [mark_of(confidence) for confidence in (0.0, 0.2, 0.45, 0.7, 0.9, 1.0)]
    assert "".join(marks) == "--+*##"


def test_anything_else_gets_the_last_frame(sudoku_model):
    stream = io.StringIO()
    fill(sudoku_model, Console(file=stream, width=80))
    assert stream.getvalue().count("forward ") == 1 and "36 of 36" in stream.getvalue()


def test_a_console_has_the_encoding_of_standard_output(monkeypatch):
    console = PlainConsole()
    for encoding, plain in (("ascii", True), ("utf-8", False), ("latin-1", True)):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert console.options.ascii_only == plain


def test_the_demo_fills_grids(monkeypatch, capsys):
    monkeypatch.setattr(demo, "FRAME_SECONDS", 0)
    demo.show_grids(PlainConsole())
    shown = capsys.readouterr().out
    assert shown.count("10 clues") == shown.count(" forwards for 36 cells") == 2
    assert max(map(len, shown.splitlines())) <= 80


def test_the_demo_has_problems_that_take_long_enough_to_watch(monkeypatch, capsys):
    monkeypatch.setattr(demo, "WORDS_FRAME_SECONDS", 0)
    assert demo.show_problems(PlainConsole()) == 0
    shown = capsys.readouterr().out.replace(" \n", " ").replace("\n", " ")
    forwards = [int(number) for number in re.findall(r"(\d+) forwards", shown)]
    assert len(forwards) == len(demo.PROBLEMS) and min(forwards) >= 10
    answers = re.findall(r"(Monday [^?<_]*?Answer \d+\.) \d+ tokens", shown)
    expected = re.findall(r"expected: (Monday .*?Answer \d+\.)", shown)
    assert answers == expected != []


def test_colours_go_from_red_to_green():
    assert color_of(0.0) == color_of(0.2) and color_of(1.0) != color_of(0.6) != color_of(0.2)
    red, green, _ = color_of(0.3)
    assert red > green and color_of(1.0)[1] > color_of(1.0)[0]


def test_the_animation_has_a_frame_for_each_forward(sudoku_model, tmp_path):
    it, path = sudoku_model, tmp_path / "a.gif"
    sides = {s: animation.decode(it.model, it.tokenizer, PUZZLE, s) for s in animation.SIDES}
    for frames in sides.values():
        assert not any(cell.digit for cell in frames[0])
        assert all(cell.digit for cell in frames[-1])
    animation.save(sides, path)
    with Image.open(path) as image:
        assert image.n_frames == max(map(len, sides.values()))
        assert image.info["loop"] == 0
    assert path.stat().st_size < 500_000


def test_the_animation_needs_a_model_that_solves(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(animation, "FIRST", 2)
    assert animation.main([str(tmp_path / "a.gif"), "--model", str(folder)]) == 2
    assert "expected a trained model" in capsys.readouterr().err
    assert not (tmp_path / "a.gif").exists()
    with pytest.raises(SystemExit, match="2"):
        animation.main(["a.png"])
