"""The rows of one HTTP request: what the decoding thread finishes comes to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dsb_runtime.doors.openai.answers import INTERNAL, Answer, AnswerEvent, failure_of
from dsb_runtime.doors.openai.asked import Asked, setting_error
from dsb_runtime.doors.openai.text import GrowingText
from dsb_runtime.doors.server.errors import FAULT, ApiError, full
from dsb_runtime.doors.server.metrics import Metrics
from dsb_runtime.engine.batch import BatchEngine
from dsb_runtime.engine.request import Request, RowEvent
from dsb_runtime.families import check_model

logger = logging.getLogger(__name__)


class Service:
    """A `BatchEngine` that takes up to `max_queue` rows more than it decodes."""

    def __init__(
        self, engine: BatchEngine, tokenizer: PreTrainedTokenizerBase, max_queue: int
    ) -> None:
        self.engine, self.tokenizer, self.max_queue = engine, tokenizer, max_queue
        self.model = engine.model
        self.eos_ids = check_model(self.model).eos_ids
        self.unfinished: set[Request] = set()
        self.metrics = Metrics(self.rows_in_use, self.waiting)

    def rows_in_use(self) -> int:
        return self.engine.running

    def waiting(self) -> int:
        return max(0, len(self.unfinished) - self.rows_in_use())

    def check_room(self, prompts: int, samples: int) -> None:
        """Raise ApiError, 429 if there is no room for so many rows now, 400 if there never is."""
        rows, most = prompts * samples, self.engine.max_rows + self.max_queue
        if rows > most:
            said = (
                f"{rows} answers (prompts times n={samples}): expected at most {most}, as many as "
            )
            said += f"the server decodes ({self.engine.max_rows}) and lets wait ({self.max_queue})"
            raise ApiError(400, said, param="n" if samples > 1 else "prompt")
        if len(self.unfinished) + rows > most:
            raise full(self.waiting())


class Decoding:
    """The rows of one request, which enter the engine at once. Every other method is for the thread
    of the event loop.

    Raises:
        ApiError: the queue is full, or the engine does not accept the request.
    """

    def __init__(self, service: Service, asked: Asked) -> None:
        self.service, self.asked, self.began = service, asked, time.perf_counter()
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[Answer, Any]] = asyncio.Queue()
        self.answers: list[Answer] = []
        service.check_room(len(asked.prompts), asked.samples)
        generator = None
        if asked.config.draws:
            seed = secrets.randbits(63) if asked.seed is None else asked.seed
            generator = torch.Generator(service.model.device).manual_seed(seed)
        try:
            for prompt in asked.prompts:
                for _ in range(asked.samples):
                    self.submit(prompt, generator)
        except (TypeError, ValueError) as error:
            self.cancel()
            raise setting_error(error, vars(asked.config)) from error
        service.metrics.prompt_tokens.inc(sum(map(len, asked.prompts)))

    def submit(self, prompt: list[int], generator: torch.Generator | None) -> None:
        service, asked = self.service, self.asked
        text = GrowingText(service.tokenizer, service.eos_ids, asked.stops)
        answer = Answer(len(self.answers), prompt, text)
        tell = functools.partial(self.tell, answer)
        answer.request = request = service.engine.submit(
            prompt, asked.config, generator=generator, record=asked.logprobs,
            on_tokens=tell if asked.stream else None, on_step=tell if asked.canvas else None,
            # Without an EOS no row ends before its response is full, and the text alone is cut.
            stop_strings=asked.stops if service.eos_ids else None, tokenizer=service.tokenizer,
        )  # fmt: skip
        self.answers.append(answer)
        service.unfinished.add(request)
        request.add_done_callback(service.unfinished.discard)
        request.add_done_callback(tell)

    def tell(self, answer: Answer, what: list[int] | RowEvent | Request) -> None:
        """Pass on what a row has done. This is called in the decoding thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed: the server has ended
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (answer, what))

    async def events(self) -> AsyncIterator[AnswerEvent]:
        """What the rows do, until all have ended.

        Raises:
            ApiError: a row has failed. The others are cancelled.
        """
        first = True
        while not all(answer.ended for answer in self.answers):
            answer, what = await self.queue.get()
            if isinstance(what, RowEvent):
                yield AnswerEvent(answer, canvas=what)
            elif isinstance(what, Request):
                yield AnswerEvent(answer, self.end(answer, what))
            else:
                if first:
                    self.service.metrics.first_token.observe(time.perf_counter() - self.began)
                    first = False
                yield AnswerEvent(answer, answer.text.grow(what))

    def end(self, answer: Answer, request: Request) -> str:
        """Take the outcome of a row. Returns the rest of its text."""
        try:
            output = request.result()
        except Exception as error:
            self.cancel()
            raise failed(error) from error
        text = answer.end(output)
        answer.ended, metrics = True, self.service.metrics
        metrics.forwards.inc(answer.forwards)
        metrics.tokens.inc(len(answer.text.ids))
        metrics.last_token.observe(time.perf_counter() - self.began)
        return text

    def cancel(self) -> None:
        """Free the rows of all answers that have not ended."""
        for answer in self.answers:
            request = answer.request
            if request is not None and request.cancel() and not answer.ended:
                answer.ended = True
                self.service.metrics.forwards.inc(len(request.commits))


def failed(error: Exception) -> ApiError:
    """What a client is told of a row that has failed."""
    (status, code), said = failure_of(error), str(error)
    if code == "cancelled":
        said = "the server has given this request up; try again"
    elif code == INTERNAL:
        logger.error("a request has failed", exc_info=error)
        said = FAULT
    return ApiError(status, said, code=code)
