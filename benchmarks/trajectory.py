"""A recording of a decoding, forward by forward, which another loop can follow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.step_cost import StepSize
from dsb_runtime import StepEvent
from dsb_runtime.measure.steps import StepRecorder
from dsb_runtime.measure.timing import synchronize


@dataclass(frozen=True)
class RowStep:
    """One forward of one batch row."""

    kind: str  # "refresh" or "window"
    start: int  # of the block [start, end)
    end: int
    prefix: int  # positions before the block that were recomputed with it
    commits: dict[int, int]  # position -> token
    canvas: Tensor  # (L,) after the commits

    @property
    def width(self) -> int:
        return self.end - self.start + self.prefix


class Trajectory(StepRecorder):
    """An `on_step` callback that keeps what every forward decided, by batch row."""

    def __init__(self, model: PreTrainedModel, prompt_length: int, gen_length: int) -> None:
        super().__init__(model, prompt_length, gen_length)
        self.length, self.gen_length = prompt_length + gen_length, gen_length
        self.itemsize = model.dtype.itemsize
        self.rows: dict[int, list[RowStep]] = {}

    def __call__(self, event: StepEvent) -> None:
        super().__call__(event)
        canvas = event.canvas.clone()
        for row, (start, end, prefix) in zip(event.rows, event.before, strict=True):
            position = event.position[row][event.commit[row]].long()
            commits = dict(zip(position.tolist(), canvas[row, position].tolist(), strict=True))
            step = RowStep(event.kind, start, end, prefix, commits, canvas[row])
            self.rows.setdefault(row, []).append(step)

    @property
    def sizes(self) -> list[StepSize]:
        """What the roofline needs to know of every forward."""
        shape = (self.length, self.gen_length, self.itemsize)
        return [StepSize(s.batch, s.num_tokens, s.scored, *shape) for s in self.steps]

    @property
    def commits(self) -> list[dict[int, int]]:
        """What each forward of each batch row committed, one row after another."""
        return [step.commits for row in sorted(self.rows) for step in self.rows[row]]

    @property
    def num_commits(self) -> int:
        return sum(len(step.commits) for steps in self.rows.values() for step in steps)

    @property
    def row_forwards(self) -> int:
        """Forwards that each batch row took part in, summed over the batch."""
        return sum(len(steps) for steps in self.rows.values())


@dataclass(frozen=True)
class Agreement:
    """How many decisions of a trajectory another loop makes as well."""

    decisions: int
    positions: int  # decisions for which the other loop commits the same position
    both: int  # decisions for which it commits the same token there


Commits = Sequence[dict[int, int]]  # of each forward: position -> token


def agreement(commits: Commits, others: Commits) -> Agreement:
    """Compare what forwards decided with what another loop decided in their place."""
    decisions = positions = both = 0
    for ours, theirs in zip(commits, others, strict=True):
        decisions += len(ours)
        positions += len(ours.keys() & theirs.keys())
        both += len(ours.items() & theirs.items())
    return Agreement(decisions, positions, both)


class EagerClock:
    """An `on_step` callback that times the forwards of the eager loop."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[tuple[str, float]] = []  # kind, seconds
        self.restart()

    def restart(self) -> None:
        """Start the clock for a new call."""
        synchronize(self.device)
        self.began = time.perf_counter()

    def __call__(self, kind: str) -> None:
        synchronize(self.device)
        self.steps.append((kind, time.perf_counter() - self.began))
        self.began = time.perf_counter()
