"""Errors in OpenAI's shape: a status, and what was wrong in one line that names the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dsb_runtime.fields import shown

INVALID, SERVER = "invalid_request_error", "server_error"
LONGEST = 1000  # how many characters of a message are sent back
RETRY_SECONDS = "1"  # what Retry-After says: a row is free as soon as some answer ends


class ApiError(HTTPException):
    """An answer other than 200. `param` is the field that is wrong, `code` what programs read."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code
        text = " ".join(message.split())
        self.message = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."

    def body(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error"}.get(self.status_code, INVALID)
        return {
            "error": {
                "message": self.message, "type": kind if self.status_code < 500 else SERVER,
                "param": self.param, "code": self.code,
            }
        }  # fmt: skip

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def refusal(name: str, value: Any, accepted: str, why: str = "") -> ApiError:
    """The error for a field whose value is not accepted."""
    return ApiError(400, f"{name}={shown(value)}:{why} expected {accepted}", param=name)


def setting_error(error: Exception) -> ApiError:
    """What a check of this package says of a setting, whose name its message begins with."""
    name = re.match(r"(\w+)=", str(error))
    return ApiError(400, str(error), param=name[1] if name else None)


def body_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic says of a body: the first of its errors."""
    first = errors[0]
    path = [str(part) for part in first["loc"][1:]]  # the first part is "body"
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is no JSON: expected a JSON object")
    if not path:
        hint = "a JSON object, with the header Content-Type: application/json"
        return ApiError(400, f"the body: expected {hint}")
    name = ".".join(path)
    if first["type"] == "missing":
        return ApiError(400, f"{name}: it is missing; expected a value", param=name)
    said = str(first["msg"]).replace("Input should be", "expected")
    return ApiError(400, f"{name}={shown(first['input'])}: {said}", param=name)


def full(waiting: int) -> ApiError:
    return ApiError(
        429, f"the queue is full: {waiting} answers wait already; try again later",
        code="queue_full", headers={"Retry-After": RETRY_SECONDS},
    )  # fmt: skip
