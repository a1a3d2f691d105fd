"""`dsb batch`: an answer a line in both formats, and what a kill leaves is gone on with."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import dsb_runtime as dsb
from dsb_runtime.cli import batch
from dsb_runtime.cli.main import main
from dsb_runtime.engine import lane
from tests import golden
from tests.checkpoints import write_chat_model
from tests.commands import answers, kill_after, python, refused, start, write_lines

SHORT = ("--gen-length", "16", "--block-length", "8")
HOW = {"gen_length": 16, "block_length": 8, "stop_at_eos": True}


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat"))


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
    said = "stream=True: expected false: a line is answered whole"
    refused = {"message": said, "type": "invalid_request_error", "param": "stream", "code": None}
    assert by_line[3]["error"] is None and by_line[3]["response"] == {
        "status_code": 400, "request_id": "batch_req_3", "body": {"error": refused},
    }  # fmt: skip
    # These are no requests.
    for number, param, said in (
        (4, "url", "url='/v1/embeddings': expected /v1/chat"),
        (5, "method", "method='GET': it cannot be honoured here; expected null or 'POST'"),
        (6, "n", "n=2: no such field; expected one of url, body, method"),
        (7, "custom_id", "custom_id=None: expected text or an int"),
    ):
        line = by_line[number]
        assert line["response"] is None and line["error"]["message"].startswith(said)
        assert line["error"]["code"] == "invalid_request" and line["error"]["param"] == param


BAD: list[tuple[Any, str]] = [
    ("{", "the line is no JSON ("),
    ("[" * 100_000, "the line is no JSON ("),
    ("[1]", "the line is [1]; expected a JSON object"),
    ({"id": [1], "prompt": "w5"}, "id=[1]: expected text or an int"),
    ({"id": "x"}, "expected either prompt or messages"),
    ({"prompt": "w5", "messages": []}, "expected either prompt or messages"),
    ({"prompt": " "}, "prompt=' ': expected some text"),
    ({"prompt": 5}, "prompt=5: expected some text"),
    ({"prompt": "w5", "bloc": 3}, "bloc=3: no such field; expected one of prompt, messages"),
    ({"prompt": "w5", "threshold": 2}, "threshold=2: expected a number in [0, 1]"),
    ({"prompt": "w5", "threshold": 0.5, "steps": 8}, "expected at most one of"),
    ({"prompt": "w5", "gen_length": 8, "block_length": 16}, "expected an int from 1 to 8"),
    ({"prompt": "w5", "seed": 2**63}, "expected an int of 64 bits"),
    ({"prompt": "w5", "stop": [1]}, "stop=[1]: expected a string"),
    ({"messages": [{"role": "user"}]}, "messages.0.content=None: expected text"),
    ({"messages": [{"role": "x", "content": "w5"}]}, "messages.0.role='x': expected one of"),
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
    assert by_line[len(BAD) + 1]["answer"] == text_of(direct([10]))
    summary = f"dsb: {len(BAD)} of {len(BAD) + 1} lines are answered by an error\n"
    said = capsys.readouterr()
    assert said.err.startswith(f"1 answers, {len(BAD)} errors") and said.err.endswith(summary)
    # They count as answers, and are told again.
    assert main(words) == 3
    said = capsys.readouterr()
    assert said.err.startswith("0 answers, 0 errors") and said.err.endswith(summary)


def test_what_fails_while_it_is_decoded_is_no_fault_of_the_line(chat, tmp_path, monkeypatch):
    launch = lane.Lane.launch

    def raising(self, shape):
        for row in self.occupied:
            if self.requests[row].config.gen_length == 8:
                raise FloatingPointError("step 0: the model's logits are NaN (row 0)")
        return launch(self, shape)

    monkeypatch.setattr(lane.Lane, "launch", raising)
    lines = [{"prompt": "w10"}, {"prompt": "w11", "gen_length": 8, "threshold": 0.5}]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert main(["batch", str(source), str(out), "--model", str(chat), *SHORT]) == 3
    by_line = answers(out)
    assert by_line[1]["answer"] == text_of(direct([10]))
    assert by_line[2]["error"] == {
        "code": "server_error", "message": "step 0: the model's logits are NaN (row 0)",
        "param": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--gen-length 0", "gen_length=0: expected an int >= 1"),
        ("--gen-length 9000", "gen_length=9000 after a prompt of 1 needs 9001 positions"),
        ("--block-length 17", "block_length=17: expected an int from 1 to 16"),
        ("--top-p 0.5", "top_p=0.5: llada samples by Gumbel noise"),
        ("--banned-tokens 9999", "banned_tokens has 9999: expected ids"),
    ],
)
def test_a_wrong_setting_of_the_command_is_refused_once(job, wrong, said, capsys):
    _, out, words = job
    refused(capsys, *words, *wrong.split(), said=said)
    assert not out.exists()


def test_pipes_without_the_extra_of_the_server(chat):
    absent = ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client")
    script = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "runpy.run_module('dsb_runtime', run_name='__main__', alter_sys=True)"
    )
    lines = "".join(json.dumps({"id": i, "prompt": f"w{i}"}) + "\n" for i in range(10, 14))
    done = python("-c", script, "batch", "-", "-", "--model", chat, *SHORT, input=lines)
    got = {a["id"]: a for a in map(json.loads, done.stdout.splitlines())}
    assert done.stderr == "" and sorted(got) == [10, 11, 12, 13]
    for i, answer in got.items():
        assert answer["answer"] == text_of(direct([i]))


@pytest.fixture
def job(chat, tmp_path) -> tuple[Path, Path, list[str]]:
    """40 lines, and the command that answers them three at a time."""
    source = write_lines(
        tmp_path / "in.jsonl",
        [{"id": f"q{i}", "prompt": f"w{10 + i} w{20 + 3 * i}"} for i in range(40)],
    )
    out = tmp_path / "out.jsonl"
    words = ["batch", str(source), str(out), "--model", str(chat), *SHORT]
    return source, out, [*words, "--max-rows", "3", "--temperature", "0.5", "--seed", "9"]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_killed_command_goes_on_where_it_was(job, number, code):
    _, out, words = job
    process = start(words)
    said = kill_after(process, out, number, 4)
    assert process.returncode == code and "Traceback" not in said
    kept = [line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 4 <= len(kept) < 40
    with out.open("ab") as file:  # a kill inside a write cuts the line
        file.write(b'{"line": 39, "id": "q3')
    assert main(words) == 0
    assert out.read_bytes().splitlines(keepends=True)[: len(kept)] == kept
    by_line = answers(out)
    assert sorted(by_line) == list(range(1, 41))
    for line in (1, 17, 40):  # whichever run has answered it
        expected = direct([9 + line, 17 + 3 * line], 9 + line, temperature=0.5)
        assert by_line[line]["answer"] == text_of(expected)
    before = out.read_bytes()
    assert main(words) == 0 and out.read_bytes() == before


@pytest.mark.slow
def test_many_kills(job):
    _, out, words = job
    for answered in range(1, 40, 9):
        kill_after(start(words), out, signal.SIGKILL, answered)
    assert main(words) == 0
    assert sorted(answers(out)) == list(range(1, 41))


def test_what_is_no_file_of_answers_stays_as_it_is(job, capsys, tmp_path, monkeypatch):
    source, out, words = job
    earlier = '{"line": 1, "id": "q0", "answer": "x"}\n'  # without a digest
    for content in ("my notes", "my notes\n", '{"a": 1}\n{"line": 1', "3\n", earlier):
        out.write_text(content)
        refused(capsys, *words, said="line 1: no answer of this dsb batch; expected its own file")
        assert out.read_text() == content
    out.unlink()
    refused(capsys, "batch", source, source, said="both IN.jsonl and OUT.jsonl")
    refused(capsys, "batch", tmp_path / "none", out, said="no such file; expected lines of JSON")
    refused(capsys, *words, "--max-rows", "0", said="--max-rows=0: expected an int >= 1")
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where the shell closed it
    refused(capsys, "batch", source, "-", said="OUT.jsonl -: standard output is closed")


def test_an_answer_counts_for_its_own_line_model_and_settings(chat, tmp_path, capsys):
    """The lines have no ids, which would tell them apart."""
    lines = [{"prompt": f"w{i}"} for i in range(10, 14)]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines[:3])))  # its last line does not end
    words = ["batch", source, out, "--model", chat, *SHORT]
    assert main([*map(str, words)]) == 0
    kept = out.read_bytes()
    write_lines(source, lines)  # one more
    for option in ("--threshold 0.5", "--seed 3", "--raw", "--dtype float32", "--model elsewhere"):
        if option == "--model elsewhere":
            shutil.copytree(chat, tmp_path / "elsewhere")
            option = f"--model {tmp_path / 'elsewhere'}"
        refused(
            capsys, *words, *option.split(), quiet=False,
            said=f"{out}: line 1 is answered for another IN.jsonl, model or setting; expected",
        )  # fmt: skip
    others = {1: [lines[1], *lines[1:]], 3: [*lines[:2], {"prompt": "w12", "steps": 16}],
              2: [lines[0], "", *lines[2:]]}  # fmt: skip
    for number, changed in others.items():
        write_lines(source, changed)
        refused(capsys, *words, quiet=False, said=f"line {number} is answered for another IN.jsonl")
    assert out.read_bytes() == kept, "nothing was decoded"
    write_lines(source, lines)
    assert main([*map(str, words), "--max-rows", "2"]) == 0
    assert out.read_bytes().startswith(kept) and sorted(answers(out)) == [1, 2, 3, 4]


def test_a_line_of_a_pipe_that_has_changed(chat, tmp_path, capsys):
    lines = [{"prompt": f"w{i}"} for i in range(10, 13)]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    words = ["--model", str(chat), *SHORT]
    assert main(["batch", str(source), str(out), *words]) == 0
    capsys.readouterr()
    with ThreadPoolExecutor() as pool:
        pool.submit(pipe.write_text, '{"prompt": "w10"}\n{"prompt": "w50"}\n')
        refused(capsys, "batch", pipe, out, *words, quiet=False, said="line 2 is answered for")


def test_lines_that_cannot_be_read_to_the_end(chat, tmp_path, capsys, monkeypatch):
    """Those that were read are answered."""
    lines = batch.lines_of

    def broken(path: str) -> Iterator[tuple[int, bytes]]:
        yield from lines(path)
        raise OSError(5, "Input/output error")

    source = write_lines(tmp_path / "in.jsonl", [{"prompt": f"w{i}"} for i in range(10, 13)])
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(batch, "lines_of", broken)
    refused(
        capsys, "batch", source, out, "--model", chat, *SHORT, said="Input/output error",
    )  # fmt: skip
    assert sorted(answers(out)) == [1, 2, 3]


def test_a_cluster_needs_the_extra(job, capsys, monkeypatch):
    _, out, words = job
    refused(capsys, *words, "--replicas", "2", said="--replicas=2: expected it with --ray only")
    refused(capsys, *words, "--ray", "--replicas", "0", said="--replicas=0: expected an int >= 1")
    monkeypatch.setitem(sys.modules, "ray", None)
    needs = "needs the extra: dsb-kernels[ray]"
    refused(capsys, *words, "--ray", said=f"dsb batch --ray {needs}")
    assert not out.exists()
    monkeypatch.delitem(sys.modules, "dsb_runtime.doors.ray_serve", raising=False)
    with pytest.raises(ImportError, match=re.escape(f"ray_serve {needs}")):
        importlib.import_module("dsb_runtime.doors.ray_serve")


def test_two_commands_do_not_write_one_file(job, capsys):
    import fcntl

    _, out, words = job
    with out.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(capsys, *words, said="another process writes it; expected one at a time")


def test_a_reader_that_goes_away(chat, tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "w10"}] * 5)
    monkeypatch.setattr(sys, "stdout", Gone())
    assert main(["batch", str(source), "-", "--model", str(chat), *SHORT]) == 141
