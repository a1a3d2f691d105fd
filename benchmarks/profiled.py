"""Figures of a decoding that need torch's profiler: the time of each phase, and how long a GPU is
busy."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

import dsb_runtime as dsb
from benchmarks.step_cost import OUTSIDE
from dsb_kernels._launch import overlaps
from dsb_runtime.engine.engine import Engine
from dsb_runtime.measure.profile import profile_steps
from dsb_runtime.measure.profile_tables import Event, by_kind, gpu_work, read_trace
from dsb_runtime.measure.timing import timed

MOST_STEPS = 40  # no more steps are profiled at once, since traces are large


def profiled_count(kinds: list[str]) -> int:
    """How many steps after the first to profile: up to the next refresh where it is near, so that
    the trace shows both kinds."""
    last = kinds.index("refresh", 1) if "refresh" in kinds[1:] else len(kinds) - 1
    return max(1, min(max(last, 8), MOST_STEPS, len(kinds) - 1))


def phase_times(
    model: PreTrainedModel, prompts: Tensor, settings: dict[str, Any], kinds: list[str]
) -> dict[str, dict[str, float]]:
    """Microseconds of each phase (`step_cost.PHASES`, layers summed) in a step of each kind, and of
    what is launched outside the phases: on the GPU, or on the host of a CPU. They are measured in a
    decoding of its own that launches kernel by kernel, since a replayed graph has no phases, and
    one after another, since a kernel that is launched early would count its wait for the one before
    it; a CPU's times are longer than unprofiled ones. `kinds` are those of the decoding's steps."""
    config = dsb.DecodingConfig(**settings)
    first = min(1, len(kinds) - 1)  # a call's first step also allocates the call's tensors
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with one_after_another():
            profile_steps(
                model, prompts, config, first=first, count=profiled_count(kinds), trace_file=trace
            )
        steps = by_kind(read_trace(trace), model.device.type == "cuda")
    phase_us: dict[str, dict[str, float]] = {}
    for kind, of in steps.items():
        times = {phase.name.removeprefix("layer: "): phase.us / of.steps for phase in of.phases}
        phase_us[kind] = {**times, OUTSIDE: of.us / of.steps - sum(times.values())}
    return phase_us


@contextlib.contextmanager
def one_after_another() -> Iterator[None]:
    """Inside, no kernel is launched before the one before it has ended. What has been captured
    before is not changed."""
    with mock.patch.dict(os.environ, DSB_PDL="0"):
        overlaps.cache_clear()
        try:
            yield
        finally:
            overlaps.cache_clear()


def busy_seconds(events: list[Event]) -> float:
    """How long the GPU of a trace ran a kernel or a copy; those side by side count once. A kernel
    that is launched early and waits for the one before it counts as running, so that there is no
    gap between the two."""
    busy, until = 0.0, 0.0
    for start, us in sorted((event["ts"], event["dur"]) for event in gpu_work(events)):
        busy += max(0.0, start + us - max(start, until))
        until = max(until, start + us)
    return busy * 1e-6


def gpu_busy_seconds(run: Callable[[], object], device: torch.device) -> float | None:
    """How long the GPU runs a kernel or a copy during a call; None on a CPU. The profiler sees each
    kernel of a replayed graph. It makes the gaps between kernels longer, not the kernels: the idle
    time is what is left of the time of a call that is not profiled."""
    if device.type != "cuda":
        return None
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            timed(run, device)
        profiler.export_chrome_trace(str(trace))
        return busy_seconds(read_trace(trace))


def gap_share(engine: Engine, run: Callable[[], object], seconds: float) -> float | None:
    """The share of a call of `seconds` that its kernels do not take, which are timed one after
    another in calls of their own. Kernels that overlap hide their beginnings as well, so that it
    may be less than nothing. `engine` makes the call; it captures its steps anew. None on a CPU."""
    if engine.device.type != "cuda":
        return None
    with one_after_another():
        engine.release()
        run()  # captures
        busy = gpu_busy_seconds(run, engine.device)
    engine.release()
    return None if busy is None else 1 - busy / seconds
