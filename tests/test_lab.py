"""benchmarks/lab.py: what it runs, and what it says of what did not run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks
from benchmarks import lab, lab_state, roofline
from benchmarks.lab_state import Lab, NotHereError, OutOfTimeError, Part, run_part
from benchmarks.lab_targets import TARGETS, Target, markdown_of, rows_of, show

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
    assert "Alternatives to dsb_kernels/_configs.py" in done.stdout


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
        "scoring": {"status": "failed", "why": "RuntimeError: an error", "seconds": 0.0},
        "small": {"status": "out of time", "why": "the process ended in it", "seconds": 0.0},
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

    # Later: what did not run runs, then what was stopped.
    begun: list[str] = []
    parts(monkeypatch, scoring=lambda run: begun.append("scoring"),
          small=lambda run: (begun.append("small"), run.figure("unmask", 3)))  # fmt: skip
    assert run("--json", path, "--continue") == 0
    assert begun == ["small", "scoring"]
    assert set(read(path)["figures"]) == {"token 64", "unmask"}
    # What ran stays, unless it is named.
    assert run("--json", path, "--continue") == 0 and begun[2:] == []
    assert run("--json", path, "--continue", "--only", "small") == 0 and begun[2:] == ["small"]


def test_imports_take_of_the_time(monkeypatch, tmp_path):
    parts(monkeypatch, small=lambda run: run.figure("unmask", 3))
    path = tmp_path / "lab.json"
    assert lab.main(["--json", str(path), "--minutes", "1"], began=time.monotonic() - 61) == 0
    assert read(path)["parts"]["small"]["status"] == "not run"
    assert lab.main(["--json", str(path), "--minutes", "1"], began=time.monotonic() - 40) == 0
    assert read(path)["parts"]["small"]["status"] == "ran"
    source = (ROOT / "benchmarks" / "lab.py").read_text()
    assert "main(began=BEGAN)" in source and time.monotonic() > benchmarks.BEGAN


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


def test_a_killed_process_leaves_its_figures(monkeypatch, tmp_path):
    path, seen = tmp_path / "lab.json", []

    def scoring(run: Lab) -> None:
        run.figure("token 64", 7.5)
        run.fact("an extra", 2, "GB")
        seen.append(read(path))

    parts(monkeypatch, scoring=scoring)
    assert run("--json", path) == 0
    assert list(seen[0]["figures"]) == ["token 64", "an extra"]
    assert seen[0]["parts"]["scoring"]["why"] == "the process ended in it"
    assert accounted(seen[0])["token_confidence, 64 rows"]["measured"] == "7.5 µs"


def test_a_wrong_figure_takes_no_model_from_later_parts():
    found = Lab(60)
    found.kept = {"model tiny": 1, "ceilings": 2}
    run_part(found, "a", Part(lambda run: run.problem("one shape failed"), ""))
    assert found.parts["a"]["status"] == "failed" and "model tiny" in found.kept
    run_part(found, "b", Part(lambda run: sys.exit("no memory"), ""))
    assert list(found.kept) == ["ceilings"]


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


def test_a_part_that_holds_the_alarm_is_told_again(monkeypatch):
    """As a destructor does: what is raised in one is printed and forgotten."""
    monkeypatch.setattr(lab_state, "AGAIN", 0.1)
    began, found = time.monotonic(), Lab(seconds=0.2)

    def deaf(run: Lab) -> None:
        with contextlib.suppress(OutOfTimeError):
            time.sleep(20)
        time.sleep(20)

    run_part(found, "a", Part(deaf, ""))
    assert found.parts["a"]["status"] == "out of time" and time.monotonic() - began < 10


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
