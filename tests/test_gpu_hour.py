"""`benchmarks.gpu_hour`: parts that fail, hang or are cut off, what continues, and the report."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks import gpu_hour, ops, read_toml
from benchmarks.gpu_hour import Part
from benchmarks.hour_report import figure_of, files_of, report
from tests import golden

PRINT = "import json, sys; json.dump({'lines': [{'value': 3}]}, open(sys.argv[1], 'w'))"
SLEEP = "import time; print('asleep', flush=True); time.sleep(60)"


def part(program: str, expected: float = 1, patience: float = 60, count: int = 1) -> Part:
    return Part("a part", expected, [[sys.executable, "-c", program, "{json}"]] * count, patience)


def run(monkeypatch: Any, folder: Path, some: dict[str, Part], *options: str) -> dict[str, Any]:
    monkeypatch.setattr(gpu_hour, "parts", lambda small, folder: some)
    code = gpu_hour.main(["--folder", str(folder), "--small", *options])
    state = json.loads((folder / "parts.json").read_text())["parts"]
    assert code == any(p["status"] == "failed" for p in state.values())
    return state


def test_a_part_that_fails_or_hangs_costs_itself_alone(tmp_path, monkeypatch, capsys):
    """What hangs is ended with what it started."""
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"
    bad = part("raise SystemExit('no such thing')")
    began = time.monotonic()
    state = run(
        monkeypatch, tmp_path, {"bad": bad, "hangs": part(child, 1, 2), "good": part(PRINT)}
    )
    assert time.monotonic() - began < 30
    assert [p["status"] for p in state.values()] == ["failed", "failed", "ran"]
    assert json.loads((tmp_path / "good.json").read_text()) == {"lines": [{"value": 3}]}
    output = capsys.readouterr().out
    assert "- bad: failed exit code 1: no such thing\n- hangs: failed stopped after 2 s" in output


def test_what_was_cut_off_or_not_begun_continues(tmp_path, monkeypatch):
    """A part begins if the time that it should take is left, also where one before it did not."""
    some = {"big": part(PRINT, 90), "good": part(PRINT), "long": part(SLEEP), "last": part(PRINT)}
    state = run(monkeypatch, tmp_path, some, "--budget", "6")
    assert {name: p["status"] for name, p in state.items()} == {
        "big": "not run", "good": "ran", "long": "out of time", "last": "not run",
    }  # fmt: skip
    assert "s were left of 90" in state["big"]["why"]
    run_part = mock.Mock(side_effect=gpu_hour.run_part)
    monkeypatch.setattr(gpu_hour, "run_part", run_part)
    some["long"] = part(PRINT)
    state = run(monkeypatch, tmp_path, some, "--continue")
    assert {p["status"] for p in state.values()} == {"ran"}
    run(monkeypatch, tmp_path, some, "--only", "good")
    run(monkeypatch, tmp_path, some, "--report")
    # What never ends keeps nothing else from its turn.
    assert [call.args[0] for call in run_part.call_args_list] == ["big", "last", "long", "good"]


def test_commands_of_a_part_run_side_by_side(tmp_path, monkeypatch):
    """Each writes a file of its own; one that fails fails the part."""
    wait = "import time; time.sleep(2); " + PRINT
    began = time.monotonic()
    assert run(monkeypatch, tmp_path, {"all": part(wait, count=11)})["all"]["status"] == "ran"
    assert time.monotonic() - began < 15
    assert [p.name for p in files_of(tmp_path, "all")] == [
        f"all.{index:02}.json" for index in range(11)
    ]


MEMCHECK = "========= ERROR SUMMARY: {} errors"
RACECHECK = "========= RACECHECK SUMMARY: {0} hazards displayed ({0} errors, 0 warnings)"


@pytest.mark.parametrize(
    ("log", "code", "counts", "status"),
    [
        ("..F\n1 failed, 70 passed, 2 skipped, 3 errors in 5.0s", 1, [(70, 4, 2)], "failed"),
        ("2 skipped in 1s", 0, [], "failed"),
        ("", 0, [], "failed"),
        *((f"2 passed, 1 warning in 65.1s (0:01:05)\n{summary}".format(0), 0, [(2, 0, 0)], "ran")
          for summary in (MEMCHECK, RACECHECK)),
        *((f"2 passed in 5.0s\n{summary}".format(3), 9, [], "failed")
          for summary in (MEMCHECK, RACECHECK)),
        (f"1 failed in 5.0s\n{MEMCHECK}".format(0), 1, [(0, 1, 0)], "failed"),
        ("ran 3 errors in 2.0s\n========= 1 failed to launch", 0, [], "failed"),
    ],
)  # fmt: skip
def test_tests_that_did_not_run_are_no_figure(tmp_path, monkeypatch, log, code, counts, status):
    """Where nothing ran, nothing failed: that must not reach a target. What a sanitizer counts
    below pytest's last line are no tests."""
    program = f"print({log!r}); raise SystemExit({code})"
    tests = Part("tests", 15, [[sys.executable, "-c", program, "pytest"]])
    state = run(monkeypatch, tmp_path, {"goldens": tests})
    assert state["goldens"]["status"] == status
    lines = json.loads((tmp_path / "goldens.json").read_text())["lines"]
    assert [(line["passed"], line["failed"], line["skipped"]) for line in lines] == counts


def test_a_sanitizer_that_finds_errors_costs_no_figure_of_the_others(tmp_path, monkeypatch):
    def sanitized(tool: str, errors: int) -> list[str]:
        program = f"print('1 passed in 5.0s'); raise SystemExit({9 * bool(errors)})"
        return [sys.executable, "-c", program, "pytest", gpu_hour.TOOL, tool]

    commands = [sanitized("memcheck", 0), sanitized("memcheck", 3), sanitized("racecheck", 0)]
    state = run(monkeypatch, tmp_path, {"sanitizers": Part("tests", 15, commands)})
    assert state["sanitizers"]["status"] == "failed"
    lines = [json.loads(p.read_text())["lines"] for p in files_of(tmp_path, "sanitizers")]
    expected = {"passed": 1, "failed": 0, "skipped": 0}
    assert lines == [[expected | {"tool": "memcheck"}], [], [expected | {"tool": "racecheck"}]]


def test_a_figure_is_the_worst_of_the_lines_that_are_meant():
    lines = [
        {"op": "a", "shape": {"n": 1}, "us": 3.0}, {"op": "a", "shape": {"n": 2}, "us": 12.0},
        {"op": "b", "shape": {"n": 1}, "us": 99.0}, {"op": "a", "shape": {"n": 1}},
    ]  # fmt: skip

    def figure(where: dict[str, Any], applies: bool = True, **target: Any) -> float | None:
        return figure_of({"value": "us", "where": where, **target}, lines, applies)

    assert figure({"op": "a"}, at_most=1) == 12 and figure({"op": "a"}, at_least=1) == 3
    assert figure({"op": "a"}, reduce="mean") == 6
    assert figure({"op": "a", "shape.n": 1}, at_most=1) == 3
    assert figure({"op": "a", "shape.n": 1}, at_most=1, applies=False) == 12
    assert figure({"op": "c"}) is None and figure({}, value="deep.er") is None
    lines.append({"op": "b", "failed": "RuntimeError: no"})
    assert math.isnan(figure({"op": "b"}, at_most=100)) and figure({"op": "a"}, at_most=1) == 12
    lines[:] = [{"failed": 0, "passed": 7}]  # what pytest counts
    assert figure({}, value="failed", at_most=0) == 0


def test_a_program_that_is_missing_costs_its_part(tmp_path, monkeypatch):
    some = {"bad": Part("a part", 1, [["no-such-program"]]), "good": part(PRINT)}
    state = run(monkeypatch, tmp_path, some)
    assert [p["status"] for p in state.values()] == ["failed", "ran"]
    assert "no-such-program" in state["bad"]["why"]


def test_all_parts_fit_into_two_calls(tmp_path, capsys):
    """As long as they take what is expected of them. The first part checks, and compiles for all
    ops and configurations."""
    every = gpu_hour.parts(False, tmp_path)
    calls = gpu_hour.calls_of(every, gpu_hour.BUDGET - gpu_hour.START)
    assert gpu_hour.BUDGET <= 9 * 60 and set(calls.values()) == {1, 2}
    second = sum(part.expected for name, part in every.items() if calls[name] == 2)
    assert second <= 480, "what takes longer than it should has room"
    assert next(iter(every)) == "check" and set(calls) == set(every)
    words = [word for command in every["check"].commands for word in command]
    assert {*ops.BENCHMARKS, *gpu_hour.OTHER_SIZES, "64"} <= set(words)
    assert sorted({item["size"] for item in read_toml("sweep.toml")["sweep"]}) == sorted(
        {64, *map(int, gpu_hour.OTHER_SIZES)}
    )
    with pytest.raises(SystemExit):
        gpu_hour.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["in", "all", f"{sum(p.expected for p in every.values()):.0f}", "s"]


@pytest.mark.parametrize(("family", "index"), gpu_hour.GOLDENS.items())
def test_what_the_sanitizer_runs_is_a_test(family, index):
    """A trajectory with DSB Cache and few forwards."""
    assert golden.settings(golden.cases(family)[index])["cache"] == "dsb"
    assert golden.cases(family)[index]["nfe"] <= 12
    for tool, graphs in gpu_hour.SANITIZERS.items():
        command = gpu_hour.sanitize(tool)[list(gpu_hour.GOLDENS).index(family)]
        name = f"tests/test_cuda.py::test_trajectory[{family}-{index}-{graphs}]"
        assert name in command and tool in command


@pytest.mark.parametrize(("device", "reached"), [("NVIDIA H100", "NO"), ("NVIDIA H200", "yes")])
def test_the_report_compares_with_the_targets_of_the_gpu(tmp_path, device, reached):
    run = {"free_window_share_of_weights_limit": 0.76}
    record = {"machine": {"device": device}, "versions": {"torch": "2", "x": None}, "runs": [run]}
    (tmp_path / "decode_32.json").write_text(json.dumps(record))
    state = {"small": False, "parts": {"decode_32": {"status": "ran", "why": ""}}}
    lines = report(tmp_path, state).splitlines()
    assert lines[0] == f"{device}; torch 2"
    line = next(line for line in lines if "32 positions, prompt 1024" in line)
    limit = {"NO": "78.0%", "yes": "75.0%"}[reached]
    assert line.endswith(f"| at least {limit}, at best 85.0% | 76.0% | {reached} |")


@pytest.mark.parametrize(
    ("line", "status", "measured", "reached"),
    [
        ({"error": 0.5}, "ran", "0.5", "yes"),
        ({"error": 2}, "ran", "2", "NO"),
        ({"failed": "MemoryError: 9 GB"}, "ran", "1 of 2 failed: MemoryError: 9 GB", "NO"),
        ({"failed": "MemoryError: 9 GB"}, "failed",
         "1 of 2 failed: MemoryError: 9 GB, failed exit code 1: no", "NO"),
        ({"error": 0.5}, "failed", "0.5, failed exit code 1: no", "failed"),
        ({"error": 0.5}, "out of time", "0.5, out of time exit code 1: no", "out of time"),
        (None, "failed", "failed exit code 1: no", "NO"),
        (None, "ran", "ran and wrote no figure", "NO"),
        (None, "not run", "not run 3 s were left of 9", "-"),
    ],
)  # fmt: skip
def test_what_failed_has_not_reached_its_target(tmp_path, line, status, measured, reached):
    """Neither one shape of many, nor a command that ended before it wrote all of its shapes."""
    lines = [{"contender": "op", "error": 0.25}, {"contender": "op", **(line or {})}]
    (tmp_path / "check.00.json").write_text(json.dumps({"lines": lines if line else []}))
    why = {"ran": "", "not run": "3 s were left of 9"}.get(status, "exit code 1: no")
    state = {"small": False, "parts": {"check": {"status": status, "why": why}}}
    row = next(x for x in report(tmp_path, state).splitlines() if "in float64: error" in x)
    assert row.split(" | ")[1:] == ["at most 1", measured, f"{reached} |"]


def test_every_target_names_a_part_and_every_op_is_in_one(tmp_path):
    names = gpu_hour.parts(False, tmp_path).keys()
    targets = read_toml("targets.toml")["target"]
    assert {target["part"] for target in targets} <= set(names)
    assert len({target["figure"] for target in targets}) == len(targets)
    assert sorted(op for some in gpu_hour.OPS.values() for op in some) == sorted(ops.BENCHMARKS)
    with pytest.raises(SystemExit):
        gpu_hour.main(["--only", "nothing"])
    with pytest.raises(SystemExit):
        gpu_hour.main(["--folder", str(tmp_path / "none"), "--report"])


def test_the_docs_have_the_arithmetic_of_every_target():
    """Errors that must not be need none."""
    text = (gpu_hour.ROOT / "docs" / "tuning.md").read_text("utf-8").split("## Targets")[1]
    cells = [line.split("|") for line in text.split("\n## ")[0].splitlines() if "|" in line]
    shown = {cell[1].strip(): {*re.findall(r"[\d.]+", cell[2])} for cell in cells[2:]}
    targets = [t for t in read_toml("targets.toml")["target"] if {"at_least", "at_most"} & t.keys()]
    of_errors = [t for t in targets if "why" not in t]
    assert {t["part"] for t in of_errors} == {"check", "goldens", "sanitizers"}
    for target in targets:
        scale = 100 if target.get("unit") == "share" else 1
        bounds = {"at_least", "at_most", "H200", "stretch"} & target.keys()
        for key in bounds if "why" in target else ():
            assert f"{scale * target[key]:.4g}" in shown[target["why"]], (target["figure"], key)
    assert set(shown) == {t["why"] for t in targets if "why" in t}


@pytest.mark.slow
def test_the_whole_hour_runs_on_a_cpu(tmp_path, capsys):
    """Every part at small shapes; what is read on a GPU alone has no figure here."""
    assert gpu_hour.main(["--folder", str(tmp_path), "--small", "--budget", "1500"]) == 0
    state = json.loads((tmp_path / "parts.json").read_text())["parts"]
    assert {part["status"] for part in state.values()} == {"ran"}
    output = capsys.readouterr().out
    assert "Small shapes: the targets do not apply." in output
    table = [line.split("|") for line in output.splitlines() if line.startswith("| ")][1:]
    missing = [cells[1].strip() for cells in table if cells[3].strip().startswith(("ran", "not"))]
    assert missing[:2] == [figure for figure in missing if "compute-sanitizer" in figure]
    idle = ["GPU idle, batch 1", "time that kernels one after another do not take, batch 1"]
    assert missing[2:] == idle, "every other figure is read from what a part wrote"
