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
from collections.abc import Callable, Iterable, Iterator
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


@dataclass(frozen=True)
class Range:
    """A range on the host, in µs."""

    name: str
    start: float
    end: float


class Ranges:
    """Ranges that do not overlap; `at` finds the one in which a time lies."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self.all = sorted(ranges, key=lambda r: r.start)
        self.starts = [r.start for r in self.all]

    def at(self, time: float) -> Range | None:
        index = bisect_right(self.starts, time) - 1
        if index < 0 or time > self.all[index].end:
            return None
        return self.all[index]


def read_trace(path: Path) -> list[Event]:
    """A trace's events that have a duration."""
    trace = json.loads(path.read_text("utf-8"))
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


def gpu_work(events: list[Event]) -> list[Event]:
    """Kernels and copies.

    Raises:
        ValueError: there is none.
    """
    work = [event for event in events if event.get("cat") in GPU_WORK]
    if not work:
        raise ValueError("trace: it holds no kernel; expected a GPU whose tracing is permitted")
    return work


def own_times(events: list[Event]) -> Iterator[tuple[str, int, float]]:
    """(name, calls, µs) of each operator call, without the time of the operators that it calls.

    An operator that calls another of the same name counts as one call together with that one.
    """
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event["tid"]].append(event)
    for ops in threads.values():
        # A caller comes before what it calls, also where both start in the same instant.
        ops.sort(key=lambda op: (op["ts"], -op["dur"]))
        own = [op["dur"] for op in ops]
        calls = [1] * len(ops)
        callers: list[int] = []
        for index, op in enumerate(ops):
            while callers and op["ts"] >= ops[callers[-1]]["ts"] + ops[callers[-1]]["dur"]:
                callers.pop()
            if callers:
                own[callers[-1]] -= op["dur"]
                calls[index] = int(op["name"] != ops[callers[-1]]["name"])
            callers.append(index)
        yield from zip((op["name"] for op in ops), calls, own, strict=True)


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
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    work = ((launched.get(w["args"].get("correlation")), w["dur"]) for w in gpu_work(events))
    return [(time, took) for time, took in work if time is not None]


@dataclass(frozen=True)
class KindOfStep:
    """All steps of one kind."""

    steps: int
    us: float  # the time of all these steps
    phases: list[Total]  # in their order, summed over the layers


def by_kind(events: list[Event], on_gpu: bool) -> dict[str, KindOfStep]:
    """Time of each phase, by the kind of step."""
    named = [
        Range(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
    ]
    steps = Ranges(r for r in named if STEP.fullmatch(r.name))
    phases = Ranges(r for r in named if not STEP.fullmatch(r.name))
    launched = launched_work(events) if on_gpu else None

    def work(ranges: Ranges) -> list[tuple[float, float]]:
        """(when it was launched, µs) for each kernel of a GPU; on a CPU for each range."""
        return [(r.start, r.end - r.start) for r in ranges.all] if launched is None else launched

    counts = Counter(kind_of(step) for step in steps.all)
    whole: dict[str, float] = defaultdict(float)
    for time, took in work(steps):
        if (step := steps.at(time)) is not None:
            whole[kind_of(step)] += took
    calls: dict[tuple[str, str], int] = Counter()
    us: dict[tuple[str, str], float] = defaultdict(float)
    for phase in phases.all:
        if (step := steps.at(phase.start)) is not None:
            calls[kind_of(step), label_of(phase)] += 1
    for time, took in work(phases):
        step, inside = steps.at(time), phases.at(time)
        if step is not None and inside is not None:
            us[kind_of(step), label_of(inside)] += took
    return {
        kind: KindOfStep(count, whole[kind], [
            Total(label, n, us[kind, label]) for (of, label), n in calls.items() if of == kind
        ])
        for kind, count in counts.items()
    }  # fmt: skip


def kind_of(step: Range) -> str:
    return step.name.removeprefix(PREFIX).split()[0]


def label_of(phase: Range) -> str:
    """The name of a phase without the layer's number."""
    return LAYER.sub("layer: ", phase.name.removeprefix(PREFIX))


def phase_table(events: list[Event], on_gpu: bool) -> Table:
    """The time of each phase in an average step of each kind, summed over the layers."""
    kinds = by_kind(events, on_gpu)
    columns, labels = ["phase", "ranges"], dict[str, int]()  # a phase's ranges in a step
    for kind, of_kind in kinds.items():
        columns += [f"{kind}\n(of {of_kind.steps})", "share"]
        for phase in of_kind.phases:
            labels.setdefault(phase.name, phase.calls // of_kind.steps)

    def line(label: str, ranges: str, time: Callable[[KindOfStep], float]) -> list[str]:
        cells = [label, ranges]
        for k in kinds.values():
            cells += [f"{time(k) / k.steps / 1e3:.3f}", f"{time(k) / k.us:.1%}" if k.us else ""]
        return cells

    def of(label: str) -> Callable[[KindOfStep], float]:
        return lambda k: sum(p.us for p in k.phases if p.name == label)

    lines = [line(label, str(ranges), of(label)) for label, ranges in labels.items()]
    lines.append(line(OUTSIDE, "", lambda k: k.us - sum(p.us for p in k.phases)))
    lines.append(line(WHOLE, "1", lambda k: k.us))
    return table_of(
        columns, lines, title="Phases, layers summed: ms in a step",
        caption="GPU time of what was launched in the phase" if on_gpu else "time on the host",
    )  # fmt: skip
