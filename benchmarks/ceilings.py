"""What the machine can do, measured in the same run: a large copy, a large matrix product; how
long a GPU idles, how much memory was taken."""

from __future__ import annotations

import resource
from collections.abc import Callable

import torch

from benchmarks.measure import copy_bandwidth
from dsb_runtime.step_limit import timed

CPU_COPY = 1 << 28  # bytes, past the caches
GPU_SIZE = 8192  # of the square matrices
CPU_SIZES = (256, 512, 1024, 2048)
ENOUGH = 0.05  # seconds of one product that are enough to be timed
REPEATS = 5


def best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, after one that warms up: a ceiling is the best that the machine does."""
    return min([timed(run, device)[1] for _ in range(REPEATS + 1)][1:])


def copy_gb_per_s(device: torch.device) -> float:
    """GB/s, read plus written, of a large copy."""
    if device.type == "cuda":
        return copy_bandwidth() * 1e-9
    source = torch.zeros(CPU_COPY, dtype=torch.uint8)
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


def gpu_idle_share(run: Callable[[], object], device: torch.device) -> float | None:
    """1 - time in kernels / wall time of a call, by torch's profiler; None on a CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        _, wall = timed(run, device)
    cuda = torch.autograd.DeviceType.CUDA
    busy = sum(
        e.time_range.elapsed_us()
        for e in profiler.events()
        if e.device_type == cuda and not e.is_user_annotation  # a named range holds the gaps too
    )
    if busy == 0:
        raise RuntimeError("the profiler recorded no kernel: expected access to the GPU's counters")
    return 1 - busy * 1e-6 / wall


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU since the reset; on a CPU, of the process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
