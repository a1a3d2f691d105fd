"""Timing shared by the kernel benchmarks: a call's time with a cold and a warm L2, copy bandwidth.

How a call is timed on a GPU, and why so:

- A few microseconds cannot be timed from the host. As many calls as take about a millisecond are
  captured in a CUDA graph, whose replay is timed with events: between two calls it has the gap that
  a decoding step has between two kernels. The GPU spins while the host submits events and graph, or
  some of that submission would be timed as well: 10 us, of a graph that may take 100.
- Cold: no call finds its inputs in the L2. Calls take turns over input sets of their own, one for
  each or as many as hold EVICT times the L2, and the L2 is filled with something else before the
  graph. (Evicting between calls and subtracting what that takes would find 4 us as the difference
  of two times of 60.) It is filled by reading: what was written there would have to be stored while
  the calls are timed. EVICT is 4, since the L2 may evict at random: of a set that is read again
  after twice its size, a fifth would still be there, after four times a fiftieth.
- Warm: all calls take one set, which stays in the L2 if it fits.
- What a call changes is restored before the graph, never inside of it.
- Inputs are random: a product of zeros, or a copy of them, is faster than one of data.
- The first calls compile and allocate; they are not timed.

On a CPU the wall clock times single calls, cold and warm alike.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dsb_runtime.engine.graphs import capturing
from dsb_runtime.measure.limits import timed

SPAN = 1e-3  # seconds that a graph should take
CALLS = (10, 100)  # at least and at most in one graph
EVICT = 4  # times the L2
SPIN = 200_000  # cycles, about 0.1 ms
REPEATS = 15  # the median over these is reported
COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Call:
    """A function with inputs of its own. `restore` undoes what `run` changes in them."""

    run: Callable[[], object]
    restore: Callable[[], object] | None = None


Make = Callable[[], Call]  # each time with inputs of its own


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, medians."""

    cold: float
    warm: float


def on_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


def low_precision() -> torch.dtype:
    """What is timed: 16 bits on a GPU; a CPU would emulate them."""
    return torch.bfloat16 if on_gpu() else torch.float32


def compiled(fn: Callable[..., object]) -> Callable[..., object]:
    """`fn` under torch.compile for one shape. Without the reset, what was compiled for others
    counts against the compiler's limit, past which it runs `fn` as it is, saying nothing."""
    torch._dynamo.reset()
    return torch.compile(fn, dynamic=False)


@functools.cache
def l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


@functools.cache
def _other_data() -> torch.Tensor:
    return torch.rand(EVICT * l2_bytes() // 4, device="cuda")


def plan(one: float, touched: int, l2: int, *, restored: bool) -> tuple[int, int, int]:
    """Calls of a graph, cold and warm, and the input sets that cold ones take turns over.

    Args:
        one: seconds of a call, roughly.
        touched: bytes that a call reads and writes.
        restored: whether a call changes its inputs, so that each needs a set of its own.
    """
    least, most = CALLS
    calls = min(most, max(least, math.ceil(SPAN / one)))
    if restored:  # all warm sets together must fit
        return calls, max(1, min(calls, l2 // (2 * max(touched, 1)))), calls
    return calls, calls, min(calls, math.ceil(EVICT * l2 / max(touched, 1)))


def _capture(runs: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and allocate outside of the capture
        for run in (runs[0], runs[0], *runs):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        for run in runs:
            run()
    return graph


def _graph_seconds(
    sets: Sequence[Call], calls: int, *, cold: bool = False, repeats: int = REPEATS
) -> float:
    """Median GPU seconds of one call, from replays of a graph of them."""
    graph, times = _capture([sets[i % len(sets)].run for i in range(calls)]), []
    for _ in range(repeats):
        for call in sets:
            if call.restore is not None:
                call.restore()
        if cold:
            _other_data().sum()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SPIN)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / calls)
    return statistics.median(times)


def timing(make: Make, touched: int) -> Timing:
    """Time a call that reads and writes `touched` bytes."""
    sets = [make()]
    if not on_gpu():
        seconds = []
        for _ in range(REPEATS + 1):
            if sets[0].restore is not None:
                sets[0].restore()
            seconds.append(timed(sets[0].run, device())[1])
        median = statistics.median(seconds[1:])
        return Timing(median, median)
    restored = sets[0].restore is not None
    one = _graph_seconds(sets, 1, repeats=3)
    cold_calls, warm_calls, count = plan(one, touched, l2_bytes(), restored=restored)
    sets += [make() for _ in range(count - 1)]
    cold = _graph_seconds(sets, cold_calls, cold=True)
    warm = _graph_seconds(sets[:warm_calls] if restored else sets[:1], warm_calls)
    return Timing(cold, warm)


def _stream_seconds(run: Callable[[], object], calls: int) -> float:
    """Median GPU seconds of one call of so many launched one by one, which must be long ones."""
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SPIN)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / calls)
    return statistics.median(times)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a device copy of 1 GiB: the yardstick of a run. Not
    in a graph, where CUDA copies in another way, at some sizes in twice the time (pytorch issue
    191284)."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _stream_seconds(lambda: target.copy_(source), CALLS[0])


def run(benchmark: Callable, make: Make, *, bytes_needed: int, flops: int = 0) -> None:
    """Time a call under pytest-benchmark. On a GPU its own clock times the replay of a graph of one
    call, and `extra_info` gets microseconds with cold and warm L2, the share of the copy bandwidth
    that `bytes_needed` in the cold time amounts to, and TFLOP/s for `flops`."""
    call = make()
    setup = call.restore
    if not on_gpu():
        if setup is None:
            benchmark(call.run)
        else:
            benchmark.pedantic(call.run, setup=setup, rounds=100, warmup_rounds=2)
        return
    info, found = benchmark.extra_info, timing(make, bytes_needed)
    info["device"] = torch.cuda.get_device_name()
    info["cold_us"], info["warm_us"] = round(found.cold * 1e6, 2), round(found.warm * 1e6, 2)
    info["bandwidth_share"] = round(bytes_needed / found.cold / copy_bandwidth(), 3)
    if flops:
        info["tflops"] = round(flops / found.cold * 1e-12, 1)
    graph = _capture([call.run])

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay, setup=setup, rounds=REPEATS, warmup_rounds=2)
