"""`dsb eval`: what it measures, what it writes and goes on from, and what it shows."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

import dsb_runtime as dsb
from dsb_kernels.rules import RULES
from dsb_runtime.cli import main as cli
from dsb_runtime.config import DecodingConfig
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.demo.tasks import TASKS
from dsb_runtime.files import write_json
from dsb_runtime.measure import evaluate
from dsb_runtime.measure.evaluate import (
    build_settings,
    digest,
    encode_prompts,
    measure,
    rule_values,
)
from dsb_runtime.measure.plots import CURVES, Box, place_name
from dsb_runtime.measure.scores import (
    SCHEDULES,
    WHOLE,
    Record,
    Score,
    front,
    one_token_note,
    show,
    wilson,
)
from tests.commands import refused

WORDS, SUDOKU = TASKS["words"], TASKS["sudoku"]
QUICK = ["eval", "--limit", "2", "--batch", "2", "--quick", "--device", "cpu"]


@pytest.fixture(scope="module")
def model():
    return dsb.load_model(MODEL_DIR, device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return dsb.load_tokenizer(MODEL_DIR)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_embedded_models_solve_held_out_problems(task):
    """One token a step over the whole canvas shows a model's own ability."""
    model, tokenizer = dsb.load_model(task.folder, device="cpu"), dsb.load_tokenizer(task.folder)
    config = build_settings(task, quick=True)[0]
    assert config.steps == task.gen_length and config.cache == "none"
    score = measure(task, model, tokenizer, task.heldout(12, 5), config, 12)
    assert score.problems == 12
    assert score.exact >= 9  # 90% are promised over 500 problems; 12 scatter


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_settings_cover_every_schedule_cache_and_rule(task):
    quick, whole = (build_settings(task, quick=quick) for quick in (True, False))
    assert len(quick) == 10 and whole[:10] == quick
    assert len(set(whole)) == len(whole), "no setting is measured twice"
    assert whole[0].block_length == whole[0].steps == task.gen_length
    names = {Score(c, 1, 1, 1.0, 1.0).schedule for c in whole}
    assert names == {"naive", "DSB const", "DSB greedy"}
    # Every point has each of three schedules, three caches and all block lengths.
    grid = Counter(Score(c, 1, 1, 1.0, 1.0).rule for c in whole
                   if c.full_every == 1 and c.block_length < task.gen_length)  # fmt: skip
    points = [name for name in grid if not name.startswith("one token")]
    assert {grid[name] for name in points} == {3 * 3 * len(task.block_lengths)}
    assert points == ["threshold 0.9", "threshold 0.5", "threshold 0.7", "threshold 0.99",
                      "factor 1", "frechet 0.25", "entropy 0.4", "eb 0.1", "eb 0.6",
                      "progress 0.3", "progress 0.6", "margin 0.9"]  # fmt: skip
    assert {c.rule for c in whole} == set(RULES)
    assert {c.full_every for c in whole} == {1, 4, 99}
    assert {c.confidence for c in whole} == {"probability", "margin", "entropy"}
    assert {c.progress for c in whole} == {None, 0.3, 0.6}
    # A rule without published values is measured in the middle of its range.
    other = dataclasses.replace(RULES["frechet"], name="other", setting="other")
    assert rule_values(other) == (0.0,) and rule_values(RULES["quota"]) == ()


def test_lengths_that_the_task_does_not_have():
    configs = build_settings(WORDS, 48, [5, 7])
    assert {c.block_length for c in configs} == {5, 7, 48}
    # naive can not spread 48 steps over blocks of 5 or 7; DSB needs no blocks to spread over
    one_token = [c for c in configs if c.rule == "quota" and c.block_length < 48]
    assert {c.schedule for c in one_token} == {"dsb"}


def test_scores_follow_the_counting_rule(model, tokenizer):
    problems = WORDS.heldout(3, 2)
    config = build_settings(WORDS, quick=True)[-1]
    score = measure(WORDS, model, tokenizer, problems, config, 2)
    tokens = forwards = exact = 0
    eos = model.dsb.eos_ids[0]
    for problem, prompt in zip(problems, encode_prompts(tokenizer, problems), strict=True):
        ids = torch.tensor([prompt])
        out = dsb.generate(model, ids, config)
        response = out.sequences[0, ids.shape[1] :].tolist()
        length = response.index(eos) + 1 if eos in response else len(response)
        tokens, forwards = tokens + length, forwards + out.nfe
        exact += WORDS.is_exact(problem, tokenizer.decode(response[: length - 1]))
    assert (score.exact, score.forwards) == (exact, pytest.approx(forwards / 3))
    assert score.tokens == pytest.approx(tokens / 3)


def test_wilsons_interval():
    """Its ends are the shares that lie 1.96 of their own standard deviations from what was seen."""
    for exact, problems in ((710, 1000), (1, 20), (999, 1000)):
        for end in wilson(exact, problems):
            deviation = (end * (1 - end) / problems) ** 0.5
            assert abs(end - exact / problems) == pytest.approx(1.959964 * deviation)
    assert wilson(0, 20) == pytest.approx((0, 0.161125), abs=1e-6)
    assert wilson(20, 20) == pytest.approx((0.838875, 1), abs=1e-6)


# --- files -------------------------------------------------------------------------------------


def test_two_runs_write_the_same_file_and_an_interrupt_loses_one_setting(
    tmp_path, monkeypatch, capsys
):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert cli.main([*QUICK, "--json", str(first)]) == 0
    table = capsys.readouterr().out
    assert "greedy" in table and "…" not in table, "nothing is cut in 80 columns"
    assert max(map(len, table.splitlines())) <= 80
    measured = []

    def interrupted(*arguments):
        measured.append(arguments[4])
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(evaluate, "measure", interrupted)
    assert cli.main([*QUICK, "--json", str(second)]) == 130
    assert len(json.loads(second.read_text())["scores"]) == 3
    assert cli.main([*QUICK, "--json", str(second)]) == 0
    assert measured[4:] == measured[3:4] + build_settings(WORDS, quick=True)[4:]
    assert second.read_bytes() == first.read_bytes()
    # A file of everything is shown as it is, without a forward.
    written = len(measured)
    capsys.readouterr()
    assert cli.main([*QUICK, "--json", str(second)]) == 0
    assert len(measured) == written and capsys.readouterr().out == table
    assert cli.main([*QUICK, "--json", str(second), "--seed", "1"]) == 2
    assert "it has scores of seed 0; expected 1, or a new file" in capsys.readouterr().err
    assert cli.main([*QUICK, "--json", str(second), "--gen-length", "128"]) == 2
    assert "it has scores of gen_length 64; expected 128, or" in capsys.readouterr().err


def test_an_interrupt_shows_the_settings_that_are_done(monkeypatch, capsys):
    first = iter([measure])

    def interrupted(*arguments):
        for each in first:
            return each(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "measure", interrupted)
    assert cli.main(QUICK) == 130
    assert "one token a step" in capsys.readouterr().out


def test_a_record_is_of_what_the_answers_depend_on(model, tokenizer):
    """The weights alone do not say how they, and the text, are read."""
    code = digest(model, tokenizer, WORDS)
    assert digest(dsb.load_model(MODEL_DIR, device="cpu"), tokenizer, WORDS) == code
    template = copy.deepcopy(tokenizer)
    template.chat_template = template.chat_template.replace("user", "assistant", 1)
    for other, how in (
        (dsb.load_model(MODEL_DIR, device="cpu", mask_id=5), tokenizer), (model, template),
    ):  # fmt: skip
        assert digest(other, how, WORDS) != code


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "sudoku", "--gen-length", "35"], "--gen-length 35: expected 36, which every"),
        (["--gen-length", "0"], "--gen-length=0: expected an int"),
        (["--block-length", "65"], "block_length=65: expected an int from 1 to 64"),
        (["--from", "benchmarks/eval_sudoku.json", "--block-length", "13", "7"],
         "--block-length 13 7: benchmarks/eval_sudoku.json has no such score; its block lengths "
         "are 4, 6, 12, 18, 36"),
        (["--from", "benchmarks/eval_sudoku.json", "--quick", "--block-length", "100"],
         "block_length=100: expected an int from 1 to 36"),
    ],
)  # fmt: skip
def test_lengths_that_cannot_be_measured_or_shown(capsys, options, said):
    refused(capsys, "eval", *options, said=said)


def test_quick_measures_what_fits():
    assert {c.block_length for c in build_settings(WORDS, 8, quick=True)} == {8}
    assert min(c.block_length for c in build_settings(WORDS, 8)) == 4


def scores() -> list[Score]:
    """Made-up scores of the quick settings and of two more."""
    quick = build_settings(SUDOKU, quick=True)
    more = [dataclasses.replace(quick[1], threshold=0.5), dataclasses.replace(quick[1], progress=1)]
    return [
        Score(config, 1000, 940 - 40 * i, 36.0 if i == 0 else 12.0 - i, 36.0)
        for i, config in enumerate([*quick, *more])
    ]


def test_a_score_survives_its_line():
    for score in scores():
        line = json.loads(json.dumps(score.line()))
        assert Score(DecodingConfig(**line.pop("settings")), 1000, **line) == score


def test_what_is_shown_of_a_file(tmp_path, capsys):
    path, picture = tmp_path / "scores.json", tmp_path / "scores.png"
    write_json(path, Record("sudoku", "0", 1000, 0, 36, scores()).as_json())
    shown = ["eval", "--from", str(path)]
    assert cli.main([*shown, "--plot", str(picture)]) == 0
    table = capsys.readouterr().out
    assert "94.0 (92.4-95.3)" in table and "threshold 0.5" in table and "progress 1" in table
    assert colors_in(picture) == SCHEDULES
    assert cli.main([*shown, "--quick", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| one token a step | 36 | none | 94.0 (92.4-95.3) in 36.0 |  |  |"
    assert lines[3].startswith("| threshold 0.9 | 6 | none | 90.0 (88.0-91.7) in 11.0 | 86.0 (")
    assert len(lines) == 6, "what --quick does not measure is left out"
    assert cli.main([*shown, "--block-length", "36", "12", "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == lines[2:3]


def test_names_of_rules():
    def name(**settings):
        return Score(DecodingConfig(gen_length=36, **settings), 1, 1, 1.0, 1.0).rule

    assert name() == "threshold 0.9"
    assert name(steps=36) == "one token a step" and name(steps=12) == "steps 12"
    assert name(steps=36, confidence="margin") == "one token, margin"
    assert name(confidence="margin") == "margin 0.9"
    assert name(progress=0.3) == "progress 0.3"
    assert name(progress=0.3, threshold=0.5) == "progress 0.3 of threshold 0.5"
    assert name(eb=0.1) == "eb 0.1" and name(frechet=-1) == "frechet -1"


def test_the_front_has_what_no_other_beats():
    config = scores()[0].config
    made = [Score(config, 100, exact, forwards, 36.0) for exact, forwards in
            ((50, 5.0), (60, 5.0), (55, 6.0), (70, 9.0), (60, 7.0), (70, 8.0))]  # fmt: skip
    assert [(s.exact, s.forwards) for s in front(made)] == [(60, 5.0), (70, 8.0)]


def colors_in(picture: Path) -> tuple[str, ...]:
    """The names of the curves whose colours a picture has."""
    image = (matplotlib.image.imread(picture)[:, :, :3] * 255).round()

    def drawn(color: str) -> bool:
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        return (np.abs(image - rgb).max(-1) <= 1).sum() > 100

    names = (*SCHEDULES, WHOLE)
    return tuple(n for n, style in zip(names, CURVES, strict=True) if drawn(style["color"]))


def test_one_token_a_step_is_drawn_where_there_is_nothing_else(tmp_path):
    path, scored = tmp_path / "scores.png", scores()

    def drawn(*scores: Score) -> tuple[str, ...]:
        show(Record("sudoku", "0", 1000, 0, 36, list(scores)), path)
        return colors_in(path)

    assert drawn(scored[0]) == (WHOLE,)
    whole = Score(DecodingConfig(gen_length=36, block_length=36), 1000, 900, 3.0, 36.0)
    assert drawn(*scored, whole) == (*SCHEDULES, WHOLE)


def test_what_the_picture_says_of_one_token_a_step():
    def of(exact: int, forwards: float, **settings: Any) -> Score:
        config = DecodingConfig(gen_length=36, steps=36, **settings)
        return Score(config, 1000, exact, forwards, 36.0)

    slow = {"naive": [of(780, 30.4), of(782, 36.0)], "DSB const": [], "DSB greedy": [of(782, 36.0)],
            "no blocks": [of(994, 36.0, confidence="margin")]}  # fmt: skip
    assert all(score.one_token for scores in slow.values() for score in scores)
    said = "One token a step (30 to 36 forwards): naive, DSB greedy 78.2%; no blocks 99.4%."
    assert one_token_note(slow) == said
    assert "(36 forwards)" in one_token_note({"naive": [of(1, 36.0)]})
    assert one_token_note({"naive": []}) == ""


def test_names_beside_the_curves_do_not_overlap():
    inside, size, random = Box(80, 70, 1000, 640), (110, 20), np.random.default_rng(0)
    places = random.uniform((80, 70), (1000, 640), (50, 4, 2))
    for ends in (*places, 4 * [(500, 640)], 4 * [(80, 70)], 4 * [(1000, 355)]):
        names: list[Box] = []
        for end in ends:
            box = place_name(size, end, inside, names, [tuple(end) for end in ends])
            assert inside.has(*box[:2]) and inside.has(*box[2:])
            assert not any(box.meets(name) for name in names)
            names.append(box)
    free = place_name(size, (500, 300), inside, [], [])
    assert free == (512, 290, 622, 310), "a name is on the right of its end where nothing is"
    beside = place_name(size, (500, 300), inside, [], [(560, 305)])
    assert not beside.has(560, 305)


@pytest.mark.parametrize("path", sorted(Path("benchmarks").glob("eval_*.json")), ids=str)
def test_the_scores_of_the_repository_are_those_of_todays_settings(path, tmp_path, capsys):
    record = Record.of(json.loads(path.read_text()))
    measured, every = {s.config for s in record.scores}, set(build_settings(TASKS[record.task]))
    early = "2000" in path.stem  # whose weights are not in the repository
    assert measured == every or (measured < every and early)
    task = TASKS[record.task]
    model, tokenizer = dsb.load_model(task.folder, device="cpu"), dsb.load_tokenizer(task.folder)
    assert early or record.model == digest(model, tokenizer, task)
    show(record, tmp_path / "scores.png")
