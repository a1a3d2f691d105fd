"""What `dsb batch` writes: it goes on where it was killed, and leaves files of others alone."""

from __future__ import annotations

import fcntl
import importlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dsb_runtime.cli import main as command
from dsb_runtime.cli.main import main
from dsb_runtime.engine import lane
from tests.commands import answers, kill_after, refused, start, write_lines
from tests.test_batch_command import SHORT, direct, text_of


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
    out.write_text('{"line": 1, "digest": "0"}\n' * 2)
    refused(capsys, *words, said="line 2: the second answer to line 1, after that at line 1;")
    out.unlink()
    refused(capsys, "batch", source, tmp_path / "a" / "b", said="OUT.jsonl")
    refused(capsys, "batch", source, source, said="both IN.jsonl and OUT.jsonl")
    refused(capsys, "batch", tmp_path / "none", out, said="no such file; expected lines of JSON")
    refused(capsys, *words, "--max-rows", "0", said="--max-rows=0: expected an int >= 1")
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where the shell closed it
    refused(capsys, "batch", source, "-", said="OUT.jsonl -: standard output is closed")


def test_an_answer_counts_for_its_own_line_model_and_settings(chat, tmp_path, capsys, monkeypatch):
    """The lines have no ids, which would tell them apart."""
    lines = [{"prompt": f"w{i}"} for i in range(10, 14)]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines[:3])))  # its last line does not end
    words = ["batch", source, out, "--model", chat, *SHORT]
    assert main([*map(str, words)]) == 0
    capsys.readouterr()
    kept = out.read_bytes()
    load = command.load
    monkeypatch.setattr(command, "load", lambda _: pytest.fail("a checkpoint was loaded"))
    write_lines(source, lines)  # one more
    for option in ("--threshold 0.5", "--seed 3", "--raw", "--dtype float32", "--model elsewhere"):
        if option == "--model elsewhere":
            shutil.copytree(chat, tmp_path / "elsewhere")
            option = f"--model {tmp_path / 'elsewhere'}"
        refused(
            capsys, *words, *option.split(),
            said=f"{out}: line 1 is answered for another IN.jsonl, model or setting; expected",
        )  # fmt: skip
    others = {1: [lines[1], *lines[1:]], 3: [*lines[:2], {"prompt": "w12", "steps": 16}],
              2: [lines[0], "", *lines[2:]]}  # fmt: skip
    for number, changed in others.items():
        write_lines(source, changed)
        refused(capsys, *words, said=f"line {number} is answered for another IN.jsonl")
    assert out.read_bytes() == kept, "nothing was decoded"
    monkeypatch.setattr(command, "load", load)
    write_lines(source, lines)
    assert main([*map(str, words), "--max-rows", "2"]) == 0
    assert out.read_bytes().startswith(kept) and sorted(answers(out)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "w10"}\n{"prompt": "w50"}\n', "line 2 is answered for"),
        ('{"prompt": "w10"}\n{"prompt": "w11"}\n', "line 3 is answered for"),  # the end comes early
    ],
)
def test_a_line_of_a_pipe_that_has_changed(chat, tmp_path, capsys, text, said):
    lines = [{"prompt": f"w{i}"} for i in range(10, 13)]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    words = ["--model", str(chat), *SHORT]
    assert main(["batch", str(source), str(out), *words]) == 0
    capsys.readouterr()
    with ThreadPoolExecutor() as pool:
        pool.submit(pipe.write_text, text)
        refused(capsys, "batch", pipe, out, *words, said=said)


def test_a_wrong_line_is_mended(chat, tmp_path, capsys):
    """Its answer is deleted, as the message says, or all errors are, as the documentation says."""
    wrong: list[dict[str, Any]] = [
        {"prompt": 5}, {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": ""}},
        {"custom_id": "c", "body": 5},
    ]  # fmt: skip
    lines = [{"prompt": '"error": {'}, *wrong]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    words = ["batch", str(source), str(out), "--model", str(chat), *SHORT]
    assert main(words) == 3
    capsys.readouterr()
    write_lines(source, [lines[0], {"prompt": "w11"}, *wrong[1:]])
    texts = out.read_text().splitlines(keepends=True)
    at = next(i for i, text in enumerate(texts, 1) if json.loads(text)["line"] == 2)
    refused(capsys, *words, said=f"(or delete its line {at}, an error, to have that tried again)")
    out.write_text("".join(text for text in texts if '"error": {' not in text))
    assert sorted(answers(out)) == [1]
    assert main(words) == 3
    by_line = answers(out)
    assert [n for n in sorted(by_line) if '"error": {' in json.dumps(by_line[n])] == [3, 4]


def test_a_fault_of_the_device_leaves_its_lines_open(chat, tmp_path, monkeypatch):
    lines = [{"prompt": f"w{i}"} for i in range(10, 20)]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    words = ["batch", str(source), str(out), "--model", str(chat), *SHORT, "--max-rows", "2"]
    launch, launches = lane.Lane.launch, itertools.count()

    def faulty(self, shape):
        if next(launches) >= 40:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return launch(self, shape)

    with monkeypatch.context() as patch:
        patch.setattr(lane.Lane, "launch", faulty)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            main(words)
    before = answers(out)
    assert 0 < len(before) < 10 and all("answer" in answer for answer in before.values())
    assert main(words) == 0
    assert sorted(answers(out)) == list(range(1, 11))


def test_answers_go_into_a_pipe(chat, tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": f"w{i}"} for i in range(10, 15)])
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    words = ["batch", str(source), str(pipe), "--model", str(chat), *SHORT]
    with ThreadPoolExecutor() as pool:
        text = pool.submit(pipe.read_text)
        assert main(words) == 0
        by_line = [json.loads(line)["line"] for line in text.result().splitlines()]
        assert sorted(by_line) == [1, 2, 3, 4, 5]
        pool.submit(lambda: pipe.open().close())  # a reader that goes away
        assert main(words) == 141


def test_two_commands_do_not_write_one_file(job, capsys):

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
