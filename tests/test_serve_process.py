"""`dsb serve` as a process: SIGTERM, and 64 clients (for DSB_LOAD_SECONDS, else 5)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import openai
import pytest

import dsb_runtime as dsb
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.demo.problems import heldout
from dsb_runtime.doors.openai.asked import CHAT
from dsb_runtime.doors.server import draining
from tests.commands import ROOT, refused
from tests.served import HEADERS, KEY, half_a_body, post, serving, wait_until

CLIENTS = 64


@contextlib.contextmanager
def process(*options: str, key: str = KEY) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`dsb serve` on a free port, and its address, which it prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DSB_API_KEY": key}
    env.pop("TRITON_INTERPRET", None)
    words = [sys.executable, "-m", "dsb_runtime", "serve", "--port", "0", *options]
    # Tests that `nohup` runs ignore SIGHUP, and a process would inherit that.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    server = subprocess.Popen(
        words, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    signal.signal(signal.SIGHUP, before)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        assert line.startswith("embedded: http://127.0.0.1:"), line
        yield server, line.split()[1]
    finally:
        server.kill()
        server.communicate()


def test_wrong_arguments_are_refused(capsys):
    refused(capsys, "serve", "--port", 70000, said="--port=70000: expected an int from 0 to 65535")
    refused(capsys, "serve", "--max-rows", 0, said="--max-rows=0: expected an int >= 1")
    refused(capsys, "serve", "--max-queue", -1, said="--max-queue=-1: expected an int >= 0")
    refused(capsys, "serve", "--api-key", "", said="--api-key: expected printable ASCII")
    refused(capsys, "serve", "--host", "300.1.1.1", said="--host='300.1.1.1' --port=8000: ")


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_refuses_what_comes():
    body = {
        "messages": [{"role": "user", "content": "Mia has 12 secrets."}], "stream": True,
        "threshold": 1.0, "max_tokens": 400, "stop_at_eos": False,
    }  # fmt: skip
    with process() as (server, url), half_a_body(int(url.rpartition(":")[2])) as half:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions?token=abc", json=body, headers=HEADERS, timeout=300
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            assert half.recv(4096).startswith(b"HTTP/1.1 503 ")
            answer = httpx.get(f"{url}/health")
            assert answer.status_code == 503 and answer.headers["Retry-After"]
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        _, log = server.communicate(timeout=60)
        assert server.returncode == 0
    assert "POST /v1/chat/completions 200" in log and "GET /health 503" in log
    assert "POST /v1/chat/completions 503" in log
    assert not [word for word in ("abc", "secrets", KEY, "Traceback") if word in log]


@pytest.mark.slow
def test_a_second_sigterm_ends_the_stream_at_once():
    with process() as (server, url), unread(url) as client:
        assert client.recv(512).startswith(b"HTTP/1.1 200 ")
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=60)
    assert server.returncode == 143 and f"POST {CHAT} 200" in log
    assert all(" 127.0.0.1 " in line for line in log.splitlines()), log


@pytest.mark.slow
@pytest.mark.skipif(not which("curl"), reason="needs curl")
def test_the_docs_curl_and_sighup():
    """SIGHUP ends the server as SIGTERM does."""
    text = (ROOT / "docs/serving.md").read_text()
    (command,) = re.findall(r"^```\n(curl .*?)^```", text, re.MULTILINE | re.DOTALL)
    with process(key="") as (server, url):
        command = command.replace("http://127.0.0.1:8000", url)
        done = subprocess.run(["sh", "-c", command], capture_output=True, check=True)
        (choice,) = json.loads(done.stdout)["choices"]
        assert choice["message"]["role"] == "assistant" and choice["finish_reason"]
        server.send_signal(signal.SIGHUP)
        _, log = server.communicate(timeout=60)
    assert server.returncode == 0 and len(log.splitlines()) == 1, log


@contextlib.contextmanager
def unread(url: str) -> Iterator[socket.socket]:
    """A client that asks for a stream and does not read it, with small buffers."""
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 64,
            "steps": 64, "n": 4, "temperature": 0.5, "stop_at_eos": False,
            "stream_options": {"include_canvas": True}}  # fmt: skip
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        client.sendall(post(json.dumps(body).encode()))
        yield client


@pytest.mark.parametrize("signals", [1, 2])
def test_an_answer_that_is_not_read_ends_in_silence(signals, monkeypatch, caplog):
    """It is waited for no longer than READ_SECONDS, and not at all after a second signal."""
    monkeypatch.setattr(draining, "READ_SECONDS", 1 if signals == 1 else 60)
    with caplog.at_level(logging.WARNING), serving(max_rows=4) as served, unread(served.url):
        server, traffic = served.server, served.app.state.traffic
        wait_until(lambda: len(traffic.rows) == 4)
        for _ in range(signals):
            server.handle_exit(signal.SIGTERM, None)
        if signals == 1:
            wait_until(lambda: not traffic.rows)
            assert traffic.open == 1
        wait_until(lambda: not traffic.open)
        assert server.should_exit and not traffic.rows
    assert not caplog.records
    assert server.second == (None if signals == 1 else signal.SIGTERM)


def memory(pid: int) -> float:
    """The resident memory of a process in MiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


async def ask(client: openai.AsyncOpenAI, prompt: str, stream: bool) -> str:
    how: dict[str, Any] = {"model": "embedded", "messages": [{"role": "user", "content": prompt}]}
    if not stream:
        answer = await client.chat.completions.create(**how)
        return answer.choices[0].message.content or ""
    chunks = await client.chat.completions.create(**how, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


async def load(url: str, pid: int, seconds: float, expected: dict[str, str]) -> dict[str, Any]:
    """Let 64 clients ask, one after another in each, for `seconds` and 6 answers a client at least.

    The memory while an answer is computed goes up and down by 30 MiB, and it grows until every
    shape has been met: the lowest of the second third of the answers and of the last are given.
    """
    times: list[float] = []
    wrong: list[tuple[str, str]] = []
    memories: list[tuple[int, float]] = []
    end = time.monotonic() + seconds
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=600
    ) as client:

        async def one(number: int) -> None:
            prompts = itertools.islice(itertools.cycle(expected), number, None)
            for turn, prompt in enumerate(prompts):
                if time.monotonic() > end and len(times) >= 6 * CLIENTS:
                    return
                began = time.monotonic()
                text = await ask(client, prompt, stream=(number + turn) % 2 == 0)
                times.append(time.monotonic() - began)
                if text != expected[prompt]:
                    wrong.append((prompt, text))

        async def watch() -> None:
            while True:
                memories.append((len(times), memory(pid)))
                await asyncio.sleep(max(0.1, seconds / 60))

        watcher = asyncio.ensure_future(watch())
        began = time.monotonic()
        await asyncio.gather(*map(one, range(CLIENTS)))
        took = time.monotonic() - began
        watcher.cancel()
    third = len(times) // 3
    lowest = [
        min(MiB for answers, MiB in memories if first <= answers < first + third)
        for first in (third, 2 * third)
    ]
    return {
        "answers": len(times), "wrong": wrong, "seconds": took, "per second": len(times) / took,
        "median": statistics.median(times), "p99": statistics.quantiles(times, n=100)[-1],
        "MiB": lowest,
    }  # fmt: skip


@pytest.mark.slow
def test_64_clients_get_the_answers_of_generate():
    """None is lost, none is wrong, and memory does not grow."""
    model, tokenizer = dsb.load_model(MODEL_DIR, device="cpu"), dsb.load_tokenizer(MODEL_DIR)
    expected = {}
    for problem in heldout(48, seed=11, steps=3):
        chat = [{"role": "user", "content": problem.prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        out = dsb.generate(model, ids)
        response = out.sequences[0, ids.shape[1] :][: out.row_tokens[0]]
        expected[problem.prompt] = tokenizer.decode(response, skip_special_tokens=True)
    seconds = float(os.environ.get("DSB_LOAD_SECONDS", "5"))
    with process("--max-rows", "32") as (server, url):
        # The log is read meanwhile: a full pipe would stop the server.
        reader = asyncio.to_thread(server.communicate)

        async def both() -> dict[str, Any]:
            log = asyncio.ensure_future(reader)
            figures = await load(url, server.pid, seconds, expected)
            server.send_signal(signal.SIGTERM)
            await log
            return figures

        figures = asyncio.run(both())
        assert server.returncode == 0
    print(figures)
    assert figures["wrong"] == [] and figures["answers"] >= CLIENTS
    early, late = figures["MiB"]
    assert late - early < 32
