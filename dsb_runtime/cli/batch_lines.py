"""The lines of `dsb batch`: what one asks for, in our format or OpenAI's, and its answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dsb_runtime.cli.generate import check_text, encode
from dsb_runtime.config import settings
from dsb_runtime.doors.openai.answers import ANSWERS, Answer
from dsb_runtime.doors.openai.asked import (
    CHAT,
    TEXT,
    Asked,
    BodyError,
    Reader,
    chat_ids,
    check_fields,
    length_of,
    read_object,
    refusal,
    seed_of,
    stops_of,
)
from dsb_runtime.engine.request import Request
from dsb_runtime.families import check_model

MOST_BYTES = 2**26  # of a line
INVALID, SERVER = "invalid_request", "server_error"  # codes of errors


@dataclass
class Line:
    """One line of the input: its number, its id and what it asks for. `url` is that of OpenAI's
    format, None in ours. `wrong` says why it cannot be answered."""

    number: int
    id: Any = None
    url: str | None = None
    body: dict[str, Any] = field(default_factory=dict)
    wrong: BodyError | None = None

    def asked(self, reader: Reader, raw: bool) -> Asked:
        """What is to be decoded.

        Raises:
            TypeError, ValueError: the line cannot be answered; the message is one line.
        """
        if self.wrong is not None:
            raise self.wrong
        if self.url is not None:
            return reader.read(self.url, self.body)
        return own(self.body, reader, raw)


@dataclass
class Work:
    """The rows of a line, and how many of them are not done."""

    asked: Asked
    requests: list[Request]
    left: int


def own(body: dict[str, Any], reader: Reader, raw: bool) -> Asked:
    """What a line of our format asks for."""
    check_fields(body, {}, ("prompt", "messages", "seed", "stop", *settings()))
    prompt, messages = body.get("prompt"), body.get("messages")
    if (prompt is None) == (messages is None):
        raise BodyError("expected either prompt or messages")
    length = length_of(body)
    config = reader.config(body, length)
    if messages is not None:
        name, ids = "messages", chat_ids(reader.tokenizer, messages)
    elif isinstance(prompt, str) and prompt.strip():
        check_text("prompt", prompt)
        name, ids = "prompt", encode(reader.tokenizer, prompt, raw)[0].tolist()
    else:
        raise refusal("prompt", prompt, "some text")
    reader.check(name, [ids], config, length)
    return Asked([ids], config, seed_of(body), stops_of(body))


def read_line(number: int, text: bytes) -> Line:
    """What a line says. A line that is wrong says so in `Line.wrong`."""
    line = Line(number)
    try:
        if len(text) > MOST_BYTES:
            raise BodyError(f"the line: expected at most {MOST_BYTES} bytes")
        take_in(line, read_object("the line", text))
    except BodyError as error:
        line.wrong = error
    return line


def take_in(line: Line, record: dict[str, Any]) -> None:
    """Set the fields of a line. Raise BodyError for what is none."""
    openai = "custom_id" in record
    name = "custom_id" if openai else "id"
    line.id = given = record.pop(name, None)
    body: Any = record
    if openai:
        url, body = record.get("url"), record.get("body")
        line.url = CHAT if url is None else url
    fits = given is not None or not openai
    if not fits or isinstance(given, bool) or not isinstance(given, str | int | None):
        raise refusal(name, given, "text or an int")
    if line.url not in (None, CHAT, TEXT):
        raise refusal("url", line.url, f"{CHAT} or {TEXT}")
    if not isinstance(body, dict):
        raise refusal("body", body, "a JSON object")
    line.body = body


def answer_of(line: Line, answers: list[Answer], samples: int, reader: Reader) -> dict[str, Any]:
    """The answer of a line, in its format."""
    if line.url is None:
        (answer,) = answers
        return {
            "line": line.number, "id": line.id, "answer": answer.text.text.strip(),
            "tokens": len(answer.text.ids), "forwards": answer.forwards,
            "finish_reason": answer.finish_reason,
        }  # fmt: skip
    mask_id = check_model(reader.model).mask_id
    body = ANSWERS[line.url](reader.model_name, reader.tokenizer, mask_id)
    name = f"batch_req_{line.number}"
    response = {"status_code": 200, "request_id": name, "body": body.answer(answers, samples)}
    return {
        "line": line.number, "id": name, "custom_id": line.id, "response": response, "error": None,
    }  # fmt: skip


def error_of(line: Line, error: BaseException, code: str) -> dict[str, Any]:
    """The answer of a line that has none. The code is INVALID for what the line asks wrongly, where
    the error has none of its own, and SERVER for what failed here while it was decoded."""
    message, param = " ".join(str(error).split()) or type(error).__name__, None
    if isinstance(error, BodyError):
        code, param = error.code or code, error.param
    said = {"code": code, "message": message, "param": param}
    if line.url is None:
        return {"line": line.number, "id": line.id, "error": said}
    return {
        "line": line.number, "id": f"batch_req_{line.number}", "custom_id": line.id,
        "response": None, "error": said,
    }  # fmt: skip
