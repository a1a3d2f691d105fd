"""Recording a decoding forward by forward, so that another loop can be driven along it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.floor import ForwardRows
from benchmarks.step_cost import StepShape
from dsb_runtime import StepEvent
from dsb_runtime.measure.limits import synchronize


@dataclass(frozen=True)
class RowStep:
    """One forward of one batch row."""

    kind: str  # "refresh" or "window"
    start: int  # the active block [start, end) and the rows before it that were recomputed
    end: int
    prefix: int
    commits: dict[int, int]  # position -> token
    canvas: Tensor  # (L,) after the commits

    @property
    def window(self) -> int:
        return self.end - self.start + self.prefix


@dataclass
class Recorder:
    """An `on_step` callback that keeps every forward; `prompt` columns stand before the response
    and `itemsize` bytes hold a weight."""

    prompt: int
    itemsize: int
    rows: dict[int, list[RowStep]] = field(default_factory=dict)  # by batch row
    kinds: list[str] = field(default_factory=list)
    shapes: list[StepShape] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)  # the widest of each forward

    def __call__(self, event: StepEvent) -> None:
        length = event.canvas.shape[1]
        canvas = event.canvas.clone()
        for row, (start, end, prefix) in zip(event.rows, event.before, strict=True):
            at = event.position[row][event.commit[row]].long()
            commits = dict(zip(at.tolist(), canvas[row, at].tolist(), strict=True))
            step = RowStep(event.kind, start, end, prefix, commits, canvas[row])
            self.rows.setdefault(row, []).append(step)
        full = event.kind == "refresh"
        widths = [length if full else e - s + p for s, e, p in event.before]
        scored = int((event.position[event.rows] >= 0).sum())
        self.kinds.append(event.kind)
        self.windows.append(max(widths))
        self.shapes.append(
            StepShape(len(widths), sum(widths), scored, length, length - self.prompt, self.itemsize)
        )

    @property
    def forwards(self) -> list[ForwardRows]:
        """What the linear layers alone would multiply."""
        return [ForwardRows(shape.rows, shape.scored) for shape in self.shapes]

    @property
    def tokens(self) -> int:
        return sum(len(step.commits) for steps in self.rows.values() for step in steps)

    @property
    def row_forwards(self) -> int:
        """Forwards that rows took part in, over all rows."""
        return sum(len(steps) for steps in self.rows.values())


@dataclass(frozen=True)
class Agreement:
    """Of the decisions on a trajectory, how many another loop takes as well."""

    decisions: int
    positions: int  # the same position committed
    both: int  # with the same token

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.decisions + other.decisions,
            self.positions + other.positions,
            self.both + other.both,
        )


def agreement(steps: Sequence[RowStep], commits: Sequence[dict[int, int]]) -> Agreement:
    """Compare what a row's forwards decided with what another loop decided in their place."""
    found = Agreement(0, 0, 0)
    for step, theirs in zip(steps, commits, strict=True):
        shared = step.commits.keys() & theirs.keys()
        both = sum(step.commits[position] == theirs[position] for position in shared)
        found += Agreement(len(step.commits), len(shared), both)
    return found


@dataclass
class StepTimes:
    """Kind and seconds of forwards, one after another."""

    kinds: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, other: StepTimes) -> None:
        self.kinds += other.kinds
        self.seconds += other.seconds


class StepClock(StepTimes):
    """Times the forwards of the eager loop: its `on_step`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.restart()

    def restart(self) -> None:
        """A call begins."""
        synchronize(self.device)
        self.began = time.perf_counter()

    def __call__(self, kind: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.kinds.append(kind)
        self.seconds.append(now - self.began)
        self.began = time.perf_counter()
