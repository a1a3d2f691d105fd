"""benchmarks/lab.py: what it runs, what it says of what did not run, and that its checks fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    lab,
    lab_check,
    lab_decode,
    lab_linear,
    lab_ops,
    lab_state,
    lab_sweep,
    roofline,
)
from benchmarks.lab_state import Lab, NotHereError, OutOfTimeError, Part, run_part
from benchmarks.lab_targets import TARGETS, Target, markdown_of, rows_of, show
from benchmarks.measure import Timing
from dsb_kernels import tuning
from dsb_kernels.tuning import Config
from dsb_runtime import layers

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="takes real shapes there")


def run(*options: str) -> int:
    return lab.main([str(option) for option in options])


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def accounted(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The table's lines by figure; every target has a measurement or says why not."""
    lines = {line["figure"]: line for line in rows_of(record)}
    for target in TARGETS:
        line = lines[target.figure]
        measured = target.key in record["figures"]
        status = record["parts"].get(target.part, {"status": "not run"})["status"]
        assert measured or line["measured"].startswith((status, "not measured")), line
    return lines


# --- targets ----------------------------------------------------------------------------------


def test_targets_are_those_asked_for():
    found = {t.key: (t.comparison, t.value, t.unit) for t in TARGETS}
    assert len(found) == len(TARGETS) == len({t.figure for t in TARGETS})
    assert {t.part for t in TARGETS} < set(lab.PARTS)
    at_least = {
        "token bandwidth": 0.85, "token float64": 20, "head 32": 0.9, "head 64": 0.85,
        "head 128": 0.75, "head cublas": 1, "attention worst": 1, "attention mean": 1.3,
        "attention 4k": 0.6, "attention 16k": 0.75, "attention dream": 350, "window 32": 0.75,
        "window 64": 0.7, "window 128": 0.6, "refresh": 0.75, "eager": 5, "batch 8": 0.85,
        "batch 32": 0.85,
    }  # fmt: skip
    at_most = {"token 64": 8, "unmask": 5, "rope 64": 3.5, "idle": 0.03}
    for key, (comparison, value, _) in found.items():
        if key in at_least:
            assert (comparison, value) == ("at least", at_least[key])
        elif key in at_most:
            assert (comparison, value) == ("at most", at_most[key])
        else:
            assert comparison == "at most" and value in (0, 1)  # errors


def test_reached():
    fast = Target("a", "p", "a", "at most", 8, "µs", "")
    wide = Target("b", "p", "b", "at least", 0.85, "share", "")
    assert fast.reached(8) and not fast.reached(8.01) and not fast.reached(float("nan"))
    assert wide.reached(0.85) and not wide.reached(0.849) and not wide.reached(float("nan"))
    assert [show(v, u) for v, u in ((0.856, "share"), (4.256, "µs"), (5.0, "x"), (1234.5, ""))] == [
        "85.6%", "4.26 µs", "5 x", "1234",
    ]  # fmt: skip
    assert show(float("inf"), "x") == "inf"


def test_lines_of_every_outcome():
    first = {t.part: t for t in reversed(TARGETS)}
    figures = {
        "token 64": {"value": 9.0, "note": "a | b"},
        "rope 64": {"value": 3.0, "note": ""},
        "extra": {"value": 2.0, "note": "", "figure": "an extra", "unit": "GB"},
    }
    parts = {
        "scoring": {"status": "ran", "why": ""},
        "small": {"status": "failed", "why": "ValueError: no"},
        "decode": {"status": "out of time", "why": "it was stopped"},
        "profile": {"status": "ran", "why": ""},
    }
    record = {"figures": figures, "parts": parts, "applies": True}
    lines = accounted(record)
    assert lines["token_confidence, 64 rows"]["reached"] == "NO"
    assert lines["rope_write_kv, 64 rows"]["reached"] == "yes"
    assert lines["unmask_and_slide"]["measured"] == "failed: ValueError: no"
    assert lines[first["decode"].figure]["measured"] == "out of time: it was stopped"
    assert lines[first["attention"].figure]["measured"] == "not run: not asked for"
    assert lines["GPU idle, batch 1"]["measured"] == "not measured on this machine"
    assert lines["an extra"]["measured"] == "2 GB" and lines["an extra"]["target"] == ""
    table = markdown_of(rows_of(record)).splitlines()
    assert {line.count("|") for line in table} == {6}
    assert table[0] == "| figure | target | measured | reached | note |"
    assert "| token_confidence, 64 rows | at most 8 µs | 9 µs | NO | a / b |" in table
    elsewhere = rows_of({**record, "applies": False})
    assert {line["reached"] for line in elsewhere} == {"-", ""}


# --- a run ------------------------------------------------------------------------------------


def test_a_run_at_small_shapes(tmp_path, capsys):
    """The parts that are quick on a CPU; the others are listed."""
    path = tmp_path / "lab.json"
    names = ("correct", "ceilings", "small", "decode", "linear", "profile")
    assert run("--json", path, "--only", *names, "--markdown") == 0
    said, record = capsys.readouterr().out, read(path)
    assert {name: part["status"] for name, part in record["parts"].items()} == dict.fromkeys(
        names, "ran"
    )
    lines = accounted(record)
    assert "the targets do not apply" in said and not record["applies"]
    for target in TARGETS:
        assert f"| {target.figure} |" in said
        asked = target.part in names and target.key != "idle"  # which takes a GPU
        assert (target.key in record["figures"]) == asked
    assert lines["GPU idle, batch 1"]["measured"] == "not measured on this machine"
    assert record["figures"]["unmask differs"]["value"] == 0
    assert record["versions"]["torch"] == torch.__version__
    # What it decoded is a measurement like any other.
    decoded = tmp_path / "lab.tiny.json"
    assert read(decoded) == record["details"]["decode tiny"]
    roofline.main(["--measured", str(decoded)])
    assert "outside of phases" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    path = tmp_path / "lab.json"
    command = [sys.executable, "-m", "benchmarks.lab", "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = read(path)
    accounted(record)
    missing = {t.key for t in TARGETS} - set(record["figures"])
    assert missing == {"idle", "goldens failed"} and list(record["parts"]) == list(lab.PARTS)
    assert record["parts"]["goldens"]["why"] == "tests/test_cuda.py: skipped, it needs a GPU"
    sweep = record["details"]["sweep"]
    assert len({(line["op"], line["case"]) for line in sweep if line["current"]}) >= 7
    assert "Alternatives to dsb_kernels/tuning.py" in done.stdout


def parts(monkeypatch: pytest.MonkeyPatch, **made: Any) -> None:
    monkeypatch.setattr(lab, "PARTS", {name: Part(run, "") for name, run in made.items()})


def test_a_part_that_fails_is_reported_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    path, seen = tmp_path / "lab.json", []

    def scoring(run: Lab) -> None:
        run.figure("token 64", 7.5)
        raise RuntimeError("an error\nof two lines")

    def small(run: Lab) -> None:
        seen.append(read(path))
        run.figure("unmask", 4)
        run.problem("one shape failed")

    parts(monkeypatch, scoring=scoring, small=small)
    assert run("--json", path) == 1
    said = capsys.readouterr().out
    assert seen[0]["parts"] == {
        "scoring": {"status": "failed", "why": "RuntimeError: an error", "seconds": 0.0}
    }, "written before the next part began"
    assert seen[0]["figures"] == {"token 64": {"value": 7.5, "note": ""}}
    record = read(path)
    assert record["parts"]["small"]["why"] == "one shape failed"
    lines = accounted(record)
    assert lines["token_confidence, 64 rows"]["measured"] == "7.5 µs"
    assert lines["unmask_and_slide"]["measured"] == "4 µs"
    assert lines["rope_write_kv, 64 rows"]["measured"] == "failed: one shape failed"
    assert "scoring: failed: RuntimeError: an error" in said
    assert not list(tmp_path.glob("*.part"))


def test_time_is_kept(monkeypatch, tmp_path, capsys):
    path = tmp_path / "lab.json"

    def scoring(run: Lab) -> None:
        run.figure("token 64", 7.5)
        try:
            time.sleep(30)
        except Exception as error:
            raise AssertionError("no part may hold it") from error

    def small(run: Lab) -> None:
        raise AssertionError("begun without time")

    parts(monkeypatch, scoring=scoring, small=small)
    began = time.monotonic()
    assert run("--json", path, "--minutes", "0.05") == 0
    assert time.monotonic() - began < 20
    record = read(path)
    found = {name: (part["status"], part["why"]) for name, part in record["parts"].items()}
    assert found["scoring"] == ("out of time", "it was stopped")
    assert found["small"] == ("not run", "0 s left, it takes 0 or more")
    lines = accounted(record)
    assert lines["token_confidence, 64 rows"]["measured"] == "7.5 µs"
    assert lines["unmask_and_slide"]["measured"].startswith("not run: 0 s left")
    assert "small: not run" in capsys.readouterr().out

    # Later: what ran stays, what did not run runs.
    begun: list[str] = []
    parts(monkeypatch, scoring=lambda run: begun.append("scoring"),
          small=lambda run: (begun.append("small"), run.figure("unmask", 3)))  # fmt: skip
    assert run("--json", path, "--continue") == 0
    assert begun == ["small"]
    assert set(read(path)["figures"]) == {"token 64", "unmask"}


def test_a_dead_gpu_is_left_to_a_new_process(monkeypatch, tmp_path):
    path, started = tmp_path / "lab.json", []

    def execute(program: str, words: list[str]) -> None:
        started.append(words)
        raise InterruptedError("replaced")

    def scoring(run: Lab) -> None:
        run.figure("token 64", 7.5)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    begun: list[str] = []
    made = {"small": lambda run: begun.append("small"), "dream": lambda run: begun.append("dream")}
    parts(monkeypatch, scoring=scoring, **made)
    monkeypatch.setattr(lab, "alive", lambda: False)
    monkeypatch.setattr(lab_state, "alive", lambda: False)
    monkeypatch.setattr(os, "execv", execute)
    with pytest.raises(InterruptedError, match="replaced"):
        run("--json", path, "--markdown")
    (words,) = started
    assert words[:3] == [sys.executable, "-m", "benchmarks.lab"]
    assert words[3:6] == ["--json", str(path), "--continue"] and words[6] == "--minutes"
    assert 8 < float(words[7]) <= 9 and words[8:] == ["--markdown", "--only", "small", "dream"]
    monkeypatch.setattr(lab, "alive", lambda: True)
    assert run(*words[3:]) == 1, "a part failed"
    assert begun == ["small", "dream"] and "token 64" in read(path)["figures"]


def test_a_part_that_cannot_run_here_says_so():
    def elsewhere(run: Lab) -> None:
        raise NotHereError("no such thing here")

    found = Lab(60)
    run_part(found, "a", Part(elsewhere, ""))
    assert found.parts["a"] == {"status": "not run", "why": "no such thing here", "seconds": 0.0}


def test_a_part_that_gives_up_stops_no_other():
    """As `benchmarks.decode` does where what would be timed is other work."""
    found = Lab(60)
    run_part(found, "a", Part(lambda run: sys.exit("decode: nothing is timed"), ""))
    assert found.parts["a"]["status"] == "failed"
    assert found.parts["a"]["why"] == "SystemExit: decode: nothing is timed"


def test_a_part_alone_takes_its_time_limit():
    found = Lab(seconds=0.5)
    run_part(found, "a", Part(lambda run: time.sleep(20), ""))
    assert found.parts["a"]["status"] == "out of time"
    with pytest.raises(OutOfTimeError), lab_state.time_limit(0):
        time.sleep(5)
    time.sleep(0.01)  # no alarm is left


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--minutes 0", "argument --minutes: '0': expected a number above 0"),
        ("--only scoring nothing", "argument --only: invalid choice: 'nothing'"),
        ("--json /nope/x.json", "--json /nope/x.json: no such folder"),
        ("--continue", "--continue: expected it with --json FILE"),
        ("--continue --json {tmp}/no.json", "/no.json: No such file or directory; --continue"),
        ("--continue --json {tmp}/bad.json", "/bad.json: expected what benchmarks.lab wrote"),
    ],
)
def test_bad_arguments_take_one_line(options, said, tmp_path, capsys):
    (tmp_path / "bad.json").write_text('{"figures": 1}')
    with pytest.raises(SystemExit) as stop:
        run(*options.format(tmp=tmp_path).split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("lab: ") and said in error


# --- parts ------------------------------------------------------------------------------------


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


def test_a_batch_is_kept_once():
    found = Lab(60)
    found.kept["ceilings"] = roofline.Ceilings(1.0, 1.0, "")
    made = lab_decode.bench(found, "llada-8b")
    assert made.name == "tiny" and lab_decode.bench(found, "llada-8b") is made
    args, settings = made.settings("--max-block", "8", "--prefix-window", "16")
    assert (settings["max_block_length"], settings["prefix_window"]) == (8, 16)
    assert settings["steps"] == 9 and args.dtype == "bfloat16"
    for run in ({"batch": 1, "a": 1}, {"batch": 2}, {"batch": 1, "a": 2}):
        lab_decode.keep_run(found, made, args, settings, run)
    assert found.details["decode tiny"]["runs"] == [{"batch": 2}, {"batch": 1, "a": 2}]
    lab_decode.bench(found, "dream-7b")
    assert [key for key in found.kept if key.startswith("model")] == ["model tiny-dream"]
