"""The table of `gpu_hour.py`: what its parts wrote beside the targets of `targets.toml`."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks import read_toml
from dsb_runtime.measure.command import markdown_table


def files_of(folder: Path, name: str) -> list[Path]:
    """The JSON files of a part, one for each command."""
    return sorted(folder.glob(f"{name}.[0-9][0-9].json")) or [folder / f"{name}.json"]


def value_of(line: Any, path: str) -> Any:
    """The value at a path with dots; None where there is none."""
    for key in path.split("."):
        line = line.get(key) if isinstance(line, dict) else None
    return line


def lines_meant(target: dict[str, Any], lines: list[Any], applies: bool) -> list[Any]:
    """The lines that agree with the `where` of a target. Small runs have other shapes, so that
    shapes in it are ignored there."""
    where = target.get("where", {})
    if not applies:
        where = {k: v for k, v in where.items() if not k.startswith(("shape", "batch"))}
    return [line for line in lines if all(value_of(line, k) == v for k, v in where.items())]


def figure_of(target: dict[str, Any], lines: list[Any], applies: bool) -> float | None:
    """The figure of a target; not a number, which reaches none, where one of the lines that are
    meant says why it failed."""
    meant = lines_meant(target, lines, applies)
    values = [value_of(line, target["value"]) for line in meant]
    numbers = [float(value) for value in values if value is not None]
    if any(isinstance(value_of(line, "failed"), str) for line in meant):
        return math.nan
    if not numbers:
        return None
    if target.get("reduce") == "mean":
        return statistics.geometric_mean(numbers)
    return min(numbers) if "at_least" in target else max(numbers)


def show(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "share" else f"{value:.4g} {unit}".strip()


def row_of(
    target: dict[str, Any], lines: list[Any], part: dict[str, str], on_gpu: bool, h200: bool
) -> tuple[str, str, str, str]:
    """A line of the table. A part that failed or was cut off has not reached its target, whatever
    it has written: what is missing may be what is wrong."""
    unit, value = target.get("unit", ""), figure_of(target, lines, on_gpu)
    if value is None:
        measured = f"ran {part['why'] or 'and wrote no figure'}" if part["status"] == "ran" else ""
    elif math.isnan(value):
        meant = lines_meant(target, lines, on_gpu)
        why = [line["failed"] for line in meant if isinstance(value_of(line, "failed"), str)]
        measured = f"{len(why)} of {len(meant)} failed: {why[0]}"
    else:
        measured = show(value, unit)
    if part["status"] != "ran":
        measured = ", ".join(filter(None, (measured, f"{part['status']} {part['why']}".strip())))
    bound = next((b for b in ("at_least", "at_most") if b in target), "")
    if not bound:
        return target["figure"], "", measured, ""
    limit = target["H200" if h200 and "H200" in target else bound]
    words = f"{bound.replace('_', ' ')} {show(limit, unit)}"
    words += f", at best {show(target['stretch'], unit)}" if "stretch" in target else ""
    right = value is not None and (value >= limit if bound == "at_least" else value <= limit)
    if not on_gpu or part["status"] == "not run":
        reached = "-"
    else:
        reached = "NO" if not right else "yes" if part["status"] == "ran" else part["status"]
    return target["figure"], words, measured, reached


def report(folder: Path, state: dict[str, Any]) -> str:
    """The table of all figures beside their targets, in Markdown, and what did not run."""
    machines: dict[str, None] = {}
    lines_of: dict[str, list[Any]] = {}  # by part
    targets = read_toml("targets.toml")["target"]
    for name in dict.fromkeys(target["part"] for target in targets):
        lines_of[name] = []
        for file in filter(Path.is_file, files_of(folder, name)):
            record = json.loads(file.read_text("utf-8"))
            lines_of[name] += record.get("runs", record.get("lines", []))
            if "machine" in record:
                versions = (f"{k} {v}" for k, v in record["versions"].items() if v is not None)
                machines[f"{record['machine']['device']}; {', '.join(versions)}"] = None
    on_gpu, h200 = not state["small"], any("H200" in machine for machine in machines)
    not_run = {"status": "not run", "why": ""}
    table = [
        row_of(t, lines_of[t["part"]], state["parts"].get(t["part"], not_run), on_gpu, h200)
        for t in targets
    ]
    others = [
        f"- {name}: {part['status']} {part['why']}"
        for name, part in state["parts"].items() if part["status"] != "ran"
    ]  # fmt: skip
    head = "\n".join(machines) or "nothing was measured"
    head += "" if on_gpu else "\nSmall shapes: the targets do not apply."
    columns = dict.fromkeys(("figure", "target", "measured", "reached"), "left")
    return "\n\n".join(filter(None, (head, markdown_table(columns, table), "\n".join(others))))
