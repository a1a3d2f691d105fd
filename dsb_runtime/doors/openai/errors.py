"""An error as OpenAI's API writes it."""

from __future__ import annotations

from typing import Any

KINDS = {429: "rate_limit_error"}  # the `type` of a status below 500, where it has one of its own
INVALID, SERVER = "invalid_request_error", "server_error"


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an answer of this HTTP status, which is not 200. `param` is the field that is
    wrong, `code` what programs read."""
    kind = SERVER if status >= 500 else KINDS.get(status, INVALID)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
