"""The time of a call, and the machine's best speeds; all times of this project come from here.

How `time_call` times a call on a GPU, and why:

- The host cannot time a few microseconds. As many calls as take about a millisecond are captured in
  a CUDA graph, and events time its replay. Between two calls it has the gap that a decoding step
  has between two kernels. The GPU spins while the host submits the events and the graph. Otherwise
  the time would include some of that submission: 10 us of a graph that may take 100.
- Cold: no call finds its inputs in the L2. Calls take turns over input sets of their own, one for
  each call or as many as fill EVICT times the L2, and other data fills the L2 before the graph.
  That data is read, since written data would have to be stored while the calls are timed. EVICT is
  4 since the L2 may evict at random: of a set that is read again after twice the L2's size, a
  fifth would still be there, and after four times that size a fiftieth.
- Warm: all calls use one set, which stays in the L2 if it fits.
- What a call changes is restored before the graph, never inside it.
- Inputs must be random: a product or a copy of zeros is faster than one of data.
- The first calls compile and allocate; they are not timed.

On a CPU the wall clock times single calls, and cold and warm are the same.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dsb_runtime.engine.graphs import capture_graph

T = TypeVar("T")

SPAN = 1e-3  # seconds that a graph should take
CALLS = (10, 100)  # at least and at most in one graph
EVICT = 4  # times the L2
SPIN = 200_000  # cycles, about 0.1 ms
REPEATS = 15  # `time_call` reports the median of these
BEST_OF = 5  # a ceiling is the best of these
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # more than the caches hold
GPU_SIZES: tuple[int, ...] = (8192,)  # of the square matrices
CPU_SIZES: tuple[int, ...] = (256, 512, 1024, 2048)
ENOUGH = 0.05  # the clock times a product of so many seconds well


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Run a call. Returns its result, and the seconds until the device has finished its work."""
    synchronize(device)
    began = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - began


class Marks:
    """Moments on a device: events in the stream of a GPU, the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def spin(self) -> None:
        """Keep a GPU busy while the host submits what it shall time next."""
        if self.device.type == "cuda":
            torch.cuda._sleep(SPIN)

    def seconds(self, pairs: Sequence[tuple[Any, Any]]) -> list[float]:
        """Wait for the device, then return the seconds between the moments of each pair."""
        synchronize(self.device)
        if self.device.type != "cuda":
            return [end - start for start, end in pairs]
        return [1e-3 * start.elapsed_time(end) for start, end in pairs]


@dataclass(frozen=True)
class Call:
    """A function with inputs of its own. `restore` undoes what `run` changes in them."""

    run: Callable[[], object]
    restore: Callable[[], object] | None = None


Make = Callable[[], Call]  # makes a call with inputs of its own each time


def restore(calls: Sequence[Call]) -> None:
    for call in calls:
        if call.restore is not None:
            call.restore()


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call."""

    cold: float
    warm: float


@functools.cache
def l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


@functools.cache
def _other_data() -> torch.Tensor:
    return torch.rand(EVICT * l2_bytes() // 4, device="cuda")


def plan(one: float, touched: int, l2: int, *, restored: bool) -> tuple[int, int, int]:
    """The number of calls in the cold and the warm graph, and of input sets for the cold one, where
    a call takes about `one` seconds and reads and writes `touched` bytes. Calls that have to be
    `restored` change their inputs, so that each needs a set of its own."""
    least, most = CALLS
    calls = min(most, max(least, math.ceil(SPAN / one)))
    if restored:  # all warm sets together must fit
        return calls, max(1, min(calls, l2 // (2 * max(touched, 1)))), calls
    return calls, calls, min(calls, math.ceil(EVICT * l2 / max(touched, 1)))


def capture_calls(runs: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of these calls, which run before it to compile and allocate."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in (runs[0], runs[0], *runs):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    capture_graph(lambda: [run() for run in runs], graph, side)
    return graph


def event_seconds(run: Callable[[], object]) -> float:
    """GPU seconds of what `run` submits, while the GPU spins."""
    marks = Marks(torch.device("cuda"))
    marks.spin()
    start = marks.now()
    run()
    return marks.seconds([(start, marks.now())])[0]


def _graph_seconds(
    sets: Sequence[Call], calls: int, *, cold: bool = False, repeats: int = REPEATS
) -> float:
    """Median GPU seconds of one call, from replays of a graph of `calls` calls."""
    graph, times = capture_calls([sets[i % len(sets)].run for i in range(calls)]), []
    for _ in range(repeats):
        restore(sets)
        if cold:
            _other_data().sum()
        times.append(event_seconds(graph.replay) / calls)
    return statistics.median(times)


def time_call(make: Make, touched: int, device: torch.device) -> Timing:
    """Time a call that reads and writes `touched` bytes on `device`."""
    sets = [make()]
    restored = sets[0].restore is not None
    if device.type != "cuda":
        seconds = []
        for _ in range(REPEATS + 1):
            restore(sets)
            seconds.append(timed(sets[0].run, device)[1])
        median = statistics.median(seconds[1:])
        return Timing(median, median)
    one = _graph_seconds(sets, 1, repeats=3)
    cold_calls, warm_calls, count = plan(one, touched, l2_bytes(), restored=restored)
    sets += [make() for _ in range(count - 1)]
    cold = _graph_seconds(sets, cold_calls, cold=True)
    warm = _graph_seconds(sets[:warm_calls] if restored else sets[:1], warm_calls)
    return Timing(cold, warm)


def best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest time of a call, after one call that warms up."""
    marks, pairs = Marks(device), []
    for _ in range(BEST_OF + 1):  # without waiting between them, so that the clock rate stays up
        start = marks.now()
        run()
        pairs.append((start, marks.now()))
    return min(marks.seconds(pairs)[1:])


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a large copy on the device. A GPU's copy is not
    captured: in a graph CUDA copies in another way, at some sizes in twice the time (pytorch issue
    191284)."""
    size = COPY_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    # Random: memory that was never written is one page of zeros, which the cache holds.
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    if device.type != "cuda":
        return 2 * size / best_seconds(lambda: target.copy_(source), device)

    def copies() -> None:
        for _ in range(CALLS[0]):
            target.copy_(source)

    seconds = statistics.median(event_seconds(copies) for _ in range(REPEATS))
    return 2 * size * CALLS[0] / seconds


@functools.cache
def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square product. Some CPUs are hundreds of times slower in 16 bits, so that
    on a CPU the sizes end with the first that takes long enough."""
    seconds, size = math.inf, 0
    for size in GPU_SIZES if device.type == "cuda" else CPU_SIZES:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        seconds = best_seconds(functools.partial(torch.mm, a, b, out=out), device)
        if seconds > ENOUGH:
            break
    return 2 * size**3 / seconds
