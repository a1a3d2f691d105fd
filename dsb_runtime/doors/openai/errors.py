"""What is wrong with a body, and the answer that says so as OpenAI's API writes it."""

from __future__ import annotations

import json
from typing import Any

LONGEST, MOST_SHOWN = 1000, 120  # characters of a message, and of a value in it
KINDS = {429: "rate_limit_error"}  # the `type` of a status below 500, where it has one of its own
INVALID, SERVER = "invalid_request_error", "server_error"


def one_line(text: str) -> str:
    """A message as it is sent: one line of readable length, without halves of surrogate pairs."""
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def as_json(value: Any) -> str:
    """A value of a body as its writer knows it, cut to readable length."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return f"a {type(value).__name__} of more levels than Python can write"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


class BodyError(ValueError):
    """A body that is not accepted. `param` is the field that is wrong, `code` what programs read,
    `status` that of HTTP."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(one_line(message))
        self.param = None if param is None else one_line(param)
        self.code, self.status = code, status


def refusal(name: str, value: Any, accepted: str, why: str = "") -> BodyError:
    """The error for a field whose value is not accepted."""
    return BodyError(f"{name}={as_json(value)}:{why} expected {accepted}", name)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an answer of this HTTP status, which is not 200. `param` is the field that is
    wrong, `code` what programs read."""
    kind = SERVER if status >= 500 else KINDS.get(status, INVALID)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
