"""What the parts of benchmarks/lab.py find and report, and that their checks fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import lab_check, lab_decode, lab_linear, lab_ops, lab_sweep, roofline
from benchmarks.lab_state import Lab, NotHereError, OutOfTimeError
from benchmarks.lab_targets import TARGETS
from benchmarks.measure import Timing
from dsb_kernels import _configs as tuning
from dsb_kernels._configs import Config
from dsb_runtime.engine import layers

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="takes real shapes there")


def test_the_checks_find_mistakes(monkeypatch):
    found = Lab(60)
    op = lab_check.token_confidence

    def other_token(*args: Any, **settings: Any) -> Any:
        token, c = op(*args, **settings)
        return token.index_fill(0, torch.tensor([1]), 0), c

    def unwritten(*args: Any, **settings: Any) -> Any:
        out = attention(*args, **settings)
        out[0, 0, -1] = torch.nan
        return out

    def off_by_one(canvas: Any, *rest: Any) -> Any:
        commit = unmask(canvas, *rest)
        canvas[0, -1] += 1
        return commit

    attention, unmask = lab_check.window_attention, lab_check.unmask_and_slide
    monkeypatch.setattr(lab_check, "token_confidence", other_token)
    monkeypatch.setattr(lab_check, "window_attention", unwritten)
    monkeypatch.setattr(lab_check, "unmask_and_slide", off_by_one)
    lab_check.check_token(found)
    assert found.problems and all("other tokens" in problem for problem in found.problems)
    lab_check.check_attention(found)
    assert found.figures["window_attention error"]["value"] == float("inf")
    lab_check.check_unmask(found)
    assert found.figures["unmask differs"]["value"] == 36
    wrong, steps = found.problems[-2:]
    assert wrong.startswith("window_attention ") and "inf of 1.0e-05" in wrong
    assert steps == "unmask_and_slide: 36 steps differ"
    errors = lab_check.Errors(found, "op")
    exact = torch.ones(4).double()
    for plain, ratio in ((1 + 1e-6, 1.2), (1 + 1e-5, 0.6)):  # of 1e-5; of twice the definition's
        errors.add("a", torch.float32, exact * (1 + 1.2e-5), exact * plain, exact)
        assert found.details["correct"]["op a float32"] == pytest.approx(ratio)
    scores = torch.tensor([[1.0, 2.0, 2.0005], [3.0, 1.0, 0.0]]).double()
    errors.tokens("near", torch.tensor([1, 0]), scores, 1e-3)
    assert len(found.problems) == 8
    errors.tokens("far", torch.tensor([0, 0]), scores, 1e-3)
    errors.tokens("none", torch.tensor([2, -1]), scores, 1e-3)
    assert found.problems[8:] == [f"op {c}: 1 tokens of 2 differ" for c in ("far", "none")]


def test_counts_of_pytest():
    assert lab_check.counted("x\n3 failed, 70 passed, 2 skipped in 5.01s\n") == {
        "failed": 3, "passed": 70, "skipped": 2,
    }  # fmt: skip
    assert lab_check.counted("1 error in 0.1s") == {"error": 1}
    assert lab_check.counted("no tests ran in 0.01s") == {}


def test_trajectories_by_another_process(monkeypatch, tmp_path):
    found = Lab(60)
    (tmp_path / "test_some.py").write_text(
        "def test_a(): pass\ndef test_b(): pass\ndef test_c(): assert False\n"
    )
    monkeypatch.setattr(lab_check, "ROOT", tmp_path)
    with pytest.raises(NotHereError, match=re.escape("no tests/test_cuda.py here")):
        lab_check.goldens(found)
    monkeypatch.setattr(lab_check, "TESTS", "test_some.py")
    lab_check.goldens(found)
    assert found.figures["goldens failed"] == {"value": 1, "note": "2 passed"}
    assert found.problems == ["test_some.py: 1 failed"]
    assert any("test_c" in line for line in found.details["goldens"]["lines"])
    (tmp_path / "test_some.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(RuntimeError, match="pytest ended with 2"):
        lab_check.goldens(found)
    (tmp_path / "test_some.py").write_text("import time\ndef test_a(): time.sleep(60)\n")
    monkeypatch.setattr(lab_check, "GOLDEN_SECONDS", 1)
    with pytest.raises(TimeoutError, match="after 1 s"):
        lab_check.goldens(found)


def test_a_gpu_compiles_for_trajectories_in_processes_side_by_side(monkeypatch):
    asked: list[Any] = []

    def execute(command: list[str], timeout: float, **rest: Any) -> Any:
        asked.append((command[-2:], timeout))
        return subprocess.CompletedProcess(command, 0, "148 passed in 60.00s", "")

    monkeypatch.setattr(subprocess, "run", execute)
    monkeypatch.setattr(lab_check, "on_gpu", lambda: True)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    found = Lab(60)
    lab_check.goldens(found)
    assert found.figures["goldens failed"] == {"value": 0, "note": "148 passed"}
    ((words, limit),) = asked
    assert words == ["-n", "8"] and 60 < limit <= 70, "stopped by the run's limit before its own"


def test_scoring_takes_the_worst(monkeypatch):
    """With times that are made up: 2 µs with a cold L2 and 1 µs with a warm one."""
    found = Lab(60)
    found.kept["ceilings"] = roofline.Ceilings(1.0, 1.0, "")
    monkeypatch.setattr(lab_ops, "timing", lambda make, touched: Timing(2e-6, 1e-6))
    lab_ops.scoring(found)
    lab_ops.small(found)
    by_hand = 16 * (3000 * 4 + 12) / 2e-6 / 1e9
    assert found.figures["token bandwidth"]["value"] == pytest.approx(by_hand)
    assert found.figures["token 64"]["value"] == found.figures["rope 64"]["value"] == 2
    assert found.figures["token 64"]["note"] == "8 x 3000; 1.00 with a warm L2"
    assert found.figures["token float64"]["value"] == found.figures["head cublas"]["value"] == 1
    by_hand = ((2000 + 64) * 64 * 4 + 12 * 64) / 2e-6 / 1e9
    assert found.figures["head 64"]["value"] == pytest.approx(by_hand)
    assert all(t == {"cold_us": 2, "warm_us": 1} for t in found.details["small"].values())


def test_window_steps_with_cublas_capture_anew():
    found = Lab(60)
    found.kept["ceilings"] = roofline.Ceilings(1.0, 1.0, "")
    made = lab_decode.bench(found, "llada-8b")
    lab_decode.window_steps(found, made, 32)
    most = layers.MAX_ROWS
    with lab_linear.cublas(made):
        assert layers.MAX_ROWS == 0 and not made.engine.sessions
        lab_decode.window_steps(found, made, 32)
    assert layers.MAX_ROWS == most > 0 and not made.engine.sessions


def test_attention_reports_what_there_was_time_for(monkeypatch):
    found, calls = Lab(60), []
    found.kept["ceilings"] = roofline.Ceilings(1.0, 1.0, "")
    monkeypatch.setattr(lab_ops.attention, "others", lambda: ["sdpa", "flex"])

    def timing(make: Any, touched: int) -> Timing:
        calls.append(touched)
        if len(calls) == 3:
            raise RuntimeError("flex takes no such shape")
        if len(calls) == 5:
            raise OutOfTimeError
        return Timing({1: 2e-6, 2: 3e-6, 4: 2e-6}[len(calls)], 1e-6)

    monkeypatch.setattr(lab_ops, "timing", timing)
    with pytest.raises(OutOfTimeError):
        lab_ops.attention_part(found)
    (problem,) = found.problems
    assert "flex: RuntimeError: flex takes no such shape" in problem
    figure = found.figures["attention worst"]
    assert figure["value"] == found.figures["attention mean"]["value"] == pytest.approx(1.5)
    assert figure["note"] == "LLaDA-8B B=1 W=8 C=96, sdpa; 1 of 2 shapes"
    assert "attention dream" not in found.figures


def test_alternatives_are_tried_in_place_of_the_table(monkeypatch):
    seen: list[Config] = []

    def timing(make: Any, touched: int) -> Timing:
        seen.append(tuning.configuration("token_confidence", 64, "sm_90"))
        if seen[-1].num_warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return Timing(len(seen) * 1e-6, 0)

    now = tuning.configuration("token_confidence", 64, "sm_90")
    others = [Config({"BLOCK_V": 1, "SPLIT_BLOCKS": 1}, 8), Config({"BLOCK_V": 2}, 4)]
    monkeypatch.setattr(lab_sweep, "timing", timing)
    monkeypatch.setattr(lab_sweep, "ALTERNATIVES", {("token_confidence", 64): others})
    monkeypatch.setattr(lab_sweep, "SPLITS", (3,))
    found = Lab(60)
    lab_sweep.sweep(found)
    assert seen[:5] == [now, now, others[0], others[1], others[1]]
    assert all(c == now for c in seen[5:])
    assert tuning.configuration("token_confidence", 64, "sm_90") is now
    lines = found.details["sweep"]
    assert [line["current"] for line in lines] == [True, False, False, True, False]
    assert lines[0]["us"] == [1, 2] and "shared memory" in lines[1]["error"]
    assert [line["configuration"] for line in lines[3:]] == ["num_splits as chosen", "num_splits=3"]
    table = lab_sweep.sweep_table(lines)
    assert table.row_count == 5 and table.rows[0].style == "bold"


ON_A_GPU = """
import json, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
from benchmarks import lab_linear, lab_ops, lab_sweep, roofline
from benchmarks.lab_state import Lab
from benchmarks.measure import Timing
names = []
for module in (lab_linear, lab_ops, lab_sweep):
    module.timing = lambda make, touched: names.append(touched) or Timing(touched * 1e-12, 1e-6)
lab = Lab(60)
lab.kept["ceilings"] = roofline.Ceilings(4000.0, 800.0, "")
lab_linear.time_layers(lab)
linear, lab.figures = lab.figures, {}
for part in (lab_ops.scoring, lab_ops.small, lab_ops.attention_part, lab_sweep.sweep):
    part(lab)
print(json.dumps({"figures": lab.figures, "linear": linear, "details": lab.details,
                  "problems": lab.problems}))
"""


def test_what_a_gpu_would_time():
    """Real shapes, at made-up times of 1 TB/s: every figure is there."""
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_GPU], cwd=ROOT, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    figures, details = record["figures"], record["details"]
    asked = {t.key for t in TARGETS if t.part in ("scoring", "small", "attention")}
    assert set(figures) == asked and not record["problems"]
    for key in ("token bandwidth", "head 32", "head 128", "attention 4k", "attention 16k"):
        assert figures[key]["value"] == pytest.approx(0.25)
    # 64 rows of 152064 logits of two bytes, 8192 bytes of weights a token, ...
    assert figures["token 64"]["value"] == pytest.approx((64 * (155136 * 2 + 12)) * 1e-6)
    cold = details["scoring"]["lm_head_confidence LLaDA-8B 32 rows: op"]["cold_us"]
    assert cold == pytest.approx(1e-6 * (126464 + 32) * 8192, rel=1e-3)
    # 2 x 28 heads x 128 rows x 16384 positions x 128 x 2 FLOPs over 2 x (28 x 128 + 4 x 16384) x
    # 256 bytes.
    tflops = 4 * 28 * 128 * 16384 * 128 / (2 * (28 * 128 + 4 * 16384) * 256)
    assert figures["attention dream"]["value"] == pytest.approx(tflops)
    assert figures["attention 4k"]["note"] == "64 rows 25%, 128 rows 25%, 32 rows 25%"
    assert len(details["sweep"]) > 40 and figures["rope 64"]["value"] > 0
    linear = record["linear"]
    assert len(linear) == 6
    assert {round(figure["value"], 9) for figure in linear.values()} == {1, 0.25}
    cold = details["linear"]["LLaDA-8B gate/up 128 rows: matmul"]["cold_us"]
    assert cold == pytest.approx(2e-6 * (24576 * 4096 + 128 * (4096 + 12288)), rel=1e-3)


def test_every_alternative_is_another_configuration():
    for (op, size), configs in lab_sweep.ALTERNATIVES.items():
        now = tuning.configuration(op, size, "sm_90")
        every = [lab_sweep.short(c) for c in (now, *configs)]
        assert len(set(every)) == len(every)
        assert all(set(c.blocks) == set(now.blocks) for c in configs)


def test_the_idle_share_outlives_the_phases(monkeypatch):
    found, case = (
        Lab(60),
        SimpleNamespace(model=None, prompt=None, record=SimpleNamespace(kinds=[])),
    )

    def crash(*_: Any) -> None:
        raise RuntimeError("CUPTI")

    monkeypatch.setattr(lab_decode, "main_run", lambda *_: (case, {"gpu_wait_share": 0.01}))
    monkeypatch.setattr(lab_decode, "idle_share", lambda *_: 0.02)
    monkeypatch.setattr(lab_decode, "phase_times", crash)
    with pytest.raises(RuntimeError, match="CUPTI"):
        lab_decode.profile(found)
    assert found.figures["idle"] == {"value": 0.02, "note": "1.0% between steps"}


def test_a_batch_is_kept_once():
    found = Lab(60)
    found.kept["ceilings"] = roofline.Ceilings(1.0, 1.0, "")
    made = lab_decode.bench(found, "llada-8b")
    assert made.name == "tiny" and lab_decode.bench(found, "llada-8b") is made
    assert list(found.kept) == ["ceilings", "model tiny"]
    args, settings = made.settings("--max-block", "8", "--prefix-window", "16")
    assert (settings["max_block_length"], settings["prefix_window"]) == (8, 16)
    assert settings["steps"] == 9 and args.dtype == "bfloat16"
    for run in ({"batch": 1, "a": 1}, {"batch": 2}, {"batch": 1, "a": 2}):
        lab_decode.keep_run(found, made, args, settings, run)
    assert found.details["decode tiny"]["runs"] == [{"batch": 2}, {"batch": 1, "a": 2}]
    lab_decode.bench(found, "dream-7b")
    assert [key for key in found.kept if key.startswith("model")] == ["model tiny-dream"]
