"""One command for all measurements that need a GPU, which may be stopped and continued.

    python -m benchmarks.gpu_hour                       # 540 seconds; then it says what is left
    python -m benchmarks.gpu_hour --continue            # the parts that have not run
    python -m benchmarks.gpu_hour --report              # what the folder holds, beside the targets

Each part runs commands of this repository in processes of their own, under a time limit. Each
writes its JSON as it goes, with a log beside it, so that a part that fails or hangs loses its own
figures only. The parts run in the order of `--help`: correctness, which also compiles the kernels
side by side, then the most valuable figures. `targets.toml` has the targets, which do not apply to
`--small`. The command needs the packages of `pip install ".[test]"`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import read_toml
from dsb_runtime.cli.process import OneLineParser, run_process
from dsb_runtime.files import read_json

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "gpu_hour"  # ignored by git; a second call of the hour continues from it
LEAST = 10  # a part starts only if so many seconds are left
COUNTS = re.compile(r"(\d+) (passed|failed|error|skipped)")
OPS = {
    "scoring": ["lm_head_confidence", "token_confidence"],
    "attention": ["window_attention"],
    "small": ["unmask_and_slide", "rope_write_kv", "place_rows"],
    "linear": ["window_linear", "linear_add_norm"],
}


@dataclass(frozen=True)
class Part:
    """A piece of the hour. Its commands run side by side; "{json}" stands for a file of results."""

    about: str
    limit: float  # seconds
    commands: list[list[str]]


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

    def bounded(width: int, *options: str) -> list[list[str]]:
        """Windows of `width` positions: a block of 32 that does not grow, and the prefix."""
        block, prefix = (8, width // 4 - 8) if small else (32, width - 32)
        limits = ["--max-block", str(block), "--prefix-window", str(prefix)]
        return [decode("llada-8b", small, *limits, *rounds, *options)]

    def ops(group: str) -> list[list[str]]:
        return [module("ops", "--op", *OPS[group])]

    goldens = ["tests/test_cuda.py"]
    if small:
        goldens = [f"tests/test_golden.py::test_trajectory[{f}-0]" for f in ("llada", "dream")]
    sanitizer = shutil.which("compute-sanitizer")
    families = "tests/test_cuda.py::test_batches_seeds_and_policies_are_the_same_with_graphs"
    other_sizes = ["--size", "32", "128", "896", "1024"]
    return {
        "check": Part("each op against its definition in float64", 150,
                      [module("ops", "--check", "--op", op) for ops in OPS.values() for op in ops]),
        "goldens": Part("recorded trajectories, on a GPU with CUDA graphs as well", 180,
                        [pytest(goldens, *workers)]),
        "decode_64": Part("LLaDA-8B, windows of 64: steps, eager loop, phases, idle share", 120,
                          bounded(64, "--phases")),
        "decode_32": Part("windows of 32", 60, bounded(32, "--no-eager")),
        "decode_128": Part("windows of 128", 60, bounded(128, "--no-eager")),
        "greedy": Part("a block that grows", 90, [decode("llada-8b", small, *rounds)]),
        "prompt_1000": Part("windows of 64 after a prompt of 1000", 60,
                            bounded(64, "--no-eager", "--prompt", "20" if small else "1000")),
        "roofline": Part("the phases of decode_64 beside their floors", 30,
                         [module("roofline", "--measured", str(folder / "decode_64.json"))]),
        "sweep_64": Part("launch configurations at 64 positions", 120,
                         [module("sweep", "--size", "64")]),
        "scoring": Part("LM head, token_confidence", 120, ops("scoring")),
        "attention": Part("window_attention beside SDPA, FlexAttention, flash-attn", 150,
                          ops("attention")),
        "small": Part("the small ops", 90, ops("small")),
        "linear": Part("the linear layers of window steps beside cuBLAS", 90, ops("linear")),
        "batches": Part("LLaDA-8B, batch 8 and 32", 180, [
            decode("llada-8b", small, "--batch", *(("2", "3") if small else ("8", "32")),
                   "--no-eager", "--rounds", "1")]),
        "dream": Part("Dream-7B beside the eager loop", 120, [decode("dream-7b", small, *rounds)]),
        "sweep": Part("launch configurations at other sizes", 240, [module("sweep", *other_sizes)]),
        **({} if sanitizer is None else {
            tool: Part(f"compute-sanitizer --tool {tool} on one test of each family", 300,
                       [[sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest([families])]])
            for tool in ("memcheck", "racecheck")}),
    }  # fmt: skip


def files_of(folder: Path, name: str) -> list[Path]:
    """The JSON files of a part, one for each command."""
    return sorted(folder.glob(f"{name}.[0-9].json")) or [folder / f"{name}.json"]


def run_part(name: str, part: Part, folder: Path, seconds: float) -> dict[str, Any]:
    """Run the commands of a part side by side for at most `seconds`, and say how it went."""
    for old in folder.glob(f"{name}.*"):
        old.unlink()
    began, limit = time.monotonic(), min(part.limit, seconds)
    processes: dict[Path, subprocess.Popen[bytes]] = {}  # by log
    status, why = "ran", ""
    try:
        for index, command in enumerate(part.commands):
            path = folder / (f"{name}.{index}.log" if len(part.commands) > 1 else f"{name}.log")
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
    except subprocess.TimeoutExpired:
        # A part that had its own whole limit would not end in another call either.
        status = "failed" if limit == part.limit else "out of time"
        why = f"stopped after {limit:.0f} s"
    finally:
        for process in processes.values():
            # A part's process leads the group of every process that it has started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if "pytest" in part.commands[0]:
        counts = count_tests(folder / f"{name}.log")
        ended = status == "ran" or counts["failed"] > 0
        if status == "ran" and not counts["passed"]:
            status, why, ended = "failed", "no test ran", False
        (folder / f"{name}.json").write_text(json.dumps({"lines": [counts] * ended}))
    return {"status": status, "why": why, "seconds": round(time.monotonic() - began, 1)}


def count_tests(log: Path) -> dict[str, int]:
    """What pytest counted in its last line: "3 failed, 70 passed in 5.0s"."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    lines = [line for line in log.read_text(errors="replace").splitlines() if COUNTS.search(line)]
    for number, what in COUNTS.findall(lines[-1] if lines else ""):
        counts["failed" if what == "error" else what] += int(number)
    return counts


def value_of(line: Any, path: str) -> Any:
    """The value at a path with dots; None where there is none."""
    for key in path.split("."):
        line = line.get(key) if isinstance(line, dict) else None
    return line


def figure_of(target: dict[str, Any], lines: list[Any], applies: bool) -> float | None:
    """The figure of a target. Small runs have other shapes, so that shapes in `where` are ignored
    there."""
    where = target.get("where", {})
    if not applies:
        where = {k: v for k, v in where.items() if not k.startswith(("shape", "batch"))}
    meant = [line for line in lines if all(value_of(line, k) == v for k, v in where.items())]
    values = [value_of(line, target["value"]) for line in meant]
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return None
    if target.get("reduce") == "mean":
        return statistics.geometric_mean(numbers)
    return min(numbers) if "at_least" in target else max(numbers)


def show(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "share" else f"{value:.4g} {unit}".strip()


def report(folder: Path, state: dict[str, Any]) -> str:
    """The table of all figures beside their targets, in Markdown, and what did not run."""
    machines: dict[str, None] = {}
    on_gpu = not state["small"]
    table = ["| figure | target | measured | reached |", "| --- | --- | --- | --- |"]
    for target in read_toml("targets.toml")["target"]:
        lines: list[Any] = []
        for file in files_of(folder, target["part"]):
            if file.is_file():
                record = json.loads(file.read_text("utf-8"))
                lines += record.get("runs", record.get("lines", []))
                if "machine" in record:
                    versions = (f"{k} {v}" for k, v in record["versions"].items() if v is not None)
                    machines[f"{record['machine']['device']}; {', '.join(versions)}"] = None
        unit, value = target.get("unit", ""), figure_of(target, lines, on_gpu)
        part = state["parts"].get(target["part"], {"status": "not run", "why": ""})
        measured = f"{part['status']} {part['why']}" if value is None else show(value, unit)
        limit_text = reached = ""
        for bound in {"at_least", "at_most"} & target.keys():
            limit = target[bound]
            if "H200" in target and any("H200" in machine for machine in machines):
                limit = target["H200"]
            limit_text = f"{bound.replace('_', ' ')} {show(limit, unit)}"
            if value is not None:
                right = value >= limit if bound == "at_least" else value <= limit
                reached = "-" if not on_gpu else "yes" if right else "NO"
        cells = (target["figure"], limit_text, measured.replace("|", "/"), reached)
        table.append(f"| {' | '.join(cells)} |")
    others = [
        f"- {name}: {part['status']} {part['why']}"
        for name, part in state["parts"].items() if part["status"] != "ran"
    ]  # fmt: skip
    head = "\n".join(machines) or "nothing was measured"
    head += "" if on_gpu else "\nSmall shapes: the targets do not apply."
    return "\n\n".join(filter(None, (head, "\n".join(table), "\n".join(others))))


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    listed = "\n".join(f"  {name:12} {part.about}" for name, part in parts(False, FOLDER).items())
    parser = OneLineParser(
        prog="gpu_hour", description=(__doc__ or "").split("\n")[0],
        epilog=f"parts:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--budget", type=float, default=540, metavar="SECONDS", help="for all of it (540)")
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
        if left <= LEAST:
            state["parts"].setdefault(name, {"status": "not run", "why": "no time was left"})
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
