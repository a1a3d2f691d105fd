"""What stands before the app: keys, the size of bodies, the end of the server, the access log."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Collection, Container
from dataclasses import dataclass
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsb_runtime.doors.server.errors import RETRY_SECONDS, ApiError
from dsb_runtime.doors.server.metrics import Metrics
from dsb_runtime.engine.request import Request

logger = logging.getLogger(__name__)
GUARDED = "/v1/"  # what needs a key
METRICS = "/metrics"  # answered to the end
MODEL = "/v1/models/"  # what a model's name follows
BODY_SECONDS = 60.0  # within which a body must be there
TICK = 0.2  # seconds after which a body that has not come is looked at again


@dataclass
class Traffic:
    """How many HTTP requests are under way, which rows of them are not done, and whether the server
    takes no more of them."""

    rows: Collection[Request]
    open: int = 0
    draining: bool = False


class Gate:
    """ASGI middleware. It refuses before a body is read, and logs no query, no key and no body."""

    def __init__(
        self, app: ASGIApp, *, traffic: Traffic, metrics: Metrics, api_key: str | None,
        most_bytes: int, paths: Container[str],
    ) -> None:  # fmt: skip
        self.app, self.traffic, self.metrics, self.paths = app, traffic, metrics, paths
        self.key = None if api_key is None else api_key.encode()
        self.most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, path = time.perf_counter(), 499, scope["path"]  # 499: the client has gone

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.traffic.open += path != METRICS
        try:
            error = self.refusal(path, Headers(scope=scope))
            if error is not None:
                await error.response()(scope, receive, watched_send)
            else:
                await self.app(scope, self.limited(receive), watched_send)
        except BaseException:
            status = 500 if status == 499 else status
            raise
        finally:
            self.traffic.open -= path != METRICS
            known = f"{MODEL}{{id}}" if path.startswith(MODEL) else path
            known = known if known in self.paths else "other"  # so that labels are few
            self.metrics.requests.labels(known, str(status)).inc()
            client = (scope.get("client") or ["-"])[0]
            seconds = time.perf_counter() - began
            where = f"{scope['method']} {shown_path(path)}"
            logger.info("%s %s %d %.3fs", client, where, status, seconds)

    def refusal(self, path: str, headers: Headers) -> ApiError | None:
        """Why a request is refused before its body is read, or None."""
        if self.traffic.draining and path != METRICS:
            return ending()
        if self.key is not None and path.startswith(GUARDED):
            kind, _, given = headers.get("authorization", "").partition(" ")
            right = secrets.compare_digest(given.strip().encode("latin-1"), self.key)
            if kind.lower() != "bearer" or not right:
                said = "the API key is missing or wrong: expected Authorization: Bearer KEY"
                return ApiError(
                    401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
                )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.most_bytes:
            return too_large(self.most_bytes)
        return None

    def limited(self, receive: Receive) -> Receive:
        """`receive` that refuses a body which is too long, comes too slowly, or has not come once
        the server drains: a client that sends half a body would keep it alive."""
        total, more = 0, True
        end = time.perf_counter() + BODY_SECONDS

        async def limited_receive() -> Message:
            nonlocal total, more
            if not more:
                return await receive()
            coming = asyncio.ensure_future(receive())
            try:
                while not (await asyncio.wait([coming], timeout=TICK))[0]:
                    self.check_coming(end)
                message = coming.result()
            finally:
                coming.cancel()
            total += len(message.get("body", b""))
            if total > self.most_bytes:
                raise too_large(self.most_bytes)
            more = message.get("more_body", False)
            if more:
                self.check_coming(end)
            return message

        return limited_receive

    def check_coming(self, end: float) -> None:
        """Raise ApiError if a body that is not there yet is waited for no longer."""
        if self.traffic.draining:
            raise ending()
        if time.perf_counter() > end:
            raise too_slow()


def shown_path(path: str) -> str:
    """A path as the log and messages show it."""
    return quote(path)[:200]


def ending() -> ApiError:
    return ApiError(
        503, "the server is about to end", code="shutting_down",
        headers={"Retry-After": RETRY_SECONDS, "Connection": "close"},
    )  # fmt: skip


def too_slow() -> ApiError:
    said = f"the body has not come: expected it within {BODY_SECONDS:g} seconds"
    return ApiError(408, said, code="body_too_slow", headers={"Connection": "close"})


def too_large(most: int) -> ApiError:
    said = f"the body is too large: expected at most {most} bytes"
    return ApiError(413, said, code="body_too_large", headers={"Connection": "close"})
