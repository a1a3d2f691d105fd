"""What clients are sent: OpenAI's answers and chunks, whole and streamed.

Beside OpenAI's fields `usage` has `forwards`, and with `include_canvas` a chunk's choice has
`canvas`: the answer's text token by token after a forward, null where a mask stands.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dsb_runtime.doors.openai.asked import CHAT, TEXT
from dsb_runtime.doors.openai.text import GrowingText
from dsb_runtime.engine.cache import is_out_of_memory
from dsb_runtime.engine.output import GenerationOutput
from dsb_runtime.engine.request import Request, RowEvent

END = b"data: [DONE]\n\n"
INTERNAL = "internal_error"  # the code of a fault of this package or of the machine


@dataclass
class Answer:
    """One row of a request, and what is known of it so far."""

    index: int
    prompt: list[int]
    text: GrowingText
    request: Request | None = None
    ended: bool = False
    forwards: int = 0
    logprobs: list[float] | None = None  # of each token, once the row has ended

    @property
    def finish_reason(self) -> str:
        """ "stop" after an EOS or a stop string, "length" where the response is full."""
        ids = self.text.ids
        ends = self.text.stopped or (bool(ids) and ids[-1] in self.text.eos_ids)
        return "stop" if ends else "length"

    def end(self, output: GenerationOutput) -> str:
        """Take the output of the row. Returns the rest of its text."""
        prompt, tokens = len(self.prompt), output.row_tokens[0]
        ids = output.sequences[0, prompt : prompt + tokens].tolist()
        text = self.text.grow(ids[len(self.text.ids) :]) + self.text.finish()
        if output.logprobs is not None:
            self.logprobs = output.logprobs[0, : len(self.text.ids)].tolist()
        self.forwards = output.nfe
        return text


@dataclass
class AnswerEvent:
    """New text of an answer, or its canvas; `answer.ended` says whether it is the last of it."""

    answer: Answer
    text: str = ""
    canvas: RowEvent | None = None


def failure_of(error: BaseException) -> tuple[int, str]:
    """The status of HTTP and the code of an error that a row has failed of while it was decoded.
    The code is INTERNAL where it is a fault of this package or of the machine."""
    if isinstance(error, CancelledError):
        return 503, "cancelled"
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return 400, "context_length_exceeded"
    if isinstance(error, FloatingPointError):
        return 500, "not_a_number"
    return 500, INTERNAL


def server_sent(chunk: dict[str, Any]) -> bytes:
    """Write a chunk as one server-sent event."""
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def usage(answers: Sequence[Answer], samples: int) -> dict[str, int]:
    """The tokens of prompts and answers. A prompt counts once for all its samples."""
    prompt = sum(len(answer.prompt) for answer in answers[::samples])
    tokens = sum(len(answer.text.ids) for answer in answers)
    return {
        "prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens,
        "forwards": sum(answer.forwards for answer in answers),
    }  # fmt: skip


class Completions:
    """Answers of /v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, model_name: str, tokenizer: PreTrainedTokenizerBase, mask_id: int) -> None:
        self.tokenizer = tokenizer
        self.words: dict[int, str | None] = {mask_id: None}  # the texts of the canvas's tokens
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model_name,
        }

    # --- what the two kinds of answers differ in ----------------------------------------------

    def body(self, text: str) -> dict[str, Any]:
        """A choice's text, whole."""
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        """A choice's text, some of it."""
        return {"text": text}

    def opening(self) -> dict[str, Any] | None:
        """What the first chunk of a choice has, if that is no text."""
        return None

    def logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if answer.logprobs is None:
            return None
        pieces = answer.text.pieces()
        return {
            "tokens": [piece for piece, _ in pieces],
            "token_logprobs": answer.logprobs[: len(pieces)],
            "text_offset": [offset for _, offset in pieces],
            "top_logprobs": None,
        }

    # --- answers ------------------------------------------------------------------------------

    def answer(self, answers: Sequence[Answer], samples: int) -> dict[str, Any]:
        """Make the body of a whole answer from those of all rows."""
        choices = [
            self.choice(a, self.body(a.text.text), self.logprobs(a), a.finish_reason)
            for a in answers
        ]
        return {
            **self.head, "object": self.whole, "choices": choices,
            "usage": usage(answers, samples),
        }  # fmt: skip

    def choice(
        self, answer: Answer, text: dict[str, Any], logprobs: dict[str, Any] | None,
        finish_reason: str | None,
    ) -> dict[str, Any]:  # fmt: skip
        return {"index": answer.index, **text, "logprobs": logprobs, "finish_reason": finish_reason}

    def chunk(self, *choices: dict[str, Any], **more: Any) -> bytes:
        return server_sent({**self.head, "object": self.part, "choices": list(choices), **more})

    def first(self, answer: Answer) -> bytes:
        """The chunk that opens a choice, which is empty where there is none."""
        opening = self.opening()
        return b"" if opening is None else self.chunk(self.choice(answer, opening, None, None))

    def event(self, event: AnswerEvent) -> bytes:
        """The chunk of an event, which is empty where it has nothing to show."""
        answer = event.answer
        if event.canvas is not None:
            choice = self.choice(answer, self.delta(""), None, None)
            return self.chunk({**choice, "canvas": self.canvas(event.canvas)})
        if answer.ended:
            choice = self.choice(
                answer, self.delta(event.text), self.logprobs(answer), answer.finish_reason
            )
            return self.chunk(choice)
        if not event.text:
            return b""
        return self.chunk(self.choice(answer, self.delta(event.text), None, None))

    def canvas(self, event: RowEvent) -> dict[str, Any]:
        for token in set(event.response) - set(self.words):
            self.words[token] = str(
                self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            )
        tokens = [self.words[token] for token in event.response]
        return {"forward": event.forward, "block": list(event.block), "tokens": tokens}

    def last(self, answers: Sequence[Answer], samples: int) -> bytes:
        """The chunk with the usage."""
        return self.chunk(usage=usage(answers, samples))


class ChatCompletions(Completions):
    """Answers of /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def body(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if answer.logprobs is None:
            return None
        pieces = zip(answer.text.pieces(), answer.logprobs, strict=False)
        content = [
            {"token": text, "logprob": logprob, "bytes": [*text.encode()], "top_logprobs": []}
            for (text, _), logprob in pieces
        ]
        return {"content": content, "refusal": None}


ANSWERS = {CHAT: ChatCompletions, TEXT: Completions}  # what answers a body of each URL
