"""`dsb batch --ray` and the server on Ray Serve, on a small cluster of this machine's CPUs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

import dsb_runtime as dsb
from dsb_runtime.cli.main import main
from dsb_runtime.demo import MODEL_DIR
from tests.checkpoints import write_chat_model
from tests.commands import ROOT, answers, kill_after, start, write_lines

ray = pytest.importorskip("ray", reason="needs the extra: ray")
pytest.importorskip("ray.data", reason="needs the extra: ray")

pytestmark = pytest.mark.slow
LINES = 120
SETTINGS = ("--gen-length", "32", "--block-length", "8", "--steps", "32", "--max-rows", "3")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two CPUs, to which this process is connected."""
    with pytest.MonkeyPatch.context() as patch:  # what the cluster's processes inherit
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # other tests run beside these
        patch.delenv("TRITON_INTERPRET", raising=False)
        context = ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20,
            log_to_driver=False, logging_level="ERROR",
        )  # fmt: skip
    yield context.address_info["address"]
    ray.shutdown()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def replicas() -> list[int]:
    """The processes of Ray Data's replicas, which the cluster's daemon has started, as this process
    has started that."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            title, pid = (entry / "cmdline").read_bytes(), int(entry.name)
            if title.startswith(b"ray::MapWorker") and parent(parent(pid)) == os.getpid():
                pids.append(pid)
    return pids


def test_a_killed_command_and_a_killed_replica_lose_no_line(cluster, tmp_path, capsys, monkeypatch):
    chat = write_chat_model(tmp_path / "chat")
    source = write_lines(
        tmp_path / "in.jsonl",
        ["{", *({"id": f"q{i}", "prompt": f"w{10 + i} w{20 + 3 * i}"} for i in range(LINES))],
    )
    alone, out = tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    how = ["--model", str(chat), *SETTINGS, "--temperature", "0.5", "--seed", "9"]
    assert main(["batch", str(source), str(alone), *how]) == 3  # the line that is no JSON
    words = ["batch", str(source), str(out), *how, "--ray"]
    # A replica that cannot begin ends the command with what is wrong, below what Ray may log.
    assert main([*words, "--gen-length", "9000"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("dsb: gen_length=9000 after a prompt of 1 needs 9001 positions")
    assert not out.exists()
    # The command is killed.
    said = kill_after(start(words, RAY_ADDRESS=cluster), out, signal.SIGKILL, 4)
    lines = out.read_bytes().splitlines(keepends=True)
    assert 4 <= len(lines) < LINES, said
    # It goes on with two replicas, one of which is killed.
    killed = []

    def kill_a_replica() -> None:
        while len(two := replicas()) < 2:
            time.sleep(0.1)
        while out.read_bytes().count(b"\n") < len(lines) + 8:
            time.sleep(0.01)
        os.kill(two[0], signal.SIGKILL)
        killed.append(out.read_bytes().count(b"\n"))

    thread = threading.Thread(target=kill_a_replica)
    thread.start()
    monkeypatch.chdir(tmp_path)  # where no replica is
    assert main([*words, "--replicas", "2", "--model", "chat"]) == 3
    thread.join()
    assert killed[0] < LINES
    assert out.read_bytes().splitlines(keepends=True)[: len(lines)] == lines
    assert answers(out) == answers(alone)
    before = out.read_bytes()
    assert main(words) == 3 and out.read_bytes() == before


def test_a_replica_of_the_server_answers_as_one_process_does(cluster):
    from ray import serve

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    serve.start(http_options={"port": port})
    words = ["run", "dsb_runtime.doors.ray_serve:app", "device=cpu", "max_rows=4"]
    process = start([*words, "--address", cluster], module="ray.serve.scripts")
    prompt, answer = "Mia has 12 apples. Monday she finds 7. How many apples now?", None
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 48}
    try:
        end = time.monotonic() + 300
        while answer is None or answer.status_code == 404:  # no replica yet
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.2)
            try:
                answer = httpx.post(
                    f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60
                )
            except httpx.ConnectError:
                continue
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
        serve.shutdown()
    model, tokenizer = dsb.load_model(MODEL_DIR, device="cpu"), dsb.load_tokenizer(MODEL_DIR)
    ids = tokenizer.apply_chat_template([body["messages"]], add_generation_prompt=True).input_ids
    out = dsb.generate(model, torch.tensor(ids), gen_length=48, stop_at_eos=True)
    tokens = out.sequences[0, -48:][: out.row_tokens[0]]
    assert answer.json()["choices"][0]["message"]["content"] == tokenizer.decode(
        tokens, skip_special_tokens=True
    )
    assert answer.json()["usage"]["forwards"] == out.nfe
