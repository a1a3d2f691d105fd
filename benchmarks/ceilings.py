"""What the machine can do, measured in the same run: a large copy, a large matrix product; how
long a GPU is busy, how much memory was taken."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import copy_bandwidth
from dsb_runtime.measure.limits import timed
from dsb_runtime.measure.profile_tables import Event, gpu_work, read_trace

CPU_COPY = 1 << 28  # bytes, past the caches
GPU_SIZE = 8192  # of the square matrices
CPU_SIZES = (256, 512, 1024, 2048)
ENOUGH = 0.05  # seconds of one product that are enough to be timed
REPEATS = 5


def best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, after one that warms up: a ceiling is the best that the machine does. By events
    on a GPU: a product there takes a millisecond, of which the host's clock and the launch would
    be some percent."""
    if device.type != "cuda":
        return min([timed(run, device)[1] for _ in range(REPEATS + 1)][1:])
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * REPEATS + 2)]
    for i, mark in enumerate(marks):  # pairs, without waiting: the clock rate stays up
        mark.record()
        if i % 2 == 0:
            run()
    torch.cuda.synchronize(device)
    pairs = zip(marks[2::2], marks[3::2], strict=True)
    return min(start.elapsed_time(end) for start, end in pairs) * 1e-3


def copy_gb_per_s(device: torch.device) -> float:
    """GB/s, read plus written, of a large copy."""
    if device.type == "cuda":
        return copy_bandwidth() * 1e-9
    # Random: memory that was never written is one page of zeros, read from the cache.
    source = torch.empty(CPU_COPY, dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    return 2e-9 * CPU_COPY / best_seconds(lambda: target.copy_(source), device)


def matmul_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of a large square product. Some CPUs are hundreds of times slower in 16 bits, so
    that "large" there is what takes long enough."""
    for size in (GPU_SIZE,) if device.type == "cuda" else CPU_SIZES:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        seconds = best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
        if seconds > ENOUGH:
            break
    return 2e-12 * size**3 / seconds


def busy_seconds(events: list[Event]) -> float:
    """Of a trace: how long the GPU ran a kernel or a copy, those side by side once."""
    busy, until = 0.0, 0.0
    for start, us in sorted((event["ts"], event["dur"]) for event in gpu_work(events)):
        busy += max(0.0, start + us - max(start, until))
        until = max(until, start + us)
    return busy * 1e-6


def gpu_busy_seconds(run: Callable[[], object], device: torch.device) -> float | None:
    """How long the GPU runs a kernel or a copy during a call; None on a CPU.

    By torch's profiler, which sees each kernel of a replayed graph and makes the gaps between them
    longer, not the kernels: idle is what is left of the time of a call that is not profiled.
    """
    if device.type != "cuda":
        return None
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            timed(run, device)
        profiler.export_chrome_trace(str(trace))
        return busy_seconds(read_trace(trace))


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU since the reset; on a CPU, of the process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
