"""The lines of `dsb batch`: what one asks for, in our format or OpenAI's, and its answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dsb_runtime.config import settings
from dsb_runtime.doors.openai.answers import ANSWERS, Answer
from dsb_runtime.doors.openai.asked import (
    CHAT,
    TEXT,
    Asked,
    Reader,
    chat_ids,
    check_fields,
    length_of,
    prompt_ids,
    read_object,
    seed_of,
    stops_of,
)
from dsb_runtime.doors.openai.errors import BodyError, error_body, refusal
from dsb_runtime.engine.request import Request
from dsb_runtime.families import check_model

MOST_BYTES = 2**26  # of a line
WRONG_LINE = "invalid_request"  # the code of an error that has no other


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
        name, ids = "prompt", prompt_ids(reader.tokenizer, prompt, raw)
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


def id_of(record: dict[str, Any], name: str) -> str | int | None:
    """The id of a line, which is taken out of the record."""
    value = record.pop(name, None)
    if type(value) not in (str, int) and (value is not None or name == "custom_id"):
        raise refusal(name, value, "text or an int")
    return value


def take_in(line: Line, record: dict[str, Any]) -> None:
    """Set the fields of a line. Raise BodyError for what is none."""
    if "custom_id" not in record:
        line.id, line.body = id_of(record, "id"), record
        return
    body, url = record.get("body"), record.get("url")
    line.url = CHAT if url is None else url
    line.id = id_of(record, "custom_id")
    check_fields(record, {"method": ("POST",)}, ("url", "body"))
    if line.url not in (CHAT, TEXT):
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
    return response_of(line, 200, body.answer(answers, samples))


def response_of(line: Line, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """The answer of a line of OpenAI's format: what the server would have sent."""
    name = f"batch_req_{line.number}"
    response = {"status_code": status, "request_id": name, "body": body}
    return {
        "line": line.number, "id": name, "custom_id": line.id, "response": response, "error": None,
    }  # fmt: skip


def error_of(line: Line, error: Exception) -> dict[str, Any]:
    """The answer of a line that is wrong, or whose decoding failed. In OpenAI's format that is a
    response, and `error` is for a line that is no request."""
    message = " ".join(str(error).split()) or type(error).__name__
    param, code, status = None, None, 400
    if isinstance(error, BodyError):
        param, code, status = error.param, error.code, error.status
    if line.url is not None and line.wrong is None:
        return response_of(line, status, error_body(status, message, param, code))
    said = {"code": code or WRONG_LINE, "message": message, "param": param}
    if line.url is None:
        return {"line": line.number, "id": line.id, "error": said}
    return {
        "line": line.number, "id": f"batch_req_{line.number}", "custom_id": line.id,
        "response": None, "error": said,
    }  # fmt: skip


def is_error(answer: dict[str, Any]) -> bool:
    """Whether an answer, of either format, is an error."""
    response = answer.get("response") or {}
    return answer.get("error") is not None or response.get("status_code", 200) != 200
