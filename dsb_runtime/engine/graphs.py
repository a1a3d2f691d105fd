"""How a step is captured once and replayed, and how the host copies what it leaves.

A `Capture` takes a function without arguments, and returns another that repeats the launches of the
first on the same memory. `CudaGraphs` is the capture for GPUs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsb_runtime.engine.turns import Turns, surely

Capture = Callable[[Callable[[], None]], Callable[[], None]]

# The widths for which steps are captured. A window step takes the smallest that suffices.
WIDTHS = (16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024)


def width_class(width: int, most: int) -> int:
    """The width of a captured step for windows of `width` positions: one of WIDTHS, or `most`."""
    return min(next((w for w in WIDTHS if w >= width), most), most)


def refresh_class(width: int, most: int) -> int:
    """The width of a captured refresh that computes `width` positions of its widest row: a multiple
    of 16 below 512, of 32 below 1024 and of 64 above, or `most`. So at most a sixteenth of the
    positions from 256 on, and at most 63, are computed in vain."""
    step = min(64, max(16, 1 << max(width.bit_length() - 5, 0)))
    return min(-(-width // step) * step, most)


def length_class(length: int) -> int:
    """How many positions the canvas has over which steps are captured for `length` positions: a
    power of two from 64 on, or one and a quarter, one and a half or one and three quarters of it.
    Positions in vain cost memory alone, at most a quarter more."""
    step = max(16, 1 << max((length - 1).bit_length() - 3, 0))
    return max(64, -(-length // step) * step)


def row_class(rows: int, most: int) -> int:
    """The capacity of a captured step for `rows` rows: a power of two, or `most`."""
    return min(1 << (rows - 1).bit_length(), most)


# While one thread captures, no other may wait for the device or empty the allocator's cache, and a
# capture begins with both.
CAPTURING = Turns()


def capture_graph(
    run: Callable[[], object],
    graph: torch.cuda.CUDAGraph,
    stream: torch.cuda.Stream,
    **options: Any,
) -> None:
    """Capture what run() launches, on `stream`. The current stream is restored even if the capture
    fails to end, and an interrupt leaves no capture open."""
    before = torch.cuda.current_stream()

    def begin_and_end() -> None:
        with torch.cuda.graph(graph, stream=stream, **options):
            run()

    def end() -> None:
        try:
            torch.cuda.set_stream(stream)
            if torch.cuda.is_current_stream_capturing():
                graph.capture_end()
        finally:
            torch.cuda.set_stream(before)

    surely(begin_and_end, end)


class CudaGraphs:
    """Captures steps on the current device as CUDA graphs. The graphs share one pool of memory,
    since they run one at a time."""

    def __init__(self) -> None:
        # Each engine has its own stream on a device. Graphs that were captured on one stream share
        # the workspace of matmuls: two engines would write it at the same time, and torch 2.13
        # frees it when the first of those graphs is deleted (pytorch issue 193402).
        self.streams: dict[int, torch.cuda.Stream] = {}
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()  # those in `pool`

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        CAPTURING.run(lambda: self.capture(run, graph))
        return graph.replay

    def capture(self, run: Callable[[], None], graph: torch.cuda.CUDAGraph) -> None:
        """Capture what run() launches, while no other thread captures."""
        device = torch.cuda.current_device()
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        # Torch closes a pool when its last graph is deleted. If the pool is then used again while
        # something is left in it, torch fails an assertion; before torch 2.13, the workspace of
        # matmuls is left in it. So a new pool is taken.
        if not self.graphs:
            self.pool = torch.cuda.graph_pool_handle()
        # "thread_local" lets other threads allocate and launch during the capture.
        options: dict[str, Any] = {"pool": self.pool, "capture_error_mode": "thread_local"}
        capture_graph(run, graph, self.streams[device], **options)
        self.graphs.add(graph)


class HostCopy:
    """A copy of a small device tensor, which may still be on its way to the host."""

    def __init__(self, source: Tensor) -> None:
        self.arrived: torch.cuda.Event | None = None
        if source.is_cuda:
            self.values = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self.values.copy_(source, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(source.device))
        else:
            self.values = source.clone()

    def wait(self) -> Tensor:
        """Wait until the copy is complete, and return it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values
