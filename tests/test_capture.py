"""CUDA graphs and host copies against a stand-in for `torch.cuda`, which notes what is asked."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from dsb_runtime.engine.engine import Engine
from dsb_runtime.engine.graphs import CudaGraphs, HostCopy


class Graph:
    """`torch.cuda.graph`: makes its stream the current one, and leaves it so if it cannot end."""

    inside = most = 0
    cannot_end = False

    def __init__(self, graph: Any, pool: Any, stream: str, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.graph, self.stream = graph, stream
        graph.pool = pool

    def __enter__(self) -> None:
        Graph.inside += 1
        Graph.most = max(Graph.most, Graph.inside)
        self.before, self.graph.stream = GPU.stream, self.stream
        GPU.stream = self.stream
        GPU.capturing.add(self.stream)

    def __exit__(self, *_: object) -> None:
        Graph.inside -= 1
        if Graph.cannot_end:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.graph.capture_end()
        GPU.stream = self.before


class Captured:
    """`torch.cuda.CUDAGraph`, which its replay keeps alive."""

    def replay(self) -> None: ...

    def capture_end(self) -> None:
        GPU.capturing.remove(self.stream)


GPU = SimpleNamespace()  # the current device and stream


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    GPU.device, GPU.stream, GPU.capturing = 0, "default", set()
    Graph.inside = Graph.most = 0
    Graph.cannot_end = False
    handles, streams = itertools.count(), itertools.count()
    for name, value in {
        "graph": Graph,
        "CUDAGraph": Captured,
        "Stream": lambda device: f"side stream {next(streams)} of {device}",
        "graph_pool_handle": lambda: next(handles),
        "current_device": lambda: GPU.device,
        "current_stream": lambda device=None: GPU.stream if device is None else f"of {device}",
        "is_current_stream_capturing": lambda: GPU.stream in GPU.capturing,
        "set_stream": lambda stream: setattr(GPU, "stream", stream),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_every_engine_has_a_pool_and_a_stream_on_each_device():
    first, second = CudaGraphs(), CudaGraphs()
    on_0 = first(lambda: None).__self__
    GPU.device = 1
    on_1 = [second(lambda: None).__self__ for _ in range(2)]
    assert (on_0.stream, on_1[0].stream) == ("side stream 0 of 0", "side stream 1 of 1")
    assert on_1[1].stream == on_1[0].stream and on_1[1].pool == on_1[0].pool != on_0.pool
    GPU.device = 0
    assert second(lambda: None).__self__.stream == "side stream 2 of 0"
    assert GPU.stream == "default"


def test_a_pool_is_not_begun_again_after_its_last_graph():
    """Torch 2.11 fails an assertion there: a matmul's workspace is left in it."""
    graphs = CudaGraphs()
    first, second = graphs(lambda: None), graphs(lambda: None)
    ended = first.__self__.pool
    assert second.__self__.pool == ended
    del first
    third = graphs(lambda: None)
    assert third.__self__.pool == ended
    del second, third
    assert graphs(lambda: None).__self__.pool != ended


def test_one_thread_captures_at_a_time():
    begun, go = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        assert go.wait(30)

    threads = [threading.Thread(target=CudaGraphs(), args=(run,)) for run in (slow, lambda: None)]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    threads[1].join(0.1)
    assert threads[1].is_alive() and Graph.inside == 1
    go.set()
    for thread in threads:
        thread.join(30)
    assert Graph.most == 1 and Graph.inside == 0


@pytest.mark.parametrize("cannot_end", [False, True])
def test_a_capture_that_fails_leaves_the_stream_and_the_next_capture_alone(cannot_end):
    graphs = CudaGraphs()
    Graph.cannot_end = cannot_end
    with pytest.raises(RuntimeError if cannot_end else KeyboardInterrupt):
        graphs(mock.Mock(side_effect=KeyboardInterrupt))
    assert GPU.stream == "default" and not GPU.capturing
    Graph.cannot_end = False
    graphs(lambda: None)


def test_a_host_copy_waits_for_the_stream_of_its_own_device(monkeypatch):
    """The current device may be another one."""
    event = mock.Mock()
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    empty, copy_ = torch.empty, torch.Tensor.copy_
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory, **options: empty(*a, **options))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, x, non_blocking: copy_(self, x.values))
    values = torch.arange(3)
    source = mock.Mock(is_cuda=True, device="cuda:1", shape=(3,), dtype=values.dtype, values=values)
    assert torch.equal(HostCopy(source).wait(), values)
    assert event.mock_calls == [mock.call.record("of cuda:1"), mock.call.synchronize()]


def test_a_call_on_another_stream_waits_for_the_last_call():
    engine = SimpleNamespace(device=torch.device("cuda:1"), stream=None)
    last, other = mock.Mock(), mock.Mock()
    for GPU.stream in (last, last, other):
        Engine.follow_last_call(engine)
        assert other.wait_stream.call_args_list == [mock.call(last)] * (GPU.stream is other)
    last.wait_stream.assert_not_called()
