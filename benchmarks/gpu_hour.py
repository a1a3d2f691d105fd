"""One command for all measurements that need a GPU, which may be stopped and continued.

    python -m benchmarks.gpu_hour                       # 540 seconds; then it says what is left
    python -m benchmarks.gpu_hour --continue            # the parts that have not run
    python -m benchmarks.gpu_hour --report              # what the folder holds, beside the targets
    tar czf gpu_hour.tgz build/gpu_hour                 # at the end: all of it in one file

Each part runs commands of this repository in processes of their own, under a time limit. Each
writes its JSON as it goes, with a log beside it, so that a part that fails or hangs loses its own
figures only. The parts run in the order of `--help`, which says how long each should take: first
correctness, which also compiles the kernels side by side, then the most valuable figures. A part
begins only where there is that much time left, and what follows it may fit in its place.
`targets.toml` has the targets, which do not apply to `--small`. The command needs the packages of
`pip install ".[test]"`. A machine that is lent for the hour may hand back few files, so that the
folder is packed before it goes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import benchmark_parser
from benchmarks.hour_report import report
from dsb_runtime.cli.process import run_process
from dsb_runtime.files import read_json

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "gpu_hour"  # ignored by git; a second call of the hour continues from it
BUDGET = 540  # seconds of one call
START = 10  # of them, until the first part runs
REAP = 10  # seconds to wait for a killed process, which may hang in the driver
COUNTS = re.compile(r"(\d+) (passed|failed|error|skipped)")
# Pytest's last line. What compute-sanitizer counts it prints below that line.
LAST_LINE = re.compile(r"=* ?\d+ \w+(, \d+ \w+)* in [\d.]+s\b")
OPS = {
    "scoring": ["lm_head_confidence", "token_confidence"],
    "attention": ["window_attention", "refresh_attention"],
    "small": ["unmask_and_slide", "rope_write_kv", "place_rows"],
    "linear": ["window_linear", "linear_add_norm"],
}
WITHOUT_PRECISION = ("place_rows", "unmask_and_slide")  # their arguments are integers
OTHER_SIZES = ["32", "128", "896", "1024"]  # of sweep.toml
TOOL = "--tool"  # of compute-sanitizer
SANITIZERS = {"memcheck": False, "racecheck": True}  # whether steps are captured
GOLDENS = {"llada": 13, "dream": 23}  # a short trajectory of each family with DSB Cache


@dataclass(frozen=True)
class Part:
    """A piece of the hour. Its commands run side by side; "{json}" stands for a file of results."""

    about: str
    expected: float  # seconds on one GPU, computed (benchmarks/RESULTS.md)
    commands: list[list[str]]
    patience: float = 2.0  # a part is stopped after so many times what it should take

    @property
    def limit(self) -> float:
        return self.patience * self.expected


def module(name: str, *options: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}", *options, "--json", "{json}"]


def decode(model: str, small: bool, *options: str) -> list[str]:
    """An end-to-end decoding at prompt 1024, gen 256, block 32, or at small shapes on a CPU."""
    shape = ["--device", "cuda", "--prompt", "1024", "--gen", "256", "--block", "32"]
    if small:
        model = "tiny-dream" if model == "dream-7b" else "tiny"
        shape = ["--dtype", "bfloat16", "--prompt", "24", "--gen", "32", "--block", "8"]
    return module("decode", "--preset", model, *shape, *options)


def pytest(tests: Sequence[str], *options: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *tests, "-q", "--tb=short", "-o", "addopts=", *options]


def parts(small: bool, folder: Path) -> dict[str, Part]:
    """All parts by name, the most valuable first."""
    workers = [] if small else ["-n", str(min(8, os.cpu_count() or 1))]
    rounds = ["--rounds", "1" if small else "3"]

    def bounded(width: int, prompt: int, *options: str) -> list[list[str]]:
        """Windows of `width` positions: a block of 32 that does not grow, and the prefix."""
        block, prefix = (8, width // 4 - 8) if small else (32, width - 32)
        limits = ["--max-block", str(block), "--prefix-window", str(prefix)]
        length = ["--prompt", str(prompt // 50 if small else prompt)]
        return [decode("llada-8b", small, *limits, *length, *rounds, *options)]

    def ops(group: str) -> list[list[str]]:
        return [module("ops", "--op", *OPS[group])]

    goldens = ["tests/test_cuda.py"]
    if small:
        goldens = [f"tests/test_golden.py::test_trajectory[{f}-0]" for f in ("llada", "dream")]
    every: dict[str, Part] = {
        "check": Part("ops against their definitions in float64; compiles", 100, check(small)),
        "goldens": Part("recorded trajectories, on a GPU with CUDA graphs as well", 60,
                        [pytest(goldens, *workers)]),
        "decode_64": Part("LLaDA-8B, windows of 64: steps, eager loop, phases, idle share", 90,
                          bounded(64, 1024, "--phases")),
        "decode_32": Part("windows of 32", 25, bounded(32, 1024, "--no-eager")),
        "decode_128": Part("windows of 128", 25, bounded(128, 1024, "--no-eager")),
        "greedy": Part("a block that grows", 50, [decode("llada-8b", small, *rounds)]),
        **{f"prompt_1000_{width}": Part(f"windows of {width} after a prompt of 1000", 25,
                                        bounded(width, 1000, "--no-eager"))
           for width in (64, 32, 128)},
        "roofline": Part("the phases of decode_64 beside their floors", 10,
                         [module("roofline", "--measured", str(folder / "decode_64.json"))]),
        "sweep_64": Part("launch configurations at 64 positions", 65,
                         [module("sweep", "--size", "64")]),
        "scoring": Part("LM head, token_confidence", 45, ops("scoring")),
        "attention": Part("window_attention beside SDPA, FlexAttention, flash-attn", 90,
                          ops("attention")),
        "small": Part("the small ops", 30, ops("small")),
        "linear": Part("the linear layers of window steps beside cuBLAS", 50, ops("linear")),
        "dream": Part("Dream-7B beside the eager loop", 50, [decode("dream-7b", small, *rounds)]),
        # Their GPU work is small, and each takes its time to begin.
        "sanitizers": Part("one trajectory of each family under compute-sanitizer", 70, [
            command for tool in SANITIZERS for command in sanitize(tool)]),
        "batches": Part("LLaDA-8B, batch 8 and 32, window 64", 90, bounded(
            64, 1024, "--batch", *(("2", "3") if small else ("8", "32")), "--no-eager",
            "--rounds", "1")),
        "sweep": Part("launch configurations at other sizes", 85,
                      [module("sweep", "--size", *OTHER_SIZES)]),
    }  # fmt: skip
    if small:  # on a CPU, which may be a slow one
        del every["sanitizers"]
        return {name: replace(part, patience=20) for name, part in every.items()}
    return every


def check(small: bool) -> list[list[str]]:
    """Commands that check every op and every candidate of the sweep. On a GPU they compile for all
    that follows, one process for each op and precision."""
    if small:
        return [module("correct")]
    ops = [op for some in OPS.values() for op in some]
    commands = [module("correct", "--op", op) for op in ops]
    commands += [module("correct", "--op", op, "--precision", "float16")
                 for op in ops if op not in WITHOUT_PRECISION]  # fmt: skip
    return [*commands, *(module("sweep", "--check", "--size", *sizes)
                         for sizes in (["64"], OTHER_SIZES))]  # fmt: skip


def sanitize(tool: str) -> list[list[str]]:
    """A trajectory of each family under a tool of compute-sanitizer. Without CUDA graphs torch need
    not keep memory, so that a tensor ends where its allocation ends and memcheck sees what is
    beyond it."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    program = shutil.which("compute-sanitizer", path=path) or "compute-sanitizer"
    graphs = SANITIZERS[tool]
    alone = [] if graphs else ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    # Libraries ask the driver for functions and attributes that it may not have. Memcheck would
    # count each such call as an error; one that matters is an exception of torch or Triton.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [
        [*alone, program, TOOL, tool, *options, "--error-exitcode", "9",
         *pytest([f"tests/test_cuda.py::test_trajectory[{family}-{index}-{graphs}]"])]
        for family, index in GOLDENS.items()
    ]  # fmt: skip


def run_part(name: str, part: Part, folder: Path, seconds: float) -> dict[str, Any]:
    """Run the commands of a part side by side for at most `seconds`, and say how it went."""
    for old in folder.glob(f"{name}.*"):
        old.unlink()
    began, limit = time.monotonic(), min(part.limit, seconds)
    processes: dict[Path, subprocess.Popen[bytes]] = {}  # by log
    status, why = "ran", ""
    try:
        for index, command in enumerate(part.commands):
            path = folder / (f"{name}.{index:02}.log" if len(part.commands) > 1 else f"{name}.log")
            line = [str(path.with_suffix(".json")) if w == "{json}" else w for w in command]
            with path.open("wb") as log:
                processes[path] = subprocess.Popen(
                    line, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
        for process in processes.values():
            process.wait(max(limit - (time.monotonic() - began), 0.1))
        for path, process in processes.items():
            if process.returncode and status == "ran":
                said = path.read_text(errors="replace").strip() or "it printed nothing"
                last = said.splitlines()[-1][:200]
                status, why = "failed", f"exit code {process.returncode}: {last}"
    except OSError as error:
        status, why = "failed", f"{type(error).__name__}: {error}"
    except subprocess.TimeoutExpired:
        # A part that had its own whole limit would not end in another call either.
        status = "failed" if limit == part.limit else "out of time"
        why = f"stopped after {limit:.0f} s"
    finally:
        for process in processes.values():
            # A part's process leads the group of every process that it has started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(REAP)
    tests = (
        zip(part.commands, processes.items(), strict=False) if "pytest" in part.commands[0] else ()
    )
    for command, (path, process) in tests:
        counts: dict[str, Any] = count_tests(path)
        if status == "ran" and not counts["passed"]:
            status, why = "failed", "no test ran"
        ended = (process.returncode == 0 and counts["passed"] > 0) or counts["failed"] > 0
        if TOOL in command:
            counts["tool"] = command[command.index(TOOL) + 1]
        path.with_suffix(".json").write_text(json.dumps({"lines": [counts] * ended}))
    return {"status": status, "why": why, "seconds": round(time.monotonic() - began, 1)}


def count_tests(log: Path) -> dict[str, int]:
    """What pytest counted in its last line: "3 failed, 70 passed in 5.0s"."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    lines = list(filter(LAST_LINE.match, log.read_text(errors="replace").splitlines()))
    for number, what in COUNTS.findall(lines[-1] if lines else ""):
        counts["failed" if what == "error" else what] += int(number)
    return counts


def calls_of(every: dict[str, Part], budget: float) -> dict[str, int]:
    """In which call each part would run if every part took as long as is expected."""
    calls: dict[str, int] = {}
    for call in range(1, len(every) + 1):
        left = budget
        for name, part in every.items():
            if name not in calls and part.expected <= left:
                calls[name], left = call, left - part.expected
    return calls


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    every = parts(False, FOLDER)
    calls = calls_of(every, BUDGET - START)
    listed = "\n".join(
        f"  {name:15} {part.expected:4.0f} s  call {calls[name]}  {part.about}"
        for name, part in every.items()
    )
    listed += f"\n  {'in all':15} {sum(part.expected for part in every.values()):4.0f} s"
    parser = benchmark_parser(
        "gpu_hour", __doc__,
        epilog=f"parts, and how long each should take on one GPU:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"of this call ({BUDGET})")
    folder = FOLDER.relative_to(ROOT)
    add("--folder", type=Path, default=FOLDER, metavar="DIR", help=f"of the results ({folder})")
    add("--only", nargs="+", metavar="PART", help="these parts")
    add("--continue", dest="resume", action="store_true", help="the parts that have not run")
    add("--report", action="store_true", help="run nothing: print the table")
    add("--small", action="store_true", help="small shapes on a CPU")
    args = parser.parse_args(argv)
    folder = args.folder.absolute()
    every, file = parts(args.small, folder), folder / "parts.json"
    unknown = sorted(set(args.only or ()) - set(every))
    if unknown:
        parser.error(f"--only {unknown[0]}: expected some of {', '.join(every)}")
    if (args.resume or args.report) and not file.is_file():
        parser.error(f"--folder {folder}: no results there to continue or to report")
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {"small": args.small, "parts": {}}
    if file.is_file() and (args.resume or args.report or args.only):
        state = read_json(file, "--folder")
        if not isinstance(state, dict) or not isinstance(state.get("parts"), dict):
            raise ValueError(f"--folder {folder}: parts.json is not what gpu_hour writes")
    names = [] if args.report else [n for n in every if args.only is None or n in args.only]
    if args.resume and args.only is None:
        done = {name: part["status"] for name, part in state["parts"].items()}
        names = [n for wanted in ("not run", "out of time") for n in names
                 if done.get(n, "not run") == wanted]  # fmt: skip
    for name in names:
        left = args.budget - (time.monotonic() - began)
        if left < every[name].expected:
            why = f"{max(left, 0):.0f} s were left of {every[name].expected:.0f}"
            state["parts"].setdefault(name, {"status": "not run", "why": why})
        else:
            print(f"gpu_hour: {name}: {every[name].about}", flush=True)
            # The file says this if the process is killed.
            state["parts"][name] = {"status": "out of time", "why": "the command ended in it"}
            file.write_text(json.dumps(state, indent=1))
            state["parts"][name] = run_part(name, every[name], folder, left)
            print(f"gpu_hour: {name}: {state['parts'][name]}", flush=True)
        file.write_text(json.dumps(state, indent=1))
    print(report(folder, state))
    return int(any(part["status"] == "failed" for part in state["parts"].values()))


if __name__ == "__main__":
    sys.exit(run_process("gpu_hour", main))
