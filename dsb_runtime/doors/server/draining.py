"""How the server ends: at the first signal once its requests have ended, at the second at once."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from dsb_runtime.doors.server.gate import Traffic

READ_SECONDS = 30  # within which clients must read what is decoded once the server drains


class Draining(uvicorn.Server):
    """The first SIGTERM or Ctrl-C ends the server once it has no request; meanwhile new ones get
    503, and clients that do not read their answers are not waited for. The second signal ends the
    server at once.

    Args:
        config: as uvicorn has it.
        traffic: of the app.
        started: is called once connections are taken.
    """

    def __init__(
        self, config: uvicorn.Config, traffic: Traffic, started: Callable[[], object]
    ) -> None:
        super().__init__(config)
        self.traffic, self.tell_started = traffic, started
        self.decoded = 0.0  # when a row was last seen that was not done

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.tell_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.traffic.draining:
            self.force_exit = True
            super().handle_exit(sig, frame)
        self.traffic.draining = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls this ten times a second. Returns whether the server ends now."""
        traffic, now = self.traffic, time.monotonic()
        if traffic.rows or not traffic.draining:
            self.decoded = now
        unread = now - self.decoded > READ_SECONDS
        self.should_exit |= traffic.draining and (unread or not traffic.open)
        return await super().on_tick(counter)
