"""The clock: with a stand-in for CUDA, what a graph holds, what is done around its replay, and what
is divided by what; ceilings and linear layers on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import op_case, profiled
from benchmarks.profiled import busy_seconds, gpu_busy_seconds
from dsb_kernels._launch import overlaps
from dsb_runtime.measure import timing
from dsb_runtime.measure.steps import TimedEngine
from dsb_runtime.measure.timing import Call, Timing, plan

CPU, GPU = torch.device("cpu"), torch.device("cuda")

L2 = 50 << 20


@pytest.mark.parametrize(
    ("one", "touched", "restored", "expected"),
    [
        (4e-6, 3 << 20, False, (100, 100, 67)),  # 67 sets of 3 MiB are four times the L2
        (4e-6, 1000, False, (100, 100, 100)),  # one for each call, in an emptied L2
        (80e-6, 64 << 20, False, (13, 13, 4)),
        (300e-6, 1 << 30, False, (10, 10, 1)),  # streams past the L2 by itself
        (4e-6, 10_000, True, (100, 100, 100)),
        (4e-6, 1 << 20, True, (100, 25, 100)),  # all warm sets are in the L2 together
        (4e-6, 1 << 30, True, (100, 1, 100)),
        (1.0, 0, False, (10, 10, 10)),
    ],
)
def test_plan(one, touched, restored, expected):
    cold, warm, sets = plan(one, touched, L2, restored=restored)
    assert (cold, warm, sets) == expected
    assert sets == cold or sets * touched >= timing.EVICT * L2


class Cuda:
    """Stands for CUDA: notes what is asked of it. A captured call takes `seconds`."""

    def __init__(self, patch: pytest.MonkeyPatch, seconds: float) -> None:
        self.seconds, self.calls, self.clock = seconds, list[str](), 0.0
        self.captured = 0  # calls since the last capture began
        self.stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "is_available": lambda: True,
            "Event": self.event,
            "CUDAGraph": SimpleNamespace,
            "graph": self.capture,
            "Stream": lambda: self.stream,
            "current_stream": lambda: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "stream": lambda _: contextlib.nullcontext(),
            "is_current_stream_capturing": lambda: False,
            "synchronize": lambda *_: None,
            "mem_get_info": lambda device: (80 << 30, 80 << 30),
            "_sleep": lambda cycles: self.calls.append("spin"),
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(timing, "l2_bytes", lambda: L2)
        other = SimpleNamespace(sum=lambda: self.calls.append("evict"))
        patch.setattr(timing, "_other_data", lambda: other)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        def record() -> None:
            event.at = self.clock
            self.calls.append("record")

        event = SimpleNamespace(record=record, synchronize=lambda: None)
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event

    def run(self) -> None:
        self.captured += 1

    @contextlib.contextmanager
    def capture(self, graph: SimpleNamespace, stream: SimpleNamespace) -> Iterator[None]:
        self.captured = 0
        yield
        count = self.captured

        def replay() -> None:
            self.clock += self.seconds * count
            self.calls.append(f"replay {count}")

        graph.replay = replay


@pytest.mark.parametrize("restored", [False, True])
def test_what_a_gpu_is_asked(monkeypatch, restored):
    cuda, sets = Cuda(monkeypatch, 20e-6), []

    def make() -> Call:
        sets.append(len(sets))
        return Call(cuda.run, (lambda: cuda.calls.append("restore")) if restored else None)

    result = timing.time_call(make, 25 << 20, GPU)
    assert result == Timing(pytest.approx(20e-6), pytest.approx(20e-6))
    assert len(sets) == (50 if restored else 8)  # a millisecond's calls; four times the L2
    around = ["spin", "record", "replay 50", "record"]
    cold = [*["restore"] * len(sets) * restored, "evict", *around]
    warm = around if not restored else ["restore", "spin", "record", "replay 1", "record"]
    repeats = timing.REPEATS
    first = len(cuda.calls) - repeats * (len(cold) + len(warm))
    assert cuda.calls[first:] == cold * repeats + warm * repeats
    assert "evict" not in cuda.calls[:first]


def test_calls_take_turns_over_the_sets(monkeypatch):
    Cuda(monkeypatch, 1e-6)
    order: list[int] = []
    timing._graph_seconds([Call(lambda i=i: order.append(i)) for i in range(3)], 7)
    assert order[-7:] == [0, 1, 2, 0, 1, 2, 0]
    assert order[:-7] == [0, 0, 0, 1, 2, 0, 1, 2, 0], "compiled before the capture"


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    cuda = Cuda(monkeypatch, 1e-6)
    before = cuda.stream

    @contextlib.contextmanager
    def graph(_: Any, stream: Any) -> Any:
        cuda.stream = SimpleNamespace(wait_stream=lambda other: None)
        yield
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(RuntimeError, match="previous error"):
        timing._graph_seconds([Call(lambda: None)], 3)
    assert cuda.stream is before


def test_a_cpu_is_timed_by_its_clock(monkeypatch):
    log: list[str] = []
    call = Call(lambda: log.append("run"), lambda: log.append("restore"))
    result = timing.time_call(lambda: call, 100, CPU)
    assert result.cold == result.warm > 0
    assert log == ["restore", "run"] * (timing.REPEATS + 1)


def test_ceilings_on_a_gpu(monkeypatch):
    """1 GiB is read and written outside of a graph, which may take twice as long. The best time of
    a product is taken by events, the first left out."""
    cuda, runs = Cuda(monkeypatch, 1e-3), []

    def copy(source: Any) -> None:
        cuda.clock += 0.5e-3

    def run() -> None:
        runs.append(None)
        cuda.clock += 5.0 if len(runs) == 1 else 2.0 - 0.1 * len(runs)

    memory = SimpleNamespace(random_=lambda: memory, copy_=copy)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: memory)
    monkeypatch.setattr(torch, "empty_like", lambda other: memory)
    bandwidth = timing.copy_bandwidth.__wrapped__(GPU)
    assert bandwidth == pytest.approx(2 * (1 << 30) / 0.5e-3)
    assert cuda.calls == ["spin", "record", "record"] * timing.REPEATS
    best = timing.best_seconds(run, GPU)
    assert len(runs) == timing.BEST_OF + 1 and best == pytest.approx(2.0 - 0.1 * len(runs))


def test_a_step_is_timed_without_the_host(monkeypatch):
    """The GPU spins while the host submits a step, where a step is all that is timed."""
    cuda = Cuda(monkeypatch, 0.0)
    engine = SimpleNamespace(marks=timing.Marks(GPU), launches=[], spins=False)

    def launch() -> None:
        with TimedEngine.time_launch(engine, "window"):
            cuda.calls.append("launch")

    launch()
    with TimedEngine.without_host_time(engine):
        launch()
    launch()
    plain = ["record", "launch", "record"]
    assert cuda.calls == [*plain, "spin", *plain, *plain]


def test_what_a_benchmark_reports(monkeypatch):
    cuda = Cuda(monkeypatch, 100e-6)
    monkeypatch.setattr(op_case, "copy_bandwidth", lambda device: 4e12)
    case = SimpleNamespace(bytes=3 * 10**8, flops=5 * 10**10, call=lambda _: Call(cuda.run))
    assert op_case.time_contender(lambda: case, "op") == {
        "cold_us": 100.0, "warm_us": 100.0, "bandwidth_share": 0.75, "tflops": 500.0,
    }  # fmt: skip


def test_ceilings_count_what_they_move(monkeypatch):
    monkeypatch.setattr(timing, "best_seconds", lambda run, device: run() is None or 2.0)
    assert timing.copy_bandwidth.__wrapped__(CPU) == 2**28  # read and written in two seconds
    monkeypatch.setattr(timing, "CPU_SIZES", (64,))
    assert timing.matmul_speed.__wrapped__(torch.float32, CPU) == 64**3
    assert gpu_busy_seconds(lambda: None, CPU) is None


def test_gaps_are_what_kernels_one_after_another_do_not_take(monkeypatch):
    """Steps are captured anew for that, and once more after it."""
    device, calls = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("DSB_PDL", raising=False)
    monkeypatch.setattr(profiled, "gpu_busy_seconds", lambda run, device: run() or 0.95)
    engine = SimpleNamespace(device=device, release=lambda: calls.append("release"))
    overlaps.cache_clear()
    before = overlaps(device)
    share = profiled.gap_share(engine, lambda: calls.append(overlaps(device)), 1.0)
    assert share == pytest.approx(0.05)
    assert calls == ["release", False, False, "release"]
    assert before and overlaps(device)
    overlaps.cache_clear()
    engine.device = CPU
    assert profiled.gap_share(engine, lambda: None, 1.0) is None


def test_busy_is_each_moment_once():
    """Kernels side by side, one inside of another, and gaps; other events do not count."""
    spans = [(0, 10), (5, 10), (6, 2), (20, 5), (30, 1)]
    events = [{"cat": "kernel", "ts": ts, "dur": dur} for ts, dur in spans]
    events.append({"cat": "gpu_memcpy", "ts": 40, "dur": 4})
    events.append({"cat": "gpu_user_annotation", "ts": 0, "dur": 100})
    assert busy_seconds(events) == pytest.approx((15 + 5 + 1 + 4) * 1e-6)
    with pytest.raises(ValueError, match="holds no kernel"):
        busy_seconds(events[-1:])
