"""Every figure that the kernels and the decoding step are held to, measured by one command.

    python -m benchmarks.lab --json lab.json

takes one GPU and `--minutes`, and prints one table: figure, target, measured, reached. Parts run in
the order of the list below, the most valuable first. One that fails is reported and the rest goes
on; those that there is no time for are listed as not run, and `--continue` runs them later, then
those that were stopped. The file is written after every figure. Without a GPU everything runs at
small shapes, which shows that it works and nothing else: the targets do not apply.

Needs the packages of `pip install ".[test]"`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import BEGAN, lab_check, lab_decode, lab_linear, lab_ops, lab_sweep
from benchmarks.lab_state import Lab, Part, alive, run_part
from benchmarks.lab_targets import markdown_of, rows_of, table_of
from benchmarks.measure import device
from benchmarks.roofline import positive
from dsb_runtime.cli.main import OneLineParser
from dsb_runtime.files import check_writable
from dsb_runtime.measure.bench import describe_machine, describe_versions

PARTS = {
    "correct": Part(lab_check.correct, "each kernel against its definition in float64", 30),
    "ceilings": Part(lab_ops.ceilings, "copy bandwidth, matrix product"),
    "scoring": Part(lab_ops.scoring, "token_confidence, lm_head_confidence"),
    "small": Part(lab_ops.small, "place_rows, unmask_and_slide, rope_write_kv"),
    "decode": Part(lab_decode.decode_part, "LLaDA-8B, batch 1: steps, eager loop", 60),
    "linear": Part(lab_linear.linear_part, "linear layers of window steps beside cuBLAS's", 30),
    "attention": Part(lab_ops.attention_part, "window_attention and what else there is"),
    "goldens": Part(lab_check.goldens, "tests/test_cuda.py", 60),
    "batches": Part(lab_decode.batches, "LLaDA-8B, batch 8 and 32", 120),
    "profile": Part(lab_decode.profile, "LLaDA-8B, batch 1: GPU idle, phases", 30),
    "sweep": Part(lab_sweep.sweep, "alternatives to dsb_kernels/_configs.py"),
    "dream": Part(lab_decode.dream, "Dream-7B, batch 1", 60),
}


def build_parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:10} {part.about}" for name, part in PARTS.items())
    parser = OneLineParser(
        prog="lab", description=__doc__.split("\n")[0], epilog=f"parts:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--minutes", type=positive(float), default=9.0, help="for all of it, imports included (9)")
    add("--only", choices=PARTS, nargs="+", metavar="PART", help="these parts")
    add("--json", type=Path, metavar="FILE", help="written after every figure")
    add(
        "--continue",
        dest="resume",
        action="store_true",
        help="keep what --json has and run the parts that it has not whole, or those of --only",
    )
    add("--markdown", action="store_true", help="print the table ready to be pasted")
    return parser


def start_again(lab: Lab, names: list[str], markdown: bool) -> None:
    """Run the parts left in a new process, in place of this one, whose GPU answers no more."""
    if lab.path is None:
        lab.path = Path(tempfile.mkdtemp(prefix="lab")) / "lab.json"
    lab.save()
    minutes = max(lab.left, 0) / 60
    options = ["--json", str(lab.path), "--continue", "--minutes", f"{minutes:.3f}"]
    options += ["--markdown"] * markdown + ["--only", *names]
    print(
        f"lab: the GPU answers no more; a new process goes on with {', '.join(names)}", flush=True
    )
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.lab", *options])


def run_parts(lab: Lab, names: list[str], markdown: bool = False) -> None:
    """One after another."""
    for index, name in enumerate(names):
        print(f"lab: {name}: {PARTS[name].about}", file=sys.stderr, flush=True)
        run_part(lab, name, PARTS[name])
        part = lab.parts[name]
        why = f": {part['why']}" if part["why"] else ""
        print(f"lab: {name}: {part['status']} in {part['seconds']} s{why}", file=sys.stderr)
        if part["status"] != "ran" and names[index + 1 :] and not alive():
            start_again(lab, names[index + 1 :], markdown)
    if alive():
        lab.release()


def show(lab: Lab, markdown: bool) -> None:
    """The alternatives, then the table."""
    about = lab.about
    console = Console(width=None if Console().is_terminal else 160)
    if lab.details.get("sweep"):
        console.print(lab_sweep.sweep_table(lab.details["sweep"]))
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v is not None)
    said = f"{about['device']}; {versions}; `{about['command']}`, {about['date']}"
    if not lab.applies:
        said += ". Small shapes, no GPU: the targets do not apply"
    lines = rows_of(lab.record())
    if markdown:
        print(f"\n{said}\n\n{markdown_of(lines)}")
    else:
        console.print(table_of(lines, said))
    for name, part in lab.parts.items():
        if part["status"] != "ran":
            console.print(f"{name}: {part['status']}: {part['why']}", markup=False)


def main(argv: Sequence[str] | None = None, began: float | None = None) -> int:
    """`began`: when the process did, which the time that the run may take counts from."""
    parser = build_parser()
    args = parser.parse_args(argv)
    about: dict[str, Any] = {
        "benchmark": "lab",
        "command": " ".join(
            ["python -m benchmarks.lab", *(sys.argv[1:] if argv is None else argv)]
        ),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": describe_machine(device())["device"],
        "machine": describe_machine(device()),
        "versions": describe_versions(),
    }
    lab = Lab(60 * args.minutes, args.json, about)
    lab.began = lab.began if began is None else began
    try:
        check_writable("--json", args.json)
        if args.resume and args.json is None:
            raise ValueError("--continue: expected it with --json FILE")
        if args.resume:
            lab.resume(args.json)
    except ValueError as error:
        parser.error(str(error))
    names = [name for name in PARTS if args.only is None or name in args.only]
    if args.resume and args.only is None:  # a part that never ends keeps no other from its turn
        found = {name: lab.parts.get(name, {"status": "not run"})["status"] for name in names}
        names = [n for status in ("not run", "out of time") for n in names if found[n] == status]
    run_parts(lab, names, args.markdown)
    show(lab, args.markdown)
    return int(any(part["status"] == "failed" for part in lab.parts.values()))


if __name__ == "__main__":
    try:
        sys.exit(main(began=BEGAN))
    except KeyboardInterrupt:
        sys.exit("lab: interrupted; what was measured is in the file of --json, if one was given")
