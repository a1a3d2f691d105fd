"""Many prompts: rows that finish make room for the next prompt, while the others go on.

`generate_batch` drives a `Batcher` in the thread that iterates over it. `BatchEngine` has a thread
that does, for requests of any thread.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_runtime.config import DecodingConfig
from dsb_runtime.engine.batcher import Batcher
from dsb_runtime.engine.check import config_of
from dsb_runtime.engine.graphs import Capture
from dsb_runtime.engine.output import GenerationOutput
from dsb_runtime.engine.request import OnStep, OnTokens, Request, check_request
from dsb_runtime.engine.turns import Turns, check_process

STARTING = Turns()  # two threads of a forked process may use an engine first


def generate_batch(
    model: PreTrainedModel,
    prompts: Iterable[Tensor | Sequence[int]],
    config: DecodingConfig | None = None,
    *,
    max_rows: int | None = None,
    generator: torch.Generator | None = None,
    record: bool = False,
    **settings: Any,
) -> Iterator[tuple[int, GenerationOutput]]:
    """Decode `gen_length` positions after each of many prompts, side by side: a row that is done
    makes room for the next prompt. Every prompt gets the tokens, in as many forwards, that
    `generate` gives it alone.

    Args:
        model: as for `generate`; its weights must not be shared with other processes.
        prompts: (P,) integer tensors or lists of token ids. They are read as rows get free, a few
            ahead, so they may be more than memory has room for.
        config: the settings of all prompts. Instead of a config, settings may be named as keyword
            arguments; then `defaults_for` supplies the others.
        max_rows: how many prompts are decoded at a time. None means 64, or as many as half of the
            free memory has room for.
        generator: the source of randomness at temperature > 0. The prompts draw their seeds in
            their order, so a loop over `generate` with this generator gives the same tokens.
        record: whether the outputs have `step_map` and `logprobs`.

    Yields:
        (index, `GenerationOutput`) of each prompt as it is done. The output is that of a batch of
        one row.

    Raises:
        TypeError, ValueError: the model or a setting is not accepted, which is checked at once.
        RuntimeError: a prompt has failed (it is not accepted, its logits are NaN, or it is too long
            for the memory). It is raised once all others have been yielded, from the error of the
            first that failed.
        Exception: what `prompts` raises, once all prompts that it gave before have been yielded.
            `__context__` has the RuntimeError if some of these have failed.
    """
    batcher = Batcher(model, max_rows)
    config = config_of(batcher.model, config, settings)
    check_request(batcher.model, config, generator, record)
    return _yield_outputs(batcher, iter(prompts), config, generator, record)


def _yield_outputs(
    batcher: Batcher,
    prompts: Iterator[Tensor | Sequence[int]],
    config: DecodingConfig,
    generator: torch.Generator | None,
    record: bool,
) -> Iterator[tuple[int, GenerationOutput]]:
    index_of: dict[Request, int] = {}
    failed: dict[int, BaseException] = {}
    source_errors: list[Exception] = []

    def read_prompts() -> Iterator[Tensor | Sequence[int]]:
        try:
            for ids in prompts:  # noqa: UP028 (it would close the caller's generator)
                yield ids
        except Exception as error:  # what was read before is decoded to its end
            source_errors.append(error)

    def requests() -> Iterator[Request]:
        for index, ids in enumerate(read_prompts()):
            try:
                request = Request(batcher.model, ids, config, generator, record)
            except (TypeError, ValueError) as error:
                failed[index] = error
            else:
                index_of[request] = index
                yield request

    for request in batcher.decode(requests()):
        index = index_of.pop(request)
        if isinstance(request.outcome, GenerationOutput):
            yield index, request.outcome
        elif request.outcome is not None:
            failed[index] = request.outcome
    try:
        if failed:
            first = min(failed)
            others = f" ({len(failed)} prompts failed)" if len(failed) > 1 else ""
            raise RuntimeError(f"prompt {first}: {failed[first]}{others}") from failed[first]
    finally:
        if source_errors:  # an error that is raised here has the one above as its context
            raise source_errors[0]


class _Worker:
    """The thread of a `BatchEngine`, which is there while something is decoded."""

    thread: threading.Thread | None = None
    stopping = False

    def end(self) -> None:
        """Let the thread end after its step, and wait for that."""
        self.stopping = True
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()


class BatchEngine:
    """Decodes requests side by side, from any thread, each as if it were alone.

    A thread decodes while there are requests, and ends when there are none. Interrupts that reach
    other threads (Ctrl-C in `result()`) leave it as it is.

    Args:
        model: from `load_model` or `patch`, or what torch.compile, DDP or PEFT made of it; its
            weights must not be shared with other processes.
        max_rows: how many requests are decoded at a time; the others wait. None means 64, or as
            many as half of the free memory has room for.
        graphs, capture: as for `Engine`.

    Raises:
        TypeError, ValueError: `model` or `max_rows` is not accepted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_rows: int | None = None,
        *,
        graphs: bool | None = None,
        capture: Capture | None = None,
    ) -> None:
        def new_batcher() -> Batcher:
            return Batcher(model, max_rows, graphs=graphs, capture=capture)

        self.new_batcher = new_batcher
        self.start_anew()

    def start_anew(self) -> None:
        """Begin with nothing: no request, no thread, no memory."""
        self.batcher = self.new_batcher()
        self.arrived: deque[Request] = deque()
        self.changed, self.worker = threading.Condition(), _Worker()
        weakref.finalize(self, _Worker.end, self.worker)  # also when the interpreter exits
        self.process = os.getpid()  # from now on other threads of it use all this

    def start_if_forked(self) -> None:
        """Begin with nothing if this process was forked: the thread and the locks stayed behind."""

        def start() -> None:
            if self.process != os.getpid():
                self.start_anew()

        if self.process != os.getpid():
            STARTING.run(start)

    @property
    def model(self) -> PreTrainedModel:
        """The model that decodes: what was given, without torch.compile's or DDP's object."""
        return self.batcher.model

    @property
    def running(self) -> int:
        """How many requests have a row now."""
        return self.batcher.running

    @property
    def max_rows(self) -> int:
        """How many requests are decoded at a time."""
        return self.batcher.max_rows

    def submit(
        self,
        ids: Tensor | Sequence[int],
        config: DecodingConfig | None = None,
        *,
        generator: torch.Generator | None = None,
        record: bool = False,
        on_tokens: OnTokens | None = None,
        on_step: OnStep | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> Request:
        """Let a prompt be decoded as soon as there is a row for it.

        Args:
            ids: (P,) integers, a tensor on any device or a list.
            config, settings: as for `generate`. Every request has its own.
            generator: what the request's seed is drawn from, in this call. The same seed gives the
                same tokens as `generate` does for the prompt alone.
            record: whether the output has `step_map` and `logprobs`.
            on_tokens: a function that is called in the decoding thread with the ids that have been
                finished since the last call: those before the first mask, up to the first EOS
                inclusive. What it raises fails this request.
            on_step: a function that is called in the decoding thread with a `RowEvent` after each
                forward that has committed tokens of the request. What it raises fails the request.
            stop_strings, tokenizer: as for `generate`. What the tokenizer raises fails the request.

        Returns:
            A `Request`, whose `result()` is the `GenerationOutput` of a batch of one row.

        Raises:
            TypeError, ValueError: an argument is not accepted; the message is one line.
        """
        check_process(self.batcher.device)
        self.start_if_forked()
        request = Request(
            self.model, ids, config, generator, record, on_tokens, on_step, stop_strings, tokenizer,
            **settings,
        )  # fmt: skip
        with self.changed:
            self.arrived.append(request)
            if self.worker.thread is None:
                thread = threading.Thread(target=self.work, name="dsb batch", daemon=True)
                self.worker.thread = thread
                thread.start()
        return request

    def drain(self) -> None:
        """Wait until no request is waiting or decoded. Then weights may be replaced, and the model
        has the mode that the caller gave it.

        Raises:
            RuntimeError: a function that the decoding thread calls (`on_tokens`, `on_step`, or a
                callback of a `Request` that is done) calls it, and would wait for itself.
        """
        self.check_caller("drain")
        self.start_if_forked()
        with self.changed:
            self.changed.wait_for(lambda: self.worker.thread is None)

    def release(self) -> None:
        """`drain`, and give back the memory and every captured step.

        Raises:
            RuntimeError: as in `drain`.
        """
        self.check_caller("release")
        self.drain()
        with self.changed:
            if self.worker.thread is None:
                self.batcher.release()

    def check_caller(self, name: str) -> None:
        """Raise RuntimeError if the decoding thread itself calls the method of this name."""
        if self.worker.thread is threading.current_thread():
            raise RuntimeError(
                f"BatchEngine.{name}: called in the decoding thread, by a request's on_tokens, "
                "on_step or done callback, and would wait for itself; expected another thread"
            )

    # --- the decoding thread ------------------------------------------------------------------

    def work(self) -> None:
        """Decode until nothing is left to do."""
        batcher, worker = self.batcher, self.worker

        def take_in() -> None:
            while self.arrived:
                batcher.waiting.append(self.arrived.popleft())

        def pause(done: list[Request]) -> bool:
            while done:
                done.pop().settle()
            take_in()
            return worker.stopping

        while True:
            take_in()
            try:
                # What is done last is told when the model has the caller's mode again.
                done = batcher.run(pause)
            except BaseException as error:  # a fault of this package, of which nobody else hears
                done = batcher.abandon(error)
            for request in done:
                request.settle()
            with self.changed:
                if worker.stopping or not self.arrived:
                    worker.thread = None
                    self.changed.notify_all()
                    return
