"""Errors in OpenAI's shape: a status, and what was wrong in one line that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dsb_runtime.doors.openai.errors import BodyError, error_body, one_line

FAULT = "the server has a fault; its log says more"
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
        self.param, self.code, self.message = param, code, one_line(message)

    def body(self) -> dict[str, Any]:
        return error_body(self.status_code, self.message, self.param, self.code)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def body_error(error: BodyError) -> ApiError:
    """The error for a body that is not accepted."""
    return ApiError(error.status, str(error), param=error.param, code=error.code)


def full(waiting: int) -> ApiError:
    return ApiError(
        429, f"the queue is full: {waiting} answers wait already; try again later",
        code="queue_full", headers={"Retry-After": RETRY_SECONDS},
    )  # fmt: skip
