"""How the server ends: at the first signal once its requests have ended, at the second at once."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

READ_SECONDS = 30  # within which clients must read what is decoded once the server drains


class Draining(uvicorn.Server):
    """The first signal ends the server once it has no request; meanwhile new ones get 503, and
    clients that do not read their answers are not waited for. The second ends it at once.

    Args:
        app: of `create_app`.
        started: is called once connections are taken.
    """

    def __init__(self, app: FastAPI, started: Callable[[], object]) -> None:
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False,
            timeout_graceful_shutdown=2 * READ_SECONDS,  # for a task that hangs
        )  # fmt: skip
        super().__init__(config)
        self.traffic, self.tell_started = app.state.traffic, started
        self.decoded = 0.0  # when a row was last seen that was not done
        self.second: int | None = None  # the signal that has ended the server at once

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.tell_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own would raise the signal again at the end, in the midst of its event loop.
        if self.traffic.draining:
            self.second, self.should_exit = sig, True
        self.traffic.draining = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls this ten times a second. Returns whether the server ends now."""
        traffic, now = self.traffic, time.monotonic()
        if traffic.rows or not traffic.draining:
            self.decoded = now
        unread = now - self.decoded > READ_SECONDS
        self.should_exit |= traffic.draining and (unread or not traffic.open)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what is open. Requests that are not waited for see that their client has gone, and
        end in order: uvicorn would cancel them, and log a traceback of each."""
        end = time.monotonic() + READ_SECONDS
        closing = asyncio.ensure_future(super().shutdown(sockets))
        while not closing.done():
            if self.traffic.open or self.second is not None or time.monotonic() > end:
                for connection in list(self.server_state.connections):
                    connection.transport.abort()
            await asyncio.wait([closing], timeout=0.1)
        closing.result()
