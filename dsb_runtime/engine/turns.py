"""Whose turn it is, and what is given back, if an exception may come at any instruction.

Ctrl-C, or a signal handler that raises, can end a function between any two of its instructions,
those of a `finally` too. So no flag of ours says whether a call still runs: the interpreter does.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)
R = TypeVar("R")
PROCESS = os.getpid()  # the process that has imported this file, of which others may be forks
PATIENCE = 0.1  # seconds after which a waiting call looks whether the one before it was interrupted


def surely(work: Callable[[], R], undo: Callable[[], object]) -> R:
    """Return work(), and call undo() after it. If an exception keeps undo() from its end, it is
    called once more, so it must be harmless to repeat."""
    undone = False
    try:
        try:
            return work()
        finally:
            undo()
            undone = True
    finally:
        if not undone:
            undo()


class Turn:
    """A place in the queue of the function that `frame` belongs to."""

    def __init__(self, frame: FrameType) -> None:
        self.frame: FrameType | None = frame
        self.thread, self.process = threading.current_thread(), os.getpid()
        self.running = threading.Lock()  # until the turn ends, so that others can wait for that
        self.running.acquire()

    def is_mine(self) -> bool:
        """Whether this thread took it."""
        return self.thread is threading.current_thread()

    def is_over(self) -> bool:
        """Whether the function has returned or raised. In a forked process, the functions of the
        threads that stayed behind are over too."""
        frame = self.frame
        if frame is None or (self.process != os.getpid() and not self.is_mine()):
            return True
        try:
            frame.clear()  # this is refused while the function runs
        except RuntimeError:
            return False
        return True

    def end(self) -> None:
        self.frame = None  # which alone decides that the turn is over
        self.wake()

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the lock is free already
            self.running.release()

    def wait(self) -> None:
        """Wait until the turn is over."""
        while not self.is_over():
            if self.running.acquire(timeout=PATIENCE):
                self.wake()


class Turns:
    """A lock that functions hold while they run: one at a time, in the order in which they came.

    A turn cannot outlive its function, whatever ended that, nor a fork its thread.
    """

    def __init__(self) -> None:
        self.queue: list[Turn] = []

    def mine(self) -> bool:
        """Whether this thread is inside `run`."""
        return any(turn.is_mine() and not turn.is_over() for turn in tuple(self.queue))

    def run(self, work: Callable[[], R]) -> R:
        """Wait until every function that came before has ended, and return work().

        Raises:
            RuntimeError: this thread is inside `run`, and would wait for itself.
        """
        if self.mine():
            raise RuntimeError("a call inside a call of the same thread, which would never end")
        turn = Turn(sys._getframe())

        def in_turn() -> R:
            self.queue.append(turn)
            for earlier in tuple(self.queue):
                if earlier is turn:
                    break
                earlier.wait()
                self.leave(earlier)
            return work()

        return surely(in_turn, lambda: self.leave(turn))

    def leave(self, turn: Turn) -> None:
        with contextlib.suppress(ValueError):  # the turn has been taken out already
            self.queue.remove(turn)
        turn.end()


def check_process(device: torch.device) -> None:
    """Make torch usable on the device if this process was forked.

    Raises:
        RuntimeError: it was forked from one that has used the GPU.
    """
    if os.getpid() == PROCESS:
        return
    if device.type == "cuda":
        torch.cuda.init()  # which raises the error
    else:
        take_one_thread(os.getpid())


@functools.cache  # so that the caller can set more threads after the first call
def take_one_thread(process: int) -> None:
    """Let a forked process compute in the calling thread alone. OpenMP would wait for ever for the
    threads that stayed behind."""
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        logger.warning("in a forked process: torch.set_num_threads(1)")


MODES = Turns()  # one decoding at a time changes the mode of modules
DECODINGS: list[Decoding] = []  # those for which modules are in eval mode


class Decoding(Turn):
    """A decoding, with which others of the model may run, of other engines. Meanwhile the model's
    modules are in eval mode. The last decoding that needs that gives them the caller's mode."""

    def __init__(self, frame: FrameType) -> None:
        super().__init__(frame)
        self.training: dict[int, nn.Module] = {}  # by id, the modules that the caller is training

    def begin(self, model: PreTrainedModel) -> None:
        """Put the model into eval mode."""
        in_eval = {key for decoding in DECODINGS for key in decoding.training}
        self.training = {id(m): m for m in model.modules() if m.training or id(m) in in_eval}
        DECODINGS.append(self)
        for module in self.training.values():
            module.training = False

    def finish(self) -> None:
        """Give back the mode of every module that no decoding needs any more."""
        others = [each for each in DECODINGS if each is not self and not each.is_over()]
        in_eval = {key for decoding in others for key in decoding.training}
        for decoding in (self, *DECODINGS):
            for key, module in decoding.training.items():
                if key not in in_eval:
                    module.training = True
        DECODINGS[:] = others


def as_published(model: PreTrainedModel, device: torch.device, work: Callable[[], R]) -> R:
    """Return work(). The model computes inside what it was trained to, whatever the caller has set:
    it is in eval mode, its GPU is the current device, and autocast, gradients, inference mode and
    the default device are off or torch's own. All of these but the mode of its modules belong to
    the thread. The default dtype, which belongs to the process, stays the caller's."""
    decoding = Decoding(sys._getframe())
    default = torch.get_default_device()
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = torch.is_autocast_enabled(device.type)
    # Buffers that are made in inference mode could not be written outside it.
    plain_mode, cpu = torch.inference_mode(False), torch.device("cpu")
    on_gpu: Any = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    def change() -> R:
        MODES.run(lambda: decoding.begin(model))
        # This context looks at every call of torch: on a CPU it costs a step a tenth of its time.
        if default.type != "cpu":
            cpu.__enter__()
        if inference:
            plain_mode.__enter__()
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled(device.type, False)
        on_gpu.__enter__()
        return work()

    def give_back() -> None:
        MODES.run(decoding.finish)
        decoding.end()
        if torch.get_default_device() != default:
            cpu.__exit__(None, None, None)
        if torch.is_inference_mode_enabled() != inference:
            plain_mode.__exit__(None, None, None)
        torch.set_grad_enabled(gradients)
        torch.set_autocast_enabled(device.type, autocast)
        on_gpu.__exit__(None, None, None)

    return surely(change, give_back)
