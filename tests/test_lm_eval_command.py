"""lm-evaluation-harness with the model `dsb`, from its command line and from Python, offline."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.demo.problems import heldout

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra: pip install .[eval]")

from lm_eval.tasks import TaskManager  # noqa: E402

import dsb_runtime.doors.lm_eval  # noqa: E402, F401 - registers the model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks over 21 problems (an odd number, for two processes)."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "prompt": p.prompt,
            "answer": str(p.answer),
            "choices": [p.response, p.response.replace(f"Answer {p.answer}.", "Answer 0.")],
        }
        for p in heldout(21, seed=3, steps=2)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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


def test_the_harness_end_to_end(tasks):
    results = lm_eval.simple_evaluate(
        model="dsb",
        model_args=f"pretrained={MODEL_DIR},gen_length=64,mc_num=4,check_greedy=False",
        tasks=["word_problems", "word_choices"],
        task_manager=TaskManager(include_path=str(tasks)),
        device="cpu", batch_size=8, apply_chat_template=True, bootstrap_iters=0,
    )  # fmt: skip
    assert results["results"]["word_problems"]["exact_match,answer"] >= 0.9
    assert results["results"]["word_choices"]["acc,none"] >= 0.9
    measured = results["config"]["dsb_measured"]
    assert measured["answers"] == 21
    assert measured["tokens_per_forward"] == measured["tokens"] / measured["forwards"] > 2


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
}  # fmt: skip


def run_harness(launcher: list[str], tasks: Path, out: Path) -> dict:
    """The command of the README; its results with every sample's responses."""
    command = [
        *launcher, "-m", "dsb_runtime.doors.lm_eval", "--model", "dsb", "--model_args",
        f"pretrained={MODEL_DIR},schedule=dsb,cache=dsb,threshold=0.9,gen_length=64,mc_num=4",
        "--tasks", "word_problems,word_choices", "--include_path", str(tasks),
        "--batch_size", "8", "--device", "cpu", "--apply_chat_template",
        "--output_path", str(out), "--log_samples",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tasks, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "tokens_per_forward" in done.stderr and "exact_match" in done.stdout
    (file,) = out.rglob("results_*.json")
    results = json.loads(file.read_text())
    for name in ("word_problems", "word_choices"):
        (file,) = out.rglob(f"samples_{name}_*.jsonl")
        samples = map(json.loads, file.read_text().splitlines())
        results[name] = {s["doc_id"]: s["filtered_resps"] for s in samples}
    return results


@pytest.mark.slow
def test_the_command_with_one_and_two_processes(tasks, tmp_path):
    """The harness's own command with the model registered, in one process and under accelerate."""
    one = run_harness([sys.executable], tasks, tmp_path / "one")
    # Without GPUs `--multi_gpu` is still what makes accelerate start more than one process.
    accelerate = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    ]  # fmt: skip
    two = run_harness(accelerate, tasks, tmp_path / "two")
    assert one["results"]["word_problems"]["exact_match,answer"] >= 0.9
    for name, metric in (("word_problems", "exact_match,answer"), ("word_choices", "acc,none")):
        assert one["results"][name][metric] == two["results"][name][metric]
        assert len(one[name]) == 21
    assert one["word_problems"] == two["word_problems"]
    for doc, choices in one["word_choices"].items():
        for here, there in zip(choices, two["word_choices"][doc], strict=True):
            assert float(here[0]) == pytest.approx(float(there[0]), abs=1e-3)
            assert here[1] == there[1]
    assert one["config"]["dsb_measured"]["processes"] == 1
    assert two["config"]["dsb_measured"]["processes"] == 2
    for count in ("answers", "tokens", "forwards"):
        assert one["config"]["dsb_measured"][count] == two["config"]["dsb_measured"][count]


@pytest.mark.slow
def test_torch_and_the_harness_load_nothing_of_ours(tmp_path):
    """Installed, the package is found by the entry point `lm_eval.models` and by nothing else."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    code = """
import sys, importlib.metadata as metadata
(ours,) = [d for d in metadata.distributions(path=sys.path[1:2]) if d.name == "dsb-kernels"]
print(sorted((e.group, e.name, e.value) for e in ours.entry_points))
import torch, lm_eval
print([m for m in sys.modules if m.startswith("dsb_")])
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**ENVIRONMENT, "PYTHONPATH": path},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    entries, loaded = done.stdout.splitlines()
    assert ast.literal_eval(entries) == [
        ("console_scripts", "dsb", "dsb_runtime.cli.main:main"),
        ("lm_eval.models", "dsb", "dsb_runtime.doors.lm_eval:DSBLM"),
    ]
    assert loaded == "[]"
