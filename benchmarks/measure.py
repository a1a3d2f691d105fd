"""Timing shared by the kernel benchmarks: GPU time with a cold and a warm L2, copy bandwidth.

A kernel of a few microseconds cannot be timed from the host. On a GPU the call is captured in a
CUDA graph and timed with events; pytest-benchmark's own clock then times the graph's replay, and
the GPU times go into its `extra_info`. On a CPU there is only pytest-benchmark's clock.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch

CALLS = 20  # calls in one graph
REPEATS = 15  # the median over these is reported


def on_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


@functools.cache
def _flush_buffer() -> torch.Tensor:
    """Twice the L2: writing it evicts everything else."""
    size = torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(2 * size, dtype=torch.uint8, device="cuda")


def _capture(fn: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and allocate outside the capture
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            fn()
    return graph


def _graph_seconds(fn: Callable[[], object]) -> float:
    """Median GPU seconds of one call, from replays of a graph of CALLS calls."""
    graph, times = _capture(fn, CALLS), []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / CALLS)
    return statistics.median(times)


def gpu_seconds(fn: Callable[[], object], *, cold: bool) -> float:
    """GPU seconds of one call of `fn`; `cold` evicts the L2 before each call (the eviction's own
    time is subtracted)."""
    if not cold:
        return _graph_seconds(fn)
    buffer = _flush_buffer()
    both = _graph_seconds(lambda: (buffer.zero_(), fn()))
    return both - _graph_seconds(buffer.zero_)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a device copy of 1 GiB: the yardstick of a run."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _graph_seconds(lambda: target.copy_(source))


def run(
    benchmark: Callable, fn: Callable[[], object], *, bytes_needed: int = 0, flops: int = 0
) -> None:
    """Time `fn` under pytest-benchmark. On a GPU `extra_info` gets microseconds with cold and
    warm L2, the share of the copy bandwidth that `bytes_needed` in the cold time amounts to, and
    TFLOP/s for `flops`."""
    if not on_gpu():
        benchmark(fn)
        return
    info = benchmark.extra_info
    info["device"] = torch.cuda.get_device_name()
    cold, warm = gpu_seconds(fn, cold=True), gpu_seconds(fn, cold=False)
    info["cold_us"], info["warm_us"] = round(cold * 1e6, 2), round(warm * 1e6, 2)
    if bytes_needed:
        info["bandwidth_share"] = round(bytes_needed / cold / copy_bandwidth(), 3)
    if flops:
        info["tflops"] = round(flops / cold * 1e-12, 1)
    graph = _capture(fn, 1)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay, rounds=REPEATS, warmup_rounds=2)
