"""The tables of `dsb profile`, read from the Chrome trace that torch's profiler wrote.

On a GPU the time is that of kernels and copies. Each belongs to the range in which the host
launched it, whether by an operator, by Triton or by a graph's replay. On a CPU the time is the
host's.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dsb_runtime.measure.command import table_of

PREFIX = "dsb: "  # of every range's name
STEP = re.compile(rf"{PREFIX}(\w+) step \d+")
LAYER = re.compile(r"layer \d+: ")
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
OUTSIDE, WHOLE = "outside of phases", "whole step"

Event = dict[str, Any]  # of the trace format: name, cat, ts and dur in µs, tid, args


@dataclass(frozen=True)
class Total:
    """The calls and the time of all events of one name."""

    name: str
    calls: int
    us: float


class Ranges:
    """Ranges on the host that do not overlap."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.all = sorted(events, key=lambda event: event["ts"])

    def at(self, time: float) -> str:
        """The short name of the range in which a time lies, or ""."""
        index = bisect_right(self.all, time, key=lambda event: event["ts"]) - 1
        if index < 0 or time > self.all[index]["ts"] + self.all[index]["dur"]:
            return ""
        return short_name(self.all[index])


def read_trace(path: Path) -> list[Event]:
    """A trace's events that have a duration."""
    trace = json.loads(path.read_text("utf-8"))
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


def gpu_work(events: list[Event]) -> list[Event]:
    """Kernels and copies. Raise ValueError where there is none."""
    work = [event for event in events if event.get("cat") in GPU_WORK]
    if not work:
        raise ValueError("trace: it holds no kernel; expected a GPU whose tracing is permitted")
    return work


def own_times(events: list[Event]) -> Iterator[tuple[str, int, float]]:
    """(name, calls, µs), whose sums are each operator's calls, and its time without the time of the
    operators that it calls. An operator that calls another of the same name counts as one call
    together with that one."""
    callers: dict[Any, list[Event]] = defaultdict(list)  # by thread
    ops = [event for event in events if event.get("cat") == "cpu_op"]
    # A caller comes before what it calls, also where both start in the same instant.
    for op in sorted(ops, key=lambda op: (op["ts"], -op["dur"])):
        stack, calls = callers[op["tid"]], 1
        while stack and op["ts"] >= stack[-1]["ts"] + stack[-1]["dur"]:
            stack.pop()
        if stack:
            yield stack[-1]["name"], 0, -op["dur"]
            calls = int(op["name"] != stack[-1]["name"])
        stack.append(op)
        yield op["name"], calls, op["dur"]


def totals(events: list[Event], on_gpu: bool) -> list[Total]:
    """Kernels by GPU time, or operators by their own time on the host, longest first."""
    times = own_times(events)
    if on_gpu:
        times = ((event["name"], 1, event["dur"]) for event in gpu_work(events))
    calls: Counter[str] = Counter()
    us: dict[str, float] = defaultdict(float)
    for name, count, took in times:
        calls[name] += count
        us[name] += took
    longest_first = sorted(us.items(), key=lambda item: -item[1])
    return [Total(name, calls[name], took) for name, took in longest_first]


def longest_table(events: list[Event], on_gpu: bool, count: int = 10) -> Table:
    """The `count` kernels (on a CPU the operators) with the longest total time."""
    every = totals(events, on_gpu)
    whole = sum(total.us for total in every)
    what = "kernel" if on_gpu else "operator"
    return table_of(
        [what, "calls", "ms", "share"],
        [(t.name, str(t.calls), f"{t.us / 1e3:.3f}", f"{t.us / whole:.1%}") for t in every[:count]],
        title=f"The {min(count, len(every))} longest {what}s of {len(every)}",
        caption="shares of all GPU time" if on_gpu else "own time, without operators called inside",
    )


def launched_work(events: list[Event]) -> list[tuple[float, float]]:
    """(when the host launched it, µs on the GPU) for each kernel and copy."""
    launched = {
        event.get("args", {}).get("correlation"): event["ts"]
        for event in events if event.get("cat") in LAUNCHES
    }  # fmt: skip
    work = ((w["args"].get("correlation"), w["dur"]) for w in gpu_work(events))
    return [(launched[of], took) for of, took in work if of is not None and of in launched]


@dataclass(frozen=True)
class KindOfStep:
    """All steps of one kind."""

    steps: int
    us: float  # the time of all these steps
    phases: list[Total]  # in their order, summed over the layers


def by_kind(events: list[Event], on_gpu: bool) -> dict[str, KindOfStep]:
    """Time of each phase, by the kind of step."""
    named = [
        event for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
    ]  # fmt: skip
    steps = Ranges(event for event in named if STEP.fullmatch(event["name"]))
    phases = Ranges(event for event in named if not STEP.fullmatch(event["name"]))
    launched = launched_work(events) if on_gpu else None

    def work(ranges: Ranges) -> list[tuple[float, float]]:
        """(when it was launched, µs) for each kernel of a GPU; on a CPU for each range."""
        return [(r["ts"], r["dur"]) for r in ranges.all] if launched is None else launched

    us: dict[tuple[str, str], float] = defaultdict(float)
    for time, took in work(steps):
        us[steps.at(time), WHOLE] += took
    for time, took in work(phases):
        us[steps.at(time), phases.at(time)] += took
    calls = Counter((steps.at(phase["ts"]), short_name(phase)) for phase in phases.all)
    return {
        kind: KindOfStep(count, us[kind, WHOLE], [
            Total(label, n, us[kind, label]) for (of, label), n in calls.items() if of == kind
        ])
        for kind, count in Counter(map(short_name, steps.all)).items()
    }  # fmt: skip


def short_name(event: Event) -> str:
    """The kind of a step, or the name of a phase without the layer's number."""
    step = STEP.fullmatch(event["name"])
    return step[1] if step else LAYER.sub("layer: ", event["name"].removeprefix(PREFIX))


def phase_table(events: list[Event], on_gpu: bool) -> Table:
    """The time of each phase in an average step of each kind, summed over the layers."""
    kinds = by_kind(events, on_gpu)
    columns, labels = ["phase", "ranges"], dict[str, int]()  # a phase's ranges in a step
    for kind, of_kind in kinds.items():
        columns += [f"{kind}\n(of {of_kind.steps})", "share"]
        for phase in of_kind.phases:
            labels.setdefault(phase.name, phase.calls // of_kind.steps)

    lines = [[label, str(ranges)] for label, ranges in labels.items()]
    lines += [[OUTSIDE, ""], [WHOLE, "1"]]
    for k in kinds.values():
        times = {phase.name: phase.us for phase in k.phases}
        times |= {OUTSIDE: k.us - sum(times.values()), WHOLE: k.us}
        for line in lines:
            us = times.get(line[0], 0.0)
            line += [f"{us / k.steps / 1e3:.3f}", f"{us / k.us:.1%}" if k.us else ""]
    return table_of(
        columns, lines, title="Phases, layers summed: ms in a step",
        caption="GPU time of what was launched in the phase" if on_gpu else "time on the host",
    )  # fmt: skip
