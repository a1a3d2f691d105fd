"""lm-evaluation-harness with the model `dsb`, from its command line and from Python, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsb_runtime.demo import MODEL_DIR, SUDOKU_DIR, sudoku
from dsb_runtime.demo.problems import heldout
from tests.commands import python

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra: pip install .[eval]")

from lm_eval.tasks import TaskManager  # noqa: E402

import dsb_runtime.doors.lm_eval  # noqa: E402, F401 - registers the model

SETTINGS = f"pretrained={MODEL_DIR},schedule=dsb,cache=dsb,threshold=0.9,gen_length=64,mc_num=4"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks over 21 problems (an odd number, for two processes)."""
    folder = tmp_path_factory.mktemp("tasks")
    with (folder / "problems.jsonl").open("w") as file:
        for p in heldout(21, seed=3, steps=2):
            choices = [p.response, p.response.replace(f"Answer {p.answer}.", "Answer 0.")]
            row = {"prompt": p.prompt, "answer": str(p.answer), "choices": choices}
            file.write(json.dumps(row) + "\n")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "problems.jsonl")},
                           "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }  # fmt: skip
    answer = {
        "task": "word_problems",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False},
        "filter_list": [{"name": "answer", "filter": [
            {"function": "regex", "regex_pattern": "Answer (\\d+)"}, {"function": "take_first"},
        ]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    choose = {
        "task": "word_choices",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (answer, choose):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return folder


@pytest.fixture(scope="module")
def alone(tasks) -> dict[str, Any]:
    """What the harness measures in this process."""
    return lm_eval.simple_evaluate(
        model="dsb", model_args=SETTINGS, tasks=["word_problems", "word_choices"],
        task_manager=TaskManager(include_path=str(tasks)), device="cpu", batch_size=8,
        apply_chat_template=True, bootstrap_iters=0,
    )  # fmt: skip


def test_the_harness_end_to_end(alone):
    assert alone["results"]["word_problems"]["exact_match,answer"] >= 0.9
    assert alone["results"]["word_choices"]["acc,none"] >= 0.9
    measured = alone["config"]["dsb_measured"]
    assert (measured["answers"], measured["processes"]) == (21, 1)
    assert measured["tokens_per_forward"] == measured["tokens"] / measured["forwards"] > 2


def test_the_harness_takes_the_sudoku_model(tmp_path):
    with (tmp_path / "puzzles.jsonl").open("w") as file:
        for puzzle in sudoku.heldout(20):
            file.write(json.dumps({"prompt": puzzle.prompt, "answer": puzzle.response}) + "\n")
    task = {
        "task": "sudoku", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "puzzles.jsonl")},
                           "cache_dir": str(tmp_path / "cache")},
        "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "regexes_to_ignore": ["\\s"]}],
    }  # fmt: skip
    (tmp_path / "sudoku.yaml").write_text(yaml.safe_dump(task))
    settings = f"pretrained={SUDOKU_DIR},threshold=0.99,gen_length=36,block_length=12"
    results = lm_eval.simple_evaluate(
        model="dsb", model_args=settings, tasks=["sudoku"], device="cpu", batch_size=20,
        task_manager=TaskManager(include_path=str(tmp_path)), apply_chat_template=True,
        bootstrap_iters=0,
    )  # fmt: skip
    assert results["results"]["sudoku"]["exact_match,none"] >= 0.85  # 97% of 1000


@pytest.mark.slow
def test_the_command_with_two_processes(alone, tasks, tmp_path):
    """The harness's own command under accelerate, which starts more than one process without GPUs
    if `--multi_gpu` is named."""
    done = python(
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "-m", "dsb_runtime.doors.lm_eval", "--model", "dsb", "--model_args", SETTINGS,
        "--tasks", "word_problems,word_choices", "--include_path", tasks,
        "--batch_size", "8", "--device", "cpu", "--apply_chat_template",
        "--output_path", tmp_path, "--log_samples",
        cwd=tasks, env={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert "tokens_per_forward" in done.stderr and "exact_match" in done.stdout
    (file,) = tmp_path.rglob("results_*.json")
    shared = json.loads(file.read_text())
    for name, metric in (("word_problems", "exact_match,answer"), ("word_choices", "acc,none")):
        assert shared["results"][name][metric] == alone["results"][name][metric]
        (file,) = tmp_path.rglob(f"samples_{name}_*.jsonl")
        there = {s["doc_id"]: s["filtered_resps"] for s in map(json.loads, file.open())}
        here = {s["doc_id"]: s["filtered_resps"] for s in alone["samples"][name]}
        assert len(there) == 21 and there.keys() == here.keys()
        if name == "word_problems":
            assert there == here
            continue
        for doc, choices in here.items():
            for (total, greedy), (other, flag) in zip(choices, there[doc], strict=True):
                assert float(other) == pytest.approx(total, abs=1e-3) and flag == str(greedy)
    measured = shared["config"]["dsb_measured"]
    assert measured["processes"] == 2
    for count in ("answers", "tokens", "forwards"):
        assert measured[count] == alone["config"]["dsb_measured"][count]
