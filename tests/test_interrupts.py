"""An exception at any instruction, a fork at any time: the next call is right, and never waits."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from transformers import LlamaForCausalLM, PreTrainedModel

import dsb_runtime as dsb
from dsb_runtime.doors import patch
from dsb_runtime.engine import engine, graphs, loop, packing, turns
from dsb_runtime.families import FAMILIES, supported_config
from dsb_runtime.models.folder import read_config
from tests import golden, test_capture
from tests.recorded import Recorder
from tests.test_capture import GPU, gpu  # noqa: F401  # the fixture of a stand-in for torch.cuda
from tests.test_patch import identities

PROMPT = torch.tensor([[5, 6, 7]])
SHAPE = {"gen_length": 2, "block_length": 2, "steps": 1, "stop_at_eos": False}
FILES = [m.__file__ for m in (engine, graphs, loop, packing, patch, turns, test_capture)]
SAMPLES = 40  # before about so many instructions of a case the default tests raise


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest would take for the user's."""


def traced(
    run: Callable[[], object], each: Callable[[int, FrameType], None], files: Sequence[str]
) -> None:
    """run(), with a call of `each` before every instruction of the functions in `files`, which gets
    its number. After an exception from `each` no other instruction is seen."""
    numbers = itertools.count()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            each(next(numbers), frame)
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)


def instructions(run: Callable[[], object], files: Sequence[str]) -> list[int]:
    """The numbers of the instructions of run(), each where a function first executes it."""
    first_numbers: dict[object, int] = {}

    def note(number: int, frame: FrameType) -> None:
        caller = frame.f_back
        place = (frame.f_code, frame.f_lasti, caller and caller.f_code)
        first_numbers.setdefault(place, number)

    traced(run, note, files)
    return list(first_numbers.values())


def interrupt_everywhere(
    begin: Callable[[], Any], run: Callable[[Any], object], check: Callable[[Any], None],
    every: bool, files: Sequence[str] = FILES,
) -> None:  # fmt: skip
    """Raise Interrupt before each instruction of run(begin()), or before some of them, each time
    from a new beginning, and check what is left."""
    run(begin())  # which fills what is kept between calls
    numbers = instructions(functools.partial(run, begin()), files)
    assert len(numbers) > SAMPLES
    for instruction in numbers if every else numbers[:: len(numbers) // SAMPLES]:

        def interrupt(number: int, frame: FrameType, instruction: int = instruction) -> None:
            if number == instruction:
                sys.settrace(None)
                raise Interrupt

        subject = begin()
        with pytest.raises(Interrupt):
            traced(functools.partial(run, subject), interrupt, files)
        try:
            check(subject)
        except BaseException as error:
            raise AssertionError(f"after an interrupt before instruction {instruction}") from error


EVERY = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def other_thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def small_model(family: str = "llada") -> PreTrainedModel:
    model = copy.deepcopy(golden.model(family))
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    for p in model.parameters():  # not packed yet
        p.data = p.data.clone()
    return model


def modes() -> list[object]:
    """What a caller can set for the process or the thread."""
    return [
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
        len(_get_current_function_mode_stack()), torch.get_default_device(),
    ]  # fmt: skip


@contextlib.contextmanager
def unusual_modes() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.inference_mode():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("case", ["first", "captured"])
def test_a_call_that_is_interrupted(
    case: str, every: bool, other_thread: ThreadPoolExecutor
) -> None:
    """Modes and weights are as before it, and the next call returns the same, in any thread. The
    first call packs the weights, in modes that are all unusual."""
    fresh = small_model()
    expected = dsb.generate(copy.deepcopy(fresh), PROMPT, **SHAPE).sequences
    weights = {name: value.clone() for name, value in fresh.state_dict().items()}
    used = dsb.Engine(copy.deepcopy(fresh), capture=Recorder())

    def begin() -> dsb.Engine:
        if case == "captured":
            used.release()
            return used
        model = copy.deepcopy(fresh)
        model.train()
        model.model.layers[0].mlp.eval()
        return dsb.Engine(model)

    def run(subject: dsb.Engine) -> None:
        mode = unusual_modes() if case == "first" else torch.enable_grad()
        with mode:
            before = modes()
            training = [m.training for m in subject.model.modules()]
            try:
                subject.generate(PROMPT, **SHAPE)
            finally:
                assert modes() == before
                assert [m.training for m in subject.model.modules()] == training

    def check(subject: dsb.Engine) -> None:
        assert not subject.in_call()
        for name, value in subject.model.state_dict().items():
            assert torch.equal(value, weights[name])
        call = other_thread.submit(subject.generate, PROMPT, **SHAPE)
        assert torch.equal(call.result(timeout=20).sequences, expected)

    files = FILES if case == "first" else [loop.__file__]
    interrupt_everywhere(begin, run, check, every, files)


@pytest.mark.parametrize("every", EVERY)
def test_a_release_that_is_interrupted(every: bool, other_thread: ThreadPoolExecutor) -> None:
    used = dsb.Engine(small_model(), capture=Recorder())
    expected = used.generate(PROMPT, **SHAPE).sequences

    def begin() -> dsb.Engine:
        used.generate(PROMPT, **SHAPE)
        return used

    def check(subject: dsb.Engine) -> None:
        call = other_thread.submit(subject.generate, PROMPT, **SHAPE)
        assert torch.equal(call.result(timeout=20).sequences, expected)

    interrupt_everywhere(begin, dsb.Engine.release, check, every)


@pytest.mark.parametrize("every", EVERY)
def test_a_capture_that_is_interrupted(
    every: bool,
    gpu: None,  # noqa: F811
    other_thread: ThreadPoolExecutor,
) -> None:
    """No capture stays open, the stream is the caller's, and another thread may capture."""

    def begin() -> graphs.CudaGraphs:
        GPU.capturing, GPU.stream = set(), "default"
        return graphs.CudaGraphs()

    def check(subject: graphs.CudaGraphs) -> None:
        assert GPU.stream == "default" and not GPU.capturing
        other_thread.submit(subject, lambda: None).result(timeout=20)

    interrupt_everywhere(begin, lambda subject: subject(lambda: None), check, every)


@pytest.mark.parametrize("every", EVERY)
def test_patch_and_unpatch_that_are_interrupted(every: bool) -> None:
    """A patch that raised has left nothing. After `unpatch` all is as before, and a model can be
    patched again."""
    config = supported_config(read_config(golden.DATA / "llada"), FAMILIES["llada"])
    model = LlamaForCausalLM(config).eval()
    model.loss_type = "mine"
    plain = identities(model)
    expected = dsb.patch(model, mask_id=511).dsb_generate(PROMPT, **SHAPE).sequences

    def begin_patch() -> PreTrainedModel:
        return dsb.unpatch(model)

    def check_patch(subject: PreTrainedModel) -> None:
        assert identities(subject) == plain or "dsb_generate" in vars(subject)
        assert identities(dsb.unpatch(subject)) == plain

    def begin_unpatch() -> PreTrainedModel:
        return dsb.patch(model, mask_id=511)

    def check_unpatch(subject: PreTrainedModel) -> None:
        patched = dsb.patch(subject, mask_id=511)
        assert torch.equal(patched.dsb_generate(PROMPT, **SHAPE).sequences, expected)
        assert identities(dsb.unpatch(subject)) == plain

    run = functools.partial(dsb.patch, mask_id=511)
    interrupt_everywhere(begin_patch, run, check_patch, every)
    interrupt_everywhere(begin_unpatch, dsb.unpatch, check_unpatch, every)


def test_a_copy_of_a_patched_model_can_be_unpatched() -> None:
    config = supported_config(read_config(golden.DATA / "llada"), FAMILIES["llada"])
    model = LlamaForCausalLM(config).eval()
    names, fields = set(vars(model)), config.to_dict()
    other = dsb.unpatch(copy.deepcopy(dsb.patch(model, mask_id=511)))
    assert set(vars(other)) == names and other.config.to_dict() == fields


# --- turns ------------------------------------------------------------------------------------


def test_threads_take_turns_in_order() -> None:
    queue, order, go = turns.Turns(), [], threading.Event()

    def work(i: int) -> None:
        if i == 0:
            assert go.wait(20)
        order.append(i)

    threads = [threading.Thread(target=queue.run, args=(lambda i=i: work(i),)) for i in range(4)]
    for i, thread in enumerate(threads):
        thread.start()
        while len(queue.queue) <= i:
            time.sleep(0.001)
    go.set()
    for thread in threads:
        thread.join(20)
    assert order == [0, 1, 2, 3] and not queue.queue


def test_a_turn_ends_with_its_function(
    other_thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if every attempt to leave the queue is interrupted, as by Ctrl-C pressed twice."""
    queue = turns.Turns()
    with monkeypatch.context() as patched, pytest.raises(Interrupt):
        patched.setattr(queue, "leave", mock.Mock(side_effect=Interrupt))
        queue.run(lambda: None)
    assert len(queue.queue) == 1 and not queue.mine()
    assert other_thread.submit(queue.run, lambda: 3).result(timeout=20) == 3
    assert not queue.queue


def test_the_last_of_two_decodings_gives_the_mode_back(other_thread: ThreadPoolExecutor) -> None:
    """Also to modules that two models share. Two engines of a model may decode at a time."""
    model, other, cpu = small_model().train(), small_model(), torch.device("cpu")
    model.model.layers[0].mlp.eval()
    other.model = model.model
    before = [m.training for m in model.modules()]
    inside, go = threading.Event(), threading.Event()

    def second() -> bool:
        inside.set()
        assert go.wait(20)
        return any(m.training for m in other.modules())

    with busy(lambda stay: turns.as_published(model, cpu, stay)):
        call = other_thread.submit(turns.as_published, other, cpu, second)
        assert inside.wait(20)
    go.set()
    assert not call.result(timeout=20) and [m.training for m in model.modules()] == before


def test_a_call_from_a_signal_handler_is_refused() -> None:
    """It would wait for the call that it interrupts."""
    queue = turns.Turns()
    with pytest.raises(RuntimeError, match="a call inside a call"):
        queue.run(lambda: queue.run(lambda: None))
    assert queue.run(lambda: 3) == 3


# --- fork -------------------------------------------------------------------------------------


def in_child(work: Callable[[], bool]) -> bool:
    """Fork; whether work() is true in the child, and comes to an end there."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


@contextlib.contextmanager
def busy(run: Callable[[Callable[..., None]], object]) -> Iterator[None]:
    """Another thread is inside run(f), in f()."""
    inside, go = threading.Event(), threading.Event()

    def stay(*_: object) -> None:
        inside.set()
        assert go.wait(60)

    thread = threading.Thread(target=run, args=(stay,))
    thread.start()
    try:
        assert inside.wait(20)
        yield
    finally:
        go.set()
        thread.join(20)


@pytest.mark.parametrize("where", ["decode", "make", "pack", "capture"])
def test_a_child_that_is_forked_while_a_thread_works(where: str) -> None:
    """The child's first thread and others that it starts decode, pack and may capture."""
    model = small_model().train()
    expected = dsb.generate(copy.deepcopy(model), PROMPT, **SHAPE).sequences
    locks = {
        "decode": lambda stay: dsb.generate(model, PROMPT, on_step=stay, **SHAPE),
        "make": engine.MAKING.run,
        "pack": packing.PACKING.run,
        "capture": graphs.CAPTURING.run,
    }[where]

    def call() -> bool:
        return torch.equal(dsb.generate(model, PROMPT, **SHAPE).sequences, expected)

    def child() -> bool:
        results = [call()]
        graphs.CAPTURING.run(lambda: results.append(True))
        threads = [threading.Thread(target=lambda: results.append(call())) for _ in range(2)]
        for thread in threads:
            thread.start()
            thread.join(20)
        return len(results) == 4 and all(results) and model.training

    with busy(locks):
        assert in_child(child)
    assert call()


@pytest.mark.parametrize("first", ["drain", "release", None])
def test_a_batch_engine_whose_lock_is_held_at_the_fork(first: str | None) -> None:
    """Two threads of the child use it at the same time."""
    engine = dsb.BatchEngine(small_model())
    expected, new = engine.submit(PROMPT[0], **SHAPE).result(20).sequences, engine.new_batcher

    def hold(stay: Callable[..., None]) -> None:
        with engine.changed:
            stay()

    def call(_: int) -> bool:
        if first is not None:
            getattr(engine, first)()
        return torch.equal(engine.submit(PROMPT[0], **SHAPE).result(20).sequences, expected)

    def child() -> bool:
        engine.new_batcher = lambda: time.sleep(0.1) or new()
        with ThreadPoolExecutor(2) as pool:
            return all(pool.map(call, range(2)))

    engine.drain()
    with busy(hold):
        assert in_child(child)


def test_a_child_that_is_forked_in_on_step() -> None:
    """Its own call goes on there: a call of the same engine is refused, one of the model is not."""
    model = small_model()
    own = dsb.Engine(model)
    expected = own.generate(PROMPT, **SHAPE).sequences
    results: list[bool] = []

    def child() -> bool:
        with pytest.raises(RuntimeError, match="on_step"):
            own.generate(PROMPT, **SHAPE)
        return torch.equal(dsb.generate(model, PROMPT, **SHAPE).sequences, expected)

    own.generate(PROMPT, on_step=lambda event: results.append(in_child(child)), **SHAPE)
    assert results == [True]


def test_a_child_of_a_process_with_several_threads_of_torch(caplog: Any) -> None:
    """OpenMP's threads stay behind, and the child would wait for them."""
    model, rows = small_model(), torch.randint(2, 500, (4, 100))
    expected = dsb.generate(model, rows, **SHAPE).sequences

    def child() -> bool:
        out = dsb.generate(model, rows, **SHAPE).sequences
        return torch.equal(out, expected) and "torch.set_num_threads(1)" in caplog.text

    torch.set_num_threads(2)
    try:
        torch.randn(4000, 4000).exp_()  # by both threads
        assert in_child(child)
    finally:
        torch.set_num_threads(1)


def test_a_child_whose_model_is_on_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PROCESS", -1)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with golden.refusal("CUDA in forked subprocess", "'spawn'", kind=RuntimeError):
        turns.check_process(torch.device("cuda:0"))
