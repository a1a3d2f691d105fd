"""`dsb batch`: an answer a line in both formats."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dsb_runtime as dsb
from dsb_runtime.cli import batch
from dsb_runtime.cli.main import main
from dsb_runtime.engine import lane
from tests import golden
from tests.commands import answers, python, refused, write_lines

SHORT = ("--gen-length", "16", "--block-length", "8")
HOW = {"gen_length": 16, "block_length": 8, "stop_at_eos": True}


def direct(words: list[int], seed: int = 0, chat: bool = True, **settings: Any):
    """The same decoding through Python. The golden model is the chat model."""
    ids = [2, *words, 3] if chat else words
    generator = torch.Generator().manual_seed(seed)
    return dsb.generate(
        golden.model("llada"), torch.tensor([ids]), generator=generator, **{**HOW, **settings}
    )


def text_of(out: dsb.GenerationOutput) -> str:
    """An answer in the words of the tests' tokenizer."""
    ids = out.sequences[0, -16:][: out.row_tokens[0]].tolist()
    return " ".join(f"w{i}" for i in ids if i != 1)


def test_our_format(chat, tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", [
        {"id": "a", "prompt": "w10 w20 w30"},
        {"id": 7, "messages": [{"role": "user", "content": "w11"}], "threshold": 0.5},
        "",
        {"prompt": "w12", "temperature": 0.7, "seed": 5},
        {"id": "d", "prompt": "w13", "steps": 16, "stop": "w"},
    ])  # fmt: skip
    out = tmp_path / "out.jsonl"
    assert (
        main(["batch", str(source), str(out), "--model", str(chat), *SHORT, "--factor", "1"]) == 0
    )
    by_line = answers(out)
    expected = {
        1: ("a", direct([10, 20, 30], factor=1.0)),
        2: (7, direct([11], threshold=0.5)),
        4: (None, direct([12], 5, factor=1.0, temperature=0.7)),
        5: ("d", direct([13], steps=16, stop_strings="w", tokenizer=dsb.load_tokenizer(chat))),
    }
    assert by_line.keys() == expected.keys()
    assert by_line[5]["tokens"] == 1  # a row counts up to the token that completes a stop string
    for line, (name, output) in expected.items():
        assert re.fullmatch("[0-9a-f]{16}", by_line[line].pop("digest"))
        assert by_line[line] == {
            "line": line,
            "id": name,
            "answer": "" if name == "d" else text_of(output),
            "tokens": output.row_tokens[0],
            "forwards": output.nfe,
            "finish_reason": "stop" if name == "d" or output.row_tokens[0] < 16 else "length",
        }
    said = capsys.readouterr().err
    tokens = sum(output.row_tokens[0] for _, output in expected.values())
    assert said.startswith(f"4 answers, 0 errors, {tokens} tokens, ")


def test_openai_format(chat, tmp_path):
    body = {
        "model": chat.name,
        "messages": [{"role": "user", "content": "w10 w20"}],
        "n": 1,
        "stop": None,
    }
    text = {"prompt": "w10 w20", "max_tokens": 8, "threshold": 0.5, "logprobs": None}
    source = write_lines(tmp_path / "in.jsonl", [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": text},
        {"custom_id": "c", "body": {**body, "stream": True}},
        {"custom_id": "d", "url": "/v1/embeddings", "body": {}},
        {"custom_id": "e", "method": "GET", "body": body},
        {"custom_id": "f", "n": 2, "body": body},
        {"custom_id": None, "body": body},
    ])  # fmt: skip
    out = tmp_path / "out.jsonl"
    assert main(["batch", str(source), str(out), "--model", str(chat), *SHORT]) == 3
    by_line = answers(out)
    expected = direct([10, 20])
    first = by_line[1]
    assert first["custom_id"] == "a" and first["error"] is None
    assert first["response"]["status_code"] == 200
    answer = first["response"]["body"]
    assert answer["object"] == "chat.completion" and answer["model"] == chat.name
    tokens = expected.row_tokens[0]
    assert answer["usage"] == {
        "prompt_tokens": 4, "completion_tokens": tokens, "total_tokens": 4 + tokens,
        "forwards": expected.nfe,
    }  # fmt: skip
    said = {"role": "assistant", "content": text_of(expected)}
    assert answer["choices"][0]["message"] == said
    short = direct([10, 20], chat=False, gen_length=8, block_length=8, threshold=0.5)
    answer = by_line[2]["response"]["body"]
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] == short.row_tokens[0]
    said = "stream=true: expected false: a line is answered whole"
    refused = {"message": said, "type": "invalid_request_error", "param": "stream", "code": None}
    assert by_line[3]["error"] is None and by_line[3]["response"] == {
        "status_code": 400, "request_id": "batch_req_3", "body": {"error": refused},
    }  # fmt: skip
    # These are no requests.
    for number, param, said in (
        (4, "url", 'url="/v1/embeddings": expected /v1/chat'),
        (5, "method", 'method="GET": it cannot be honoured here; expected null or "POST"'),
        (6, "n", "n=2: no such field; expected one of url, body, method"),
        (7, "custom_id", "custom_id=null: expected text or an int"),
    ):
        line = by_line[number]
        assert line["response"] is None and line["error"]["message"].startswith(said)
        assert line["error"]["code"] == "invalid_request" and line["error"]["param"] == param


BAD: list[tuple[Any, str]] = [
    ("{", "the line is no JSON ("),
    ("[" * 100_000, "the line is no JSON ("),
    ("[1]", "the line is [1]; expected a JSON object"),
    ({"id": [1], "prompt": "w5"}, "id=[1]: expected text or an int"),
    ('{"id": 1e999, "prompt": "w5"}', "id=Infinity: expected text or an int"),
    ({"id": "x"}, "expected either prompt or messages"),
    ({"prompt": "w5", "messages": []}, "expected either prompt or messages"),
    ({"prompt": " "}, 'prompt=" ": expected some text'),
    ({"prompt": 5}, "prompt=5: expected some text"),
    ({"prompt": "w5", "bloc": 3}, "bloc=3: no such field; expected one of prompt, messages"),
    ({"prompt": "w5", "threshold": 2}, "threshold=2: expected a number in [0, 1]"),
    ({"prompt": "w5", "threshold": 0.5, "steps": 8}, "expected at most one of"),
    ({"prompt": "w5", "gen_length": 8, "block_length": 16}, "expected an int from 1 to 8"),
    ({"prompt": "w5", "seed": 2**63}, "expected an int of 64 bits"),
    ({"prompt": "w5", "stop": [1]}, "stop=[1]: expected a string"),
    ({"messages": [{"role": "user"}]}, "messages.0.content=null: expected text"),
    ({"messages": [{"role": "x", "content": "w5"}]}, 'messages.0.role="x": expected one of'),
    ({"prompt": "w5 " * 9000}, "gen_length=16 after prompt of 9002 tokens: expected at most the"),
    ({"prompt": "w5 <mask>"}, "prompt: the mask token; expected other text"),
    ({"prompt": "\ud800"}, "prompt: character 0 is half of a surrogate pair; expected text"),
]


def test_a_bad_line_is_answered_by_an_error(chat, tmp_path, capsys):
    good = {"id": "good", "prompt": "w10"}
    source = write_lines(tmp_path / "in.jsonl", [*(line for line, _ in BAD), good])
    out = tmp_path / "out.jsonl"
    words = ["batch", str(source), str(out), "--model", str(chat), *SHORT]
    assert main(words) == 3
    by_line = answers(out)
    for number, (_, said) in enumerate(BAD, 1):
        error = by_line[number]["error"]
        assert error["code"] in ("invalid_request", "context_length_exceeded")
        assert said in error["message"]
        assert "\n" not in error["message"]
        json.dumps(by_line[number], allow_nan=False)  # which JSON lacks
    assert by_line[len(BAD) + 1]["answer"] == text_of(direct([10]))
    summary = f"dsb: {len(BAD)} of {len(BAD) + 1} lines are answered by an error\n"
    said = capsys.readouterr()
    assert said.err.startswith(f"1 answers, {len(BAD)} errors") and said.err.endswith(summary)
    # They count as answers, and are told again.
    assert main(words) == 3
    said = capsys.readouterr()
    assert said.err.startswith("0 answers, 0 errors") and said.err.endswith(summary)


def test_a_terminal_gets_a_progress_bar(chat, tmp_path, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "w10"}, {"prompt": "w11"}])
    terminal, ours = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # 100 columns
    words = ["batch", str(source), str(tmp_path / "out.jsonl"), "--model", str(chat), *SHORT]
    with open(ours, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        assert main(words) == 0
    written = b""
    with contextlib.suppress(OSError):  # Linux says so once all is read that was written
        while part := os.read(terminal, 2**16):
            written += part
    os.close(terminal)
    shown = written.decode()
    assert "100%" in shown and "2/2" in shown and "tokens/s, 0 errors" in shown


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (FloatingPointError("step 0: the logits are NaN"), "not_a_number", "logits are NaN"),
        (torch.OutOfMemoryError("CUDA"), "context_length_exceeded", "a refresh step of 1 x"),
    ],
)
def test_what_fails_while_it_is_decoded_is_no_fault_of_the_line(
    chat, tmp_path, monkeypatch, error, code, said
):
    launch = lane.Lane.launch

    def raising(self, shape):
        for row in self.occupied:
            if self.requests[row].config.gen_length == 8:
                raise error
        return launch(self, shape)

    monkeypatch.setattr(lane.Lane, "launch", raising)
    lines = [{"prompt": "w10"}, {"prompt": "w11", "gen_length": 8, "threshold": 0.5}]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert main(["batch", str(source), str(out), "--model", str(chat), *SHORT]) == 3
    by_line = answers(out)
    assert by_line[1]["answer"] == text_of(direct([10]))
    error = by_line[2]["error"]
    assert error["code"] == code and error["param"] is None and said in error["message"]


def test_pipes_without_the_extra_of_the_server(chat):
    absent = ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client")
    script = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "runpy.run_module('dsb_runtime', run_name='__main__', alter_sys=True)"
    )
    lines = "".join(json.dumps({"id": i, "prompt": f"w{i}"}) + "\n" for i in range(10, 14))
    done = python("-c", script, "batch", "-", "-", "--model", chat, *SHORT, input=lines)
    got = {a["id"]: a for a in map(json.loads, done.stdout.splitlines())}
    assert done.stderr.startswith("4 answers, 0 errors") and done.stderr.count("\n") == 1
    assert sorted(got) == [10, 11, 12, 13]
    for i, answer in got.items():
        assert answer["answer"] == text_of(direct([i]))


def test_the_commands_settings_fit_shorter_and_longer_lines(chat, tmp_path):
    lengths = {"gen_length": 8}, {"gen_length": 32}, {}
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "w10", **more} for more in lengths])
    out = tmp_path / "out.jsonl"
    words = ["batch", str(source), str(out), "--model", str(chat), "--gen-length", "16"]
    words += ["--block-length", "16", "--steps", "12", "--min-new-tokens", "16"]
    assert main(words) == 0
    by_line = answers(out)
    for number, settings in enumerate((
        {"gen_length": 8, "block_length": 8, "steps": 6, "min_new_tokens": 8},
        {"gen_length": 32, "block_length": 16, "steps": 24, "min_new_tokens": 16},
        {"gen_length": 16, "block_length": 16, "steps": 12, "min_new_tokens": 16},
    ), 1):  # fmt: skip
        expected = direct([10], **settings)
        answer = by_line[number]
        assert (answer["tokens"], answer["forwards"]) == (expected.row_tokens[0], expected.nfe)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("no memory")])
def test_lines_that_cannot_be_read_to_the_end(chat, tmp_path, capsys, monkeypatch, error):
    """Those that were read are answered."""
    lines = batch.lines_of

    def broken(path: str) -> Iterator[tuple[int, bytes]]:
        yield from lines(path)
        raise error

    source = write_lines(tmp_path / "in.jsonl", [{"prompt": f"w{i}"} for i in range(10, 13)])
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(batch, "lines_of", broken)
    refused(
        capsys, "batch", source, out, "--model", chat, *SHORT, said=str(error),
    )  # fmt: skip
    assert sorted(answers(out)) == [1, 2, 3]
