"""Two ways to drive a step: call it, or capture it once and replay what it launched.

A capture is a function that takes a function without arguments and returns another that repeats
its launches on the same memory. `CudaGraphs` is the one for GPUs.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Capture = Callable[[Callable[[], None]], Callable[[], None]]

# Capacities that a captured step is made for; windows take the smallest that suffices.
WIDTHS = (16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024)


def width_class(width: int, most: int) -> int:
    """The capacity of a captured step for windows of `width` positions, at most `most`."""
    return min(next((w for w in WIDTHS if w >= width), most), most)


def row_class(rows: int, most: int) -> int:
    """The capacity of a captured step for so many rows: a power of two, at most `most`."""
    return min(1 << (rows - 1).bit_length(), most)


# A thread takes this lock to wait for the device or to empty the allocator's cache, which none may
# do while another one captures. Beginning a capture does both.
CAPTURING = threading.RLock()


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """`torch.cuda.graph`, with the current stream put back even where a capture cannot be ended."""
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, **options):
            yield
    finally:
        torch.cuda.set_stream(before)


class CudaGraphs:
    """Captures on the current device into CUDA graphs that share one pool of memory (they run one
    at a time)."""

    def __init__(self) -> None:
        # Each engine has its own stream on a device. Graphs that were captured on one stream share
        # a matmul's workspace: engines would write it at the same time, and torch 2.13 gives it
        # back with the first of those graphs that ends (pytorch issue 193402).
        self.streams: dict[int, torch.cuda.Stream] = {}
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()  # in `pool`

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with CAPTURING:
            device = torch.cuda.current_device()
            if device not in self.streams:
                self.streams[device] = torch.cuda.Stream(device)
            # Torch ends a pool with its last graph, and fails an assertion where that pool is begun
            # again while anything is left in it, as that workspace is before torch 2.13.
            if not self.graphs:
                self.pool = torch.cuda.graph_pool_handle()
            # Other threads go on allocating and launching.
            options = {"stream": self.streams[device], "capture_error_mode": "thread_local"}
            with capturing(graph, pool=self.pool, **options):
                run()
            self.graphs.add(graph)
        return graph.replay


class HostCopy:
    """A copy of a small device tensor on its way to the host."""

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
        """The copy, once it is complete."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values
