"""`dsb batch`: an answer a line in both formats, and what a kill leaves is gone on with."""

from __future__ import annotations

import importlib
import io
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dsb_runtime as dsb
from dsb_runtime.cli.main import main
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
        assert by_line[line] == {
            "line": line,
            "id": name,
            "answer": "" if name == "d" else text_of(output),
            "tokens": output.row_tokens[0],
            "forwards": output.nfe,
            "finish_reason": "stop" if name == "d" or output.row_tokens[0] < 16 else "length",
        }
    said = capsys.readouterr().out
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
    ])  # fmt: skip
    out = tmp_path / "out.jsonl"
    assert main(["batch", str(source), str(out), "--model", str(chat), *SHORT]) == 0
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
    assert by_line[3]["error"] == {"code": "invalid_request", "message": said, "param": "stream"}
    assert by_line[4]["error"]["message"].startswith("url='/v1/embeddings': expected /v1/chat")


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
    ({"prompt": "\ud800"}, "expected text"),
]


def test_a_bad_line_is_answered_by_an_error(chat, tmp_path, capsys):
    good = {"id": "good", "prompt": "w10"}
    source = write_lines(tmp_path / "in.jsonl", [*(line for line, _ in BAD), good])
    out = tmp_path / "out.jsonl"
    assert main(["batch", str(source), str(out), "--model", str(chat), *SHORT]) == 0
    by_line = answers(out)
    for number, (_, said) in enumerate(BAD, 1):
        assert said in by_line[number]["error"]
        assert "\n" not in by_line[number]["error"]
    assert by_line[len(BAD) + 1]["answer"] == text_of(direct([10]))
    assert capsys.readouterr().out.startswith(f"1 answers, {len(BAD)} errors")


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
    for content in ("my notes", "my notes\n", '{"a": 1}\n{"line": 1', "3\n"):
        out.write_text(content)
        refused(capsys, *words, said="line 1: no answer of dsb batch; expected its own file")
        assert out.read_text() == content
    write_lines(out, [{"line": 1, "id": "other", "answer": "x"}])
    refused(
        capsys, *words, said="line 1 is answered as 'other', and is 'q0' now; expected the same"
    )
    refused(capsys, "batch", source, source, said="both IN.jsonl and OUT.jsonl")
    refused(capsys, "batch", tmp_path / "none", out, said="no such file; expected lines of JSON")
    refused(capsys, *words, "--max-rows", "0", said="--max-rows=0: expected an int >= 1")
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where the shell closed it
    refused(capsys, "batch", source, "-", said="OUT.jsonl -: standard output is closed")


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
        refused(capsys, *words, said="another dsb batch writes it; expected one")


def test_a_reader_that_goes_away(chat, tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "w10"}] * 5)
    monkeypatch.setattr(sys, "stdout", Gone())
    assert main(["batch", str(source), "-", "--model", str(chat), *SHORT]) == 141
