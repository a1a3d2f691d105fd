"""A real server on a free port of this machine, in a thread of the tests' process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from fastapi import FastAPI
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import dsb_runtime as dsb
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.doors.server.app import create_app
from dsb_runtime.doors.server.draining import Draining

KEY = "a-key-of-the-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}


@dataclass
class Served:
    """A server with an embedded model, and what its tests need."""

    url: str
    app: FastAPI
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    server: Draining
    http: httpx.Client  # with the key
    client: openai.OpenAI

    def chat(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=body)

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@contextlib.contextmanager
def serving(max_rows: int = 4, folder: Path = MODEL_DIR, **how: Any) -> Iterator[Served]:
    model = dsb.load_model(folder, device="cpu")
    tokenizer = dsb.load_tokenizer(folder)
    app = create_app(dsb.BatchEngine(model, max_rows), tokenizer, "embedded", api_key=KEY, **how)
    with socket.socket() as bound:
        # Connections inherit it: little is on its way to a client that does not read.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        server = Draining(app, lambda: None)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            wait_until(lambda: server.started)
            with (
                httpx.Client(base_url=url, headers=HEADERS, timeout=60) as http,
                openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
            ):
                yield Served(url, app, model, tokenizer, server, http, client)
        finally:
            server.should_exit = True
            thread.join()


def post(body: bytes, length: int | None = None) -> bytes:
    """A chat completion request as it goes over the wire."""
    head = ("POST /v1/chat/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}",
            "Content-Type: application/json", f"Content-Length: {length or len(body)}", "",
            "")  # fmt: skip
    return "\r\n".join(head).encode() + body


def half_a_body(port: int) -> socket.socket:
    """A client that names more bytes than it sends."""
    client = socket.create_connection(("127.0.0.1", port), timeout=60)
    client.sendall(post(b'{"messages": ', length=99))
    return client


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is so, which must not take longer than `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
