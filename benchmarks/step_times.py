"""How long each step of a decoding takes, and each phase in it."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import dsb_runtime as dsb
from benchmarks.step_cost import OUTSIDE, PHASES
from benchmarks.trajectory import StepTimes
from dsb_runtime.measure.profile import profile_steps
from dsb_runtime.measure.profile_tables import by_kind, read_trace

MOST_STEPS = 40  # profiled; traces are large


class TimedEngine(dsb.Engine):
    """An engine that times every step it launches: on a GPU by events, right before and after what
    the step launches, so that neither the host's work between steps nor what watches them is
    counted with a step; on a CPU by the clock."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, observer=self.timed, **settings)
        self.marks: list[tuple[str, Any, Any]] = []

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        began = self.mark()
        yield
        self.marks.append((kind, began, self.mark()))

    def take(self) -> StepTimes:
        """The steps since the last call of this, which must have run to their end."""
        marks, self.marks = self.marks, []
        if self.device.type != "cuda":
            seconds = [ended - began for _, began, ended in marks]
        else:
            torch.cuda.synchronize(self.device)
            seconds = [1e-3 * began.elapsed_time(ended) for _, began, ended in marks]
        return StepTimes([kind for kind, _, _ in marks], seconds)


def profiled_count(kinds: list[str]) -> int:
    """Steps to profile of a decoding, those after its first: up to the next refresh where it is
    near, so that both kinds are seen."""
    refreshes = [i for i, kind in enumerate(kinds) if i > 0 and kind == "refresh"]
    wanted = refreshes[0] if refreshes else len(kinds) - 1
    return max(1, min(max(wanted, 8), MOST_STEPS, len(kinds) - 1))


def phase_times(
    model: PreTrainedModel, prompts: Tensor, settings: dict[str, Any], kinds: list[str]
) -> dict[str, dict[str, float]]:
    """Microseconds of each phase (`step_cost.PHASES`, layers summed) of a step of each kind, and of
    what is launched outside of them: time on the GPU there, on the host on a CPU.

    In a decoding of its own, whose steps are launched kernel by kernel, since a replayed graph has
    no phases; a CPU's times are longer than unprofiled ones.

    Args:
        kinds: of the decoding's steps.
    """
    config = dsb.DecodingConfig(**settings)
    first = min(1, len(kinds) - 1)  # a call's first step makes the call's tensors
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile_steps(
            model, prompts, config, first=first, count=profiled_count(kinds), trace_file=trace
        )
        steps = by_kind(read_trace(trace), model.device.type == "cuda")
    found: dict[str, dict[str, float]] = {}
    for kind, of in steps.items():
        times = {phase.name.removeprefix("layer: "): phase.us / of.steps for phase in of.phases}
        unknown = sorted(set(times) - set(PHASES))
        if unknown:
            raise RuntimeError(f"phase {unknown[0]!r} of a step: the budget knows {PHASES}")
        found[kind] = {**times, OUTSIDE: of.us / of.steps - sum(times.values())}
    return found
