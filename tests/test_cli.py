"""The `dsb` command: what it prints, its exit codes, one line for every error."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dsb_runtime as dsb
from dsb_runtime.cli.main import main
from tests import golden
from tests.checkpoints import parts, write_changed, write_chat_model

PROMPT = "w10 w20 w30"
IDS = [[2, 10, 20, 30, 3]]  # in the chat template
SHORT = ("--gen-length", "16", "--block-length", "8")
COUNTS = r"(\d+) tokens, (\d+) forwards, ([\d.]+) tokens per forward, [\d.]+ tokens/s"


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat"))


def direct(ids: list[list[int]] = IDS, **settings: Any) -> dsb.GenerationOutput:
    """The same decoding through Python. The golden model is the chat model."""
    shape = {"gen_length": 16, "block_length": 8, "stop_at_eos": True}
    return dsb.generate(golden.model("llada"), torch.tensor(ids), **{**shape, **settings})


def run_json(capsys: pytest.CaptureFixture, folder: Path, *options: str) -> dict[str, Any]:
    assert main(["generate", PROMPT, "--model", str(folder), "--json", *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("\n") == 1
    return json.loads(captured.out)


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def test_answer_and_counts(chat, capsys):
    assert main(["generate", PROMPT, "--model", str(chat), *SHORT]) == 0
    out = direct()
    answer, counts = capsys.readouterr().out.splitlines()
    assert answer == words(out.sequences[0, 5:].tolist())
    tokens, forwards, ratio = re.fullmatch(COUNTS, counts).groups()
    assert (int(tokens), int(forwards)) == (16, out.nfe)
    assert float(ratio) == pytest.approx(16 / out.nfe, abs=0.005)
    found = run_json(capsys, chat, *SHORT)
    assert found["answer"] == answer
    assert (found["tokens"], found["forwards"]) == (16, out.nfe)
    assert found["tokens_per_forward"] == 16 / out.nfe
    assert found["tokens_per_second"] == pytest.approx(16 / found["seconds"])


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), {}),
        (("--schedule", "naive", "--cache", "dual"), {"schedule": "naive", "cache": "dual"}),
        (("--max-block-length", "8", "--threshold", "0.5"),
         {"max_block_length": 8, "threshold": 0.5}),
        (("--prefix-window", "2", "--refresh-commit", "first"),
         {"prefix_window": 2, "refresh_commit": "first"}),
        (("--refresh-policy", "response", "--full-refresh-every", "3"),
         {"refresh_policy": "response", "full_refresh_every": 3}),
        (("--factor", "1", "--cache", "none"), {"factor": 1.0, "cache": "none"}),
        (("--frechet", "0.1"), {"frechet": 0.1}),
        (("--steps", "8", "--no-stop-at-eos"), {"steps": 8, "stop_at_eos": False}),
    ],
)  # fmt: skip
def test_options_are_the_settings(chat, capsys, options, settings):
    found, out = run_json(capsys, chat, *SHORT, *options), direct(**settings)
    assert found["response_ids"] == out.sequences[0, 5:].tolist()
    assert found["committed_per_forward"] == out.tokens_per_forward


def test_the_prompt(chat, capsys, monkeypatch):
    """Without the chat template, or from standard input."""
    found = run_json(capsys, chat, *SHORT, "--raw")["response_ids"]
    templated = direct().sequences[0, 5:].tolist()
    assert found == direct([[10, 20, 30]]).sequences[0, 3:].tolist() != templated
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n"))
    assert main(["generate", "-", "--model", str(chat), "--json", *SHORT]) == 0
    assert json.loads(capsys.readouterr().out)["response_ids"] == templated


def test_tokens_are_counted_to_the_first_eos(tmp_path, capsys):
    """A token that the model does produce is named the EOS: the answer ends there."""
    free = direct().sequences[0, 5:].tolist()
    eos = free[6]
    folder = write_changed(write_chat_model(tmp_path), eos_token_id=eos)
    for option in ("--stop-at-eos", "--no-stop-at-eos"):
        found = run_json(capsys, folder, *SHORT, option)
        count = free.index(eos) + 1
        assert found["tokens"] == count
        assert found["answer"] == words(free[:count])
        assert found["tokens_per_forward"] == count / found["forwards"]
        rest = found["response_ids"][count:]
        assert (set(rest) == {eos}) == (option == "--stop-at-eos")


def test_seeds(chat, capsys):
    hot = (*SHORT, "--temperature", "3")
    runs = [run_json(capsys, chat, *hot, "--seed", s)["response_ids"] for s in ("1", "1", "2")]
    assert runs[0] == runs[1] != runs[2]


def test_default_lengths(tmp_path, capsys):
    """The checkpoint's `max_new_tokens`, and a quarter of it a block."""
    folder = write_chat_model(tmp_path)
    (folder / "generation_config.json").write_text('{"max_new_tokens": 12, "eos_token_id": 1}')
    expected = direct(gen_length=12, block_length=3)
    assert run_json(capsys, folder)["response_ids"] == expected.sequences[0, 5:].tolist()


def test_trace(chat, capsys, tmp_path):
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("b.PNG", b"\x89PNG")):
        found = run_json(capsys, chat, *SHORT, "--trace", str(tmp_path / name))
        assert found["response_ids"] == direct().sequences[0, 5:].tolist()
        assert (tmp_path / name).read_bytes().startswith(start)


def test_live_to_a_pipe_shows_the_last_canvas_without_escapes(chat, capsys):
    options = ("--live", "--frame-seconds", "0")
    assert main(["generate", PROMPT, "--model", str(chat), *SHORT, *options]) == 0
    out, response = capsys.readouterr().out, direct()
    assert "\x1b" not in out
    assert f"forward {response.nfe}" in out and "prefix window" in out
    flat = " ".join(out.split())
    assert f"{words(IDS[0])} {words(response.sequences[0, 5:].tolist())}" in flat
    assert re.search(COUNTS, out)


# --- errors -----------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture, *argv: object, said: str) -> None:
    """The command says one line on stderr, nothing on stdout, and exits 2."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("dsb")
    assert said in captured.err


WRONG = [
    (("--gen-length", 0), "gen_length=0"),
    (("--gen-length", 16, "--block-length", 17), "block_length=17"),
    (("--block-length", 8, "--max-block-length", 4), "max_block_length=4"),
    (("--gen-length", 1020), "gen_length=1020 after a prompt of 5 needs 1025 positions"),
    (("--threshold", 2), "threshold=2.0"),
    (("--threshold", 0.5, "--factor", 1), "threshold=0.5, factor=1.0: expected at most one"),
    (("--steps", 4, "--frechet", 0), "frechet=0.0, steps=4"),
    (("--top-p", 0.9), "top_p=0.9: llada samples"),
    (("--temperature", "nan"), "temperature=nan"),
    (("--cache", "none", "--prefix-window", 4), "prefix_window=4"),
    (("--full-refresh-every", 3), "full_refresh_every=3"),
    (("--seed", -1), "--seed=-1"),
    (("--seed", 2**63), "--seed="),
    (("--mask-id", 9999), "mask_id=9999"),
    (("--dtype", "int8"), "dtype='int8'"),
    (("--device", "gpu9"), "device='gpu9'"),
    (("--device", "mps"), "device='mps'"),
    (("--live", "--json"), "--live and --json"),
    (("--live", "--frame-seconds", -1), "--frame-seconds=-1.0: expected a number in [0, 3600]"),
    (("--live", "--frame-seconds", "nan"), "--frame-seconds=nan"),
    (("--live", "--frame-seconds", "inf"), "--frame-seconds=inf"),
    (("--trace", "/no/such/folder/a.png"), "no such folder"),
    (("--trace", "/proc/a.png"), "--trace /proc/a.png: No such file or directory; expected a file"),
    (("--trace", "a.txt"), "--trace a.txt: expected a file ending in"),
    (("--trace", "picture"), "--trace picture: expected"),
    (("--schedule", "fast"), "argument --schedule: invalid choice: 'fast'"),
    (("--gen-length", "many"), "argument --gen-length: invalid int value: 'many'"),
    (("--family", "gpt2"), "argument --family"),
    (("--no-such-option",), "--no-such-option"),
]


@pytest.mark.parametrize(("options", "said"), WRONG)
def test_wrong_options(chat, capsys, options, said):
    refused(capsys, "generate", PROMPT, "--model", chat, *options, said=said)


def test_wrong_commands_and_empty_prompts(chat, capsys, monkeypatch):
    for argv in ((), ("generate",), ("decode", "x"), ("generate", "a", "b")):
        refused(capsys, *argv, said="--help")
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    for prompt in ("", "  \n", "-"):
        refused(capsys, "generate", prompt, "--model", chat, said="prompt: empty")


def test_a_template_that_makes_nothing_or_fails(tmp_path, capsys):
    folder = write_chat_model(tmp_path)
    for text, said in (
        ("{{ '' }}", "an empty prompt"),
        ("{{ 1 / 0 }}", "chat template: division"),
        ("{% if %}", "chat template: "),
    ):
        (folder / "chat_template.jinja").write_text(text)
        refused(capsys, "generate", PROMPT, "--model", folder, *SHORT, said=said)


def test_models_that_cannot_be_used(tmp_path, capsys):
    def generate(folder: object, said: str) -> None:
        refused(capsys, "generate", PROMPT, "--model", folder, *SHORT, said=said)

    generate(golden.DATA / "llada", "no tokenizer that can be read")
    generate("/no/such/folder", "expected a checkpoint folder or a hub id")
    generate(tmp_path, "no config.json, so this is no model folder")
    folder = write_chat_model(tmp_path / "cut")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    generate(folder, "not a whole safetensors file")
    weights = parts("llada")[1]
    weights["model.transformer.ff_out.weight"][3] = float("nan")
    generate(write_changed(folder, weights=weights), "step 0: the model's logits are NaN")


def test_a_picture_that_fails_does_not_take_the_answer_along(chat, capsys, tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("dsb_runtime.measure.trace.Trace.save", full)
    path = tmp_path / "trace.png"
    assert main(["generate", PROMPT, "--model", str(chat), *SHORT, "--trace", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("w") and said.err == "dsb: No space left on device\n"


def test_ctrl_c(chat, capsys, monkeypatch):
    class Interrupted(io.StringIO):
        def read(self, *args: Any) -> str:
            signal.raise_signal(signal.SIGINT)
            return ""

    monkeypatch.setattr(sys, "stdin", Interrupted())
    # A shell starts background jobs with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["generate", "-", "--model", str(chat)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "dsb: interrupted\n"


# --- as a process -----------------------------------------------------------------------------


def process(*argv: str, **how: Any) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of `dsb` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "dsb_runtime", *argv], env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False, **how,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_processes(chat):
    code, out, err = process("--help")
    assert (code, err) == (0, "")
    assert all(command in out for command in ("generate", "bench", "eval", "convert"))
    code, out, err = process("generate", "-", "--model", str(chat), *SHORT, input=PROMPT)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == words(direct().sequences[0, 5:].tolist())
    code, out, err = process("generate", "hi", "--model", "nobody/nothing")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("dsb: model='nobody/nothing': neither a folder nor a hub id")
