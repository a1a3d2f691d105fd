"""`dsb bench` on the embedded model: what it counts, what it keeps, what it draws."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dsb_runtime as dsb
from dsb_runtime.cli import main as cli
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.engine.output import GenerationOutput
from dsb_runtime.measure.bench import Round, measure, summarize, summarize_steps
from dsb_runtime.measure.models import PRESETS, random_model, random_prompts
from dsb_runtime.measure.steps import LinearLayers, StepRecorder, StepWork
from tests.commands import refused

SMALL = ["--device", "cpu", "--prompt-length", "12", "--gen-length", "24", "--block-length", "8"]


@pytest.fixture(scope="module")
def model():
    return dsb.load_model(MODEL_DIR, device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return dsb.load_tokenizer(MODEL_DIR)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict[str, Any], Path, list[str]]:
    """One run of the command: its record, its picture, its arguments."""
    folder = tmp_path_factory.mktemp("bench")
    path, picture = folder / "bench.json", folder / "bench.png"
    argv = ["bench", *SMALL, "--batch", "1", "3", "--rounds", "2", "--steps", "12"]
    argv += ["--json", str(path), "--plot", str(picture)]
    assert cli.main(argv) == 0
    return json.loads(path.read_text()), picture, argv


def test_the_record_says_what_was_measured_where(measured):
    record, _, argv = measured
    assert (record["model"], record["dtype"]) == ("embedded model", "float32")
    assert shlex.split(record["command"]) == ["dsb", *argv]
    config = dsb.DecodingConfig(gen_length=24, block_length=8, steps=12, stop_at_eos=False)
    assert record["settings"] == json.loads(json.dumps(vars(config)))
    assert (record["prompt_length"], record["rounds"], record["seed"]) == (12, 2, 0)
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["device"] and record["date"].endswith("+00:00")
    assert record["copy_bandwidth"] is None, "no GPU, no second limit"


def test_tokens_and_forwards_are_those_of_generate(measured, model, tokenizer):
    record, _, _ = measured
    config = dsb.DecodingConfig(gen_length=24, block_length=8, steps=12)
    prompts = random_prompts(model, tokenizer, 3, 12, seed=0)
    assert [b["batch"] for b in record["batches"]] == [1, 3]
    for batch in record["batches"]:
        out = dsb.generate(model, prompts[: batch["batch"]], config)
        assert (batch["tokens"], batch["forwards"]) == (24 * batch["batch"], out.nfe)
        assert batch["tokens_per_forward"] == batch["tokens"] / sum(out.row_nfe) == 2
        assert batch["tokens_per_second"] == batch["tokens"] / batch["seconds"] > 0
        assert set(batch["steps"]) == {"window", "refresh"}
        for step in batch["steps"].values():
            assert min(step[key] for key in ("ms", "linear_ms", "linear_share")) > 0
        refresh = batch["steps"]["refresh"]
        assert refresh["rows"] == 36 * batch["batch"] > batch["steps"]["window"]["rows"]
        # Each of two rounds has 12 steps, the first of which is left out.
        assert refresh["steps"] + batch["steps"]["window"]["steps"] == 2 * 11


def test_the_recorder_counts_the_work_of_every_forward(model, tokenizer):
    prompts = random_prompts(model, tokenizer, 2, 12, seed=1)

    def steps(**settings: Any) -> list[StepWork]:
        recorder = StepRecorder(model, 12, 24)
        shape = {"gen_length": 24, "block_length": 8, "steps": 24, "stop_at_eos": False}
        dsb.generate(model, prompts, on_step=recorder, **shape, **settings)
        assert {s.batch for s in recorder.steps} == {2}
        assert all(s.num_tokens == 2 * s.widest for s in recorder.steps)
        return recorder.steps

    whole = steps(cache="none")
    assert [s.num_tokens for s in whole] == [2 * 36] * 24
    assert [s.scored for s in whole] == [2 * min(8, 24 - n) for n in range(24)]
    # A window of 8 (block by block, each token a step), and the whole canvas where it moves.
    dual = steps(schedule="naive", cache="dual")
    block = [("refresh", 72), *(7 * [("window", 16)])]
    assert [(s.kind, s.num_tokens) for s in dual] == 3 * block
    assert [s.scored for s in dual] == 3 * [2 * (8 - n) for n in range(8)]
    prefix = steps(schedule="naive", cache="dsb", prefix_window=4)
    assert [s.num_tokens for s in prefix if s.kind == "window"] == 21 * [2 * (8 + 4)]
    response = steps(schedule="naive", cache="dual", refresh_policy="response")
    assert [(s.kind, s.num_tokens) for s in response if s.kind != "window"] == [
        ("refresh", 72), ("response", 48), ("response", 48),
    ]  # fmt: skip


def test_the_limit_multiplies_what_a_step_needs(model):
    limit = LinearLayers(model, 100)
    d, mlp, vocab = 128, 512, 192
    late = 2 * d * d + 3 * d * mlp + vocab * d  # last layer's q, output and MLP; LM head
    early = 3 * (4 * d * d + 3 * d * mlp) + 2 * d * d
    with FlopCounterMode(display=False) as counter:
        limit.run(100, 7)
    assert counter.get_total_flops() == 2 * (100 * early + 7 * late)
    assert limit.bytes == 4 * (early + late)


def test_presets_and_rows_that_end(model, tokenizer, tmp_path):
    """A preset is measured like a checkpoint; with --stop-at-eos rows end by the counting rule."""
    path = tmp_path / "bench.json"

    def record_of(*options: str) -> dict[str, Any]:
        argv = ["bench", *SMALL, *options, "--rounds", "1", "--json", str(path)]
        assert cli.main(argv) == 0
        return json.loads(path.read_text())

    record = record_of("--preset", "tiny-dream", "--batch", "1")
    assert (record["model"], record["dtype"]) == ("tiny-dream", "float32")
    assert record["settings"]["steps"] == record["batches"][0]["forwards"] == round(24 / 3.5)
    assert record["batches"][0]["tokens"] == 24
    (batch,) = record_of("--batch", "4", "--stop-at-eos", "--seed", "5")["batches"]
    prompts = random_prompts(model, tokenizer, 4, 12, seed=5)
    out = dsb.generate(model, prompts, gen_length=24, block_length=8, stop_at_eos=True)
    assert sum(out.row_tokens) < 96, "a row must end early, or this shows nothing"
    assert batch["tokens"] == sum(out.row_tokens)
    assert batch["tokens_per_forward"] == sum(out.row_tokens) / sum(out.row_nfe)


def test_measuring_changes_no_model(model, tokenizer):
    """Not the ids that end a row, and not the engine that `generate` keeps with the model."""
    before = dict(vars(model))
    config = dsb.DecodingConfig(gen_length=8, block_length=4, steps=4)
    prompts = random_prompts(model, tokenizer, 1, 12, seed=1)
    list(measure(model, prompts, config, [1], rounds=1, seed=0))
    assert vars(model) == before


def test_prompts_have_no_special_ids(model, tokenizer):
    prompts = random_prompts(model, tokenizer, 2, 4000, seed=3)
    assert set(prompts.flatten().tolist()) == set(range(5, len(tokenizer)))
    assert torch.equal(random_prompts(model, tokenizer, 2, 4000, seed=3), prompts)
    assert not torch.equal(random_prompts(model, tokenizer, 2, 4000, seed=4), prompts)
    preset = PRESETS["tiny-dream"]  # it has no tokenizer: the whole vocabulary but the mask token
    ids = random_prompts(random_model(preset, torch.float32, "cpu"), None, 2, 10000, 0)
    assert set(range(512)) - set(ids.flatten().tolist()) == {preset.mask_id}


# --- figures ----------------------------------------------------------------------------------


def one_round_by_hand() -> Round:
    out = GenerationOutput(torch.zeros(1, 8), 3, [1, 2, 1], [3], [4])
    works = (("refresh", 8, 4), ("window", 4, 4), ("window", 4, 2))
    steps = [StepWork(kind, 1, tokens, scored, tokens) for kind, tokens, scored in works]
    return Round(out, 0.5, steps, [0.9, 0.2, 0.4], [0.3, 0.1, 0.1])


def test_medians_by_hand():
    window = summarize_steps([one_round_by_hand()], "window", 0.1)
    assert window == pytest.approx(
        {
            "steps": 2, "rows": 4, "scored": 3, "ms": 300, "linear_ms": 100,
            "linear_share": 0.375, "weights_ms": 100, "weights_share": 0.375,
        }
    )  # fmt: skip
    # The first step of a call counts where a call has no other of its kind.
    assert summarize_steps([one_round_by_hand()], "refresh", None)["ms"] == 900
    one = one_round_by_hand()
    longer = Round(one.out, 0.5, [*one.steps, one.steps[0]], [0.9, 0.2, 0.4, 0.5], [0.3] * 4)
    refresh = summarize_steps([longer], "refresh", None)
    assert (refresh["steps"], refresh["ms"], refresh["weights_ms"]) == (1, 500, None)
    ends, never = (dsb.DecodingConfig(8, 4, stop_at_eos=stop) for stop in (True, False))
    whole = summarize([one_round_by_hand()], ends, None)
    assert (whole["tokens_per_second"], whole["tokens_per_forward"]) == (8, 4 / 3)
    assert summarize([one_round_by_hand()], never, None)["tokens"] == 8, "an EOS ends no row"


def test_the_picture_is_drawn_from_the_record(measured, tmp_path, capsys):
    record, picture, _ = measured
    path, again = tmp_path / "path.json", tmp_path / "again.png"
    path.write_text(json.dumps(record))
    assert cli.main(["bench", "--from", str(path), "--plot", str(again)]) == 0
    assert again.read_bytes() == picture.read_bytes()
    assert "embedded model" in capsys.readouterr().out
    path.write_text(json.dumps({**record, "batches": record["batches"][:1]}))
    assert cli.main(["bench", "--from", str(path), "--plot", str(again)]) == 0
    assert again.read_bytes() != picture.read_bytes()


def test_no_other_file_is_replaced(tmp_path, capsys):
    path = tmp_path / "eval.json"
    path.write_text('{"scores": []}')
    argv = ["bench", *SMALL, "--batch", "1", "--rounds", "1"]
    for options, said in (
        (["--json", path], "it has something else; expected a new file"),
        (["--json", path, "--plot", path], "expected a file ending in"),
        (["--json", "a.svg", "--plot", "a.svg"], "--json and --plot a.svg: expected two files"),
    ):
        refused(capsys, *argv, *options, said=said)
    assert path.read_text() == '{"scores": []}'


def test_an_interrupt_leaves_the_rounds_before_it(tmp_path, capsys, monkeypatch):
    path = tmp_path / "bench.json"
    # The one that warms up, and two that count.
    rounds = mock.Mock(side_effect=[*(one_round_by_hand() for _ in range(3)), KeyboardInterrupt])
    monkeypatch.setattr("dsb_runtime.measure.bench.one_round", rounds)
    argv = ["bench", *SMALL, "--batch", "1", "--rounds", "9", "--json", str(path)]
    assert cli.main(argv) == 130
    assert capsys.readouterr().err.endswith("dsb: interrupted\n")
    assert json.loads(path.read_text())["rounds"] == 2
    assert cli.main(["bench", "--from", str(path)]) == 0
