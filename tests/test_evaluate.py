"""`dsb eval` and the demo, with the embedded model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import dsb_runtime as dsb
from dsb_kernels.rules import RULES
from dsb_runtime.cli import main as cli
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.demo.problems import heldout, is_exact
from dsb_runtime.measure.evaluate import (
    SWEEPS,
    build_settings,
    encode_batches,
    score,
    sweep_values,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    return dsb.load_model(MODEL_DIR, device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return dsb.load_tokenizer(MODEL_DIR)


def test_the_embedded_model_solves_held_out_problems(model, tokenizer):
    """One token a step shows the model's own ability."""
    setting = build_settings(64, 16, quick=True)[0]
    assert setting.config.steps == 64 and setting.config.cache == "none"
    batches = encode_batches(tokenizer, heldout(24, seed=5), 12, model.device)
    measured = score(model, tokenizer, batches, setting)
    assert measured["exact"] >= 0.8  # 90% are promised over 500 problems; 24 scatter
    assert measured["problems"] == 24


def test_settings_cover_every_schedule_cache_and_rule():
    quick, whole = (build_settings(64, 16, quick=quick) for quick in (True, False))
    assert len({(s.schedule, s.cache) for s in quick if s.sweep == "schedules"}) == 9
    assert {s.config.rule for s in whole} == set(RULES)
    assert {s.config.full_every for s in whole} == {1, 4, 99}
    assert {s.config.cache for s in whole} == {"none", "dual", "dsb"}
    refreshes = [(s.rule, s.cache) for s in whole if s.sweep == "refreshes"]
    assert refreshes == [("1 token, block 4", cache) for cache in ("dsb", "dsb/4", "dsb/99")]
    const = [s.config for s in whole if s.schedule == "DSB const"]
    assert all(c.max_block_length == c.block_length == 16 for c in const)
    # A rule without values of its own is measured inside its range.
    other = dataclasses.replace(RULES["frechet"], name="other", setting="other")
    assert sweep_values(other) == (-0.5, 0.0, 0.5)
    assert sweep_values(RULES["frechet"]) == SWEEPS["frechet"]
    assert sweep_values(RULES["quota"]) == ()


def test_the_scores_of_the_repository_are_those_of_todays_settings(tmp_path, capsys):
    """README's picture is drawn from this file."""
    path, picture = ROOT / "benchmarks" / "eval_embedded.json", tmp_path / "accuracy.png"
    words = [(i["sweep"], i["rule"], i["value"], i["schedule"], i["cache"])
             for i in json.loads(path.read_text())]  # fmt: skip
    settings = build_settings(64, 16, quick=False)
    assert words == [(s.sweep, s.rule, s.value, s.schedule, s.cache) for s in settings]
    assert cli.main(["eval", "--from", str(path), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "threshold 0.95" in capsys.readouterr().out


def test_scores_follow_the_counting_rule(model, tokenizer):
    problems = heldout(3, seed=2, steps=2)
    batches = encode_batches(tokenizer, problems, 3, model.device)
    setting = build_settings(64, 16, quick=True)[-1]
    measured = score(model, tokenizer, batches, setting)
    tokens = forwards = exact = 0
    eos = model.dsb.eos_ids[0]
    for problem in problems:
        ((_, ids, _),) = encode_batches(tokenizer, [problem], 1, model.device)
        out = dsb.generate(model, ids, setting.config)
        response = out.sequences[0, ids.shape[1] :].tolist()
        length = response.index(eos) + 1 if eos in response else len(response)
        tokens, forwards = tokens + length, forwards + out.nfe
        exact += is_exact(problem, tokenizer.decode(response[: length - 1]))
    assert measured["tokens"] == pytest.approx(tokens / 3)
    assert measured["forwards"] == pytest.approx(forwards / 3)
    assert measured["tokens_per_forward"] == pytest.approx(tokens / forwards)
    assert measured["exact"] == pytest.approx(exact / 3)


def test_command_writes_json_and_plot(tmp_path, capsys):
    scores, picture = tmp_path / "scores.json", tmp_path / "scores.png"
    arguments = ["eval", "--problems", "2", "--batch", "2", "--quick", "--device", "cpu"]
    assert cli.main([*arguments, "--json", str(scores), "--plot", str(picture)]) == 0
    assert len(json.loads(scores.read_text())) == 10
    assert picture.read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "DSB greedy" in output and "…" not in output, "nothing is cut in 80 columns"
    changed = json.loads(scores.read_text())
    changed[3]["exact"] = 0.25
    scores.write_text(json.dumps(changed))
    other = tmp_path / "other.png"
    assert cli.main(["eval", "--from", str(scores), "--plot", str(other)]) == 0
    assert other.read_bytes() != picture.read_bytes()
    assert "25.0%" in capsys.readouterr().out
