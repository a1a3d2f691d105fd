"""The `dsb` command: what it prints, its exit codes, one line for every error."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dsb_runtime as dsb
from dsb_runtime.cli.main import main
from dsb_runtime.cli.process import ENDING, prepare_process, run_process
from tests import golden
from tests.checkpoints import parts, write_changed, write_chat_model
from tests.commands import python, refused

PROMPT = "w10 w20 w30"
IDS = [[2, 10, 20, 30, 3]]  # in the chat template
SHORT = ("--gen-length", "16", "--block-length", "8")
COUNTS = r"(\d+) tokens, (\d+) forwards, ([\d.]+) tokens per forward, [\d.]+ tokens/s"


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


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (("--schedule", "naive", "--cache", "dual", "--steps", "8", "--no-stop-at-eos"),
         {"schedule": "naive", "cache": "dual", "steps": 8, "stop_at_eos": False}),
        (("--max-block-length", "8", "--prefix-window", "2", "--refresh-commit", "first"),
         {"max_block_length": 8, "prefix_window": 2, "refresh_commit": "first"}),
        (("--refresh-policy", "response", "--full-refresh-every", "3", "--factor", "1"),
         {"refresh_policy": "response", "full_refresh_every": 3, "factor": 1.0}),
    ],
)  # fmt: skip
def test_options_are_the_settings(chat, capsys, options, settings):
    printed, out = run_json(capsys, chat, *SHORT, *options), direct(**settings)
    assert printed["response_ids"] == out.sequences[0, 5:].tolist()
    assert printed["committed_per_forward"] == out.tokens_per_forward


@pytest.mark.parametrize("stop", [False, True])
def test_a_suffix_follows_the_response(chat, capsys, stop):
    options = ("--stop-at-eos",) if stop else ()
    printed = run_json(capsys, chat, *SHORT, "--suffix", "w40 w50", *options)
    ids = torch.tensor([[*IDS[0], *[511] * 16, 40, 50]])
    out = dsb.infill(golden.model("llada"), ids, block_length=8, stop_at_eos=stop)
    assert printed["response_ids"] == out.sequences[0, 5:21].tolist()
    assert printed["response_ids"] != direct().sequences[0, 5:].tolist()
    assert printed["tokens"] == out.row_tokens[0] and printed["forwards"] == out.nfe


def test_a_response_ends_at_a_stop_string(chat, capsys):
    whole = run_json(capsys, chat, *SHORT)
    second = whole["answer"].split()[1]
    printed = run_json(capsys, chat, *SHORT, "--stop", "no such text", "--stop", second)
    count = printed["tokens"]
    assert printed["answer"] == words(whole["response_ids"][:count]) and second in printed["answer"]
    assert count < 16 and printed["response_ids"][count:] == [1] * (16 - count)
    assert printed["forwards"] <= whole["forwards"]
    model = ("generate", PROMPT, "--model", chat)
    refused(capsys, *model, "--stop", "", said="--stop='': expected some text")
    refused(capsys, *model, "--stop", "a", "--suffix", "b", said="--stop and --suffix")


def test_tokens_are_forbidden(chat, capsys):
    first, second, *_ = direct().sequences[0, 5:].tolist()
    options = ("--banned-tokens", f"{first},{second}", "--min-new-tokens", "3")
    expected = direct(banned_tokens=(first, second), min_new_tokens=3).sequences[0, 5:].tolist()
    assert run_json(capsys, chat, *SHORT, *options)["response_ids"] == expected
    model = ("generate", PROMPT, "--model", chat)
    refused(capsys, *model, "--banned-tokens", "5,x", said="--banned-tokens: '5,x': expected ids")
    refused(capsys, *model, "--banned-tokens", "999", said="banned_tokens has 999: expected ids")


@pytest.mark.parametrize("suffix", ["", "  ", "w4 <mask>"])
def test_a_suffix_is_text(chat, capsys, suffix):
    options = (*SHORT, "--suffix", suffix)
    refused(capsys, "generate", PROMPT, "--model", chat, *options, said="--suffix")


def test_the_prompt(chat, capsys, monkeypatch):
    """Without the chat template, or from standard input."""
    printed = run_json(capsys, chat, *SHORT, "--raw")["response_ids"]
    templated = direct().sequences[0, 5:].tolist()
    assert printed == direct([[10, 20, 30]]).sequences[0, 3:].tolist() != templated
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n"))
    assert main(["generate", "-", "--model", str(chat), "--json", *SHORT]) == 0
    assert json.loads(capsys.readouterr().out)["response_ids"] == templated


def test_tokens_are_counted_to_the_first_eos(tmp_path, capsys):
    """A token that the model does produce is named the EOS: the answer ends there."""
    free = direct().sequences[0, 5:].tolist()
    eos = free[6]
    folder = write_changed(write_chat_model(tmp_path), eos_token_id=eos)
    for option in ("--stop-at-eos", "--no-stop-at-eos"):
        printed = run_json(capsys, folder, *SHORT, option)
        count = free.index(eos) + 1
        assert printed["tokens"] == count
        assert printed["answer"] == words(free[:count])
        assert printed["tokens_per_forward"] == count / printed["forwards"]
        rest = printed["response_ids"][count:]
        assert (set(rest) == {eos}) == (option == "--stop-at-eos")


def test_seeds(chat, capsys):
    hot = (*SHORT, "--temperature", "3")
    runs = [run_json(capsys, chat, *hot, "--seed", s)["response_ids"] for s in ("1", "1", "2")]
    assert runs[0] == runs[1] != runs[2]


def test_trace(chat, capsys, tmp_path):
    path = tmp_path / "a.png"
    printed = run_json(capsys, chat, *SHORT, "--trace", str(path))
    assert printed["response_ids"] == direct().sequences[0, 5:].tolist()
    assert path.read_bytes().startswith(b"\x89PNG")


def test_live_to_a_pipe_shows_the_last_canvas_without_escapes(chat, capsys):
    options = ("--live", "--frame-seconds", "0")
    assert main(["generate", PROMPT, "--model", str(chat), *SHORT, *options]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and re.search(COUNTS, out)
    assert words(direct().sequences[0].tolist()) in " ".join(out.split())


def test_unknown_words_and_an_answer_without_text_are_said(chat, capsys):
    model = dsb.load_model(chat, device="cpu")
    others = {*range(model.config.vocab_size)} - {model.dsb.mask_id, *model.dsb.eos_ids}
    banned = ["--banned-tokens", ",".join(map(str, others))]
    assert main(["generate", "w10 nonsense w20", "--model", str(chat), *SHORT, *banned]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "dsb: 1 tokens of the prompt are unknown to the model", "dsb: the answer has no text",
    ]  # fmt: skip


# --- errors -----------------------------------------------------------------------------------


WRONG = [
    (("--gen-length", 0), "gen_length=0"),
    (("--gen-length", 1020), "gen_length=1020 after a prompt of 5 needs 1025 positions"),
    (("--threshold", 0.5, "--factor", 1), "threshold=0.5, factor=1.0: expected at most one"),
    (("--top-p", 0.9), "top_p=0.9: llada samples"),
    (("--seed", -1), "--seed=-1"),
    (("--seed", 2**63), "--seed="),
    (("--mask-id", 9999), "mask_id=9999"),
    (("--dtype", "int8"), "dtype='int8'"),
    (("--device", "gpu9"), "device='gpu9'"),
    (("--live", "--json"), "--live and --json"),
    (("--live", "--frame-seconds", -1), "--frame-seconds=-1.0: expected a number in [0, 3600]"),
    (("--frame-seconds", 1), "--frame-seconds=1: expected it with --live only"),
    (("--trace", "/no/such/folder/a.png"), "no such folder"),
    (("--trace", "/proc/a.png"), "--trace /proc/a.png: No such file or directory; expected a file"),
    (("--trace", "a.txt"), "--trace a.txt: expected a file ending in"),
    (("--schedule", "fast"), "argument --schedule: invalid choice: 'fast'"),
    (("--gen-length", "many"), "argument --gen-length: invalid int value: 'many'"),
    (("--family", "gpt2"), "argument --family"),
    (("--family", "dream"), "it is read as a checkpoint of dream"),
    (("--no-such-option",), "--no-such-option"),
]


@pytest.mark.parametrize(("options", "said"), WRONG)
def test_wrong_options(chat, capsys, options, said):
    refused(capsys, "generate", PROMPT, "--model", chat, *options, said=said)


def test_wrong_commands_and_empty_prompts(chat, capsys, monkeypatch):
    for argv in ((), ("generate",), ("decode", "x"), ("generate", "a", "b")):
        refused(capsys, *argv, said="--help")
    refused(capsys, "serve", "--threshold", "1", said="--threshold 1 (see dsb serve --help)")
    refused(capsys, "generate", "w1 <mask>", "--model", chat, said="prompt: it has the mask token")
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    for prompt in ("", "  \n", "-"):
        refused(capsys, "generate", prompt, "--model", chat, said="prompt: empty")


def test_a_template_that_makes_nothing_or_fails(tmp_path, capsys):
    folder = write_chat_model(tmp_path)
    for text, said in (
        ("{{ '' }}", "an empty prompt"),
        ("{{ 1 / 0 }}", "prompt: refused by the model's chat template: division"),
        ("{% if %}", "prompt: refused by the model's chat template: "),
    ):
        (folder / "chat_template.jinja").write_text(text)
        refused(capsys, "generate", PROMPT, "--model", folder, *SHORT, said=said)


def test_models_that_cannot_be_used(tmp_path, capsys):
    """An error of each kind that loading and decoding raise."""
    weights = parts("llada")[1]
    weights["model.transformer.ff_out.weight"][3] = float("nan")
    broken = write_changed(write_chat_model(tmp_path / "broken"), weights=weights)
    for folder, said in (
        (golden.DATA / "llada", "no tokenizer that can be read"),
        (tmp_path, "no config.json, so this is no model folder"),
        (broken, "step 0: the model's logits are NaN"),
    ):
        refused(capsys, "generate", PROMPT, "--model", folder, *SHORT, said=said)


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


def test_prompts_that_are_no_text(capsys, monkeypatch):
    """They are refused before a checkpoint is read."""
    generate = ("generate", "-", "--model", "/asked/before/it/is/read")
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it where the shell closed it
    refused(capsys, *generate, said="prompt -: standard input is closed; expected some text")
    for text, said in (
        (io.TextIOWrapper(io.BytesIO(b"caf\xe9 x"), "utf-8"), "byte 3 is no utf-8"),
        (io.StringIO("a" * (2**24 + 1)), "prompt: expected at most 16777216 characters"),
    ):
        monkeypatch.setattr(sys, "stdin", text)
        refused(capsys, *generate, said=said)
    monkeypatch.undo()
    refused(capsys, "generate", "caf\udce9", said="character 3 is no utf-8")  # as an argument
    refused(
        capsys, "generate", "cafe", "--suffix", "\udce9", said="--suffix: character 0 is no utf-8"
    )


def test_names_with_brackets_are_no_markup(tmp_path, capsys):
    folder = write_chat_model(tmp_path / "[red]a[/b] :smile: $\\frac$")
    written = tmp_path / "b[1].json"
    bench = ["bench", "--prompt-length", "4", "--gen-length", "4", "--rounds", "1", "--batch", "1"]
    bench += ["--steps", "4", "--model", str(folder), "--json", str(written)]
    for command in (bench, ["bench", "--from", str(written)]):
        assert main([*command, "--plot", str(tmp_path / "p[1].png")]) == 0
        said = "".join(capsys.readouterr().out.split())  # the title may be broken anywhere
        assert "[red]a[/b]:smile:$\\frac$" in said
        assert (tmp_path / "p[1].png").read_bytes().startswith(b"\x89PNG")


# --- as a process -----------------------------------------------------------------------------


class Gone(io.StringIO):
    """Standard output whose reader goes away after the first characters."""

    def write(self, text: str) -> int:
        if self.tell() + len(text) > 40:
            raise BrokenPipeError
        return super().write(text)


@pytest.mark.parametrize("options", [(), ("--live",), ("--json",)])
def test_a_reader_that_goes_away(chat, capsys, monkeypatch, options):
    monkeypatch.setattr(sys, "stdout", Gone())
    assert main(["generate", PROMPT, "--model", str(chat), *SHORT, *options]) == 141
    assert capsys.readouterr().err == ""


@pytest.fixture
def signals() -> Iterator[None]:
    """Give the signals back that `run_process` takes."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_a_terminal_cannot_show(chat, monkeypatch, signals):
    """What an encoding lacks is written as an escape, and masks are underscores."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    prepare_process()
    for command in ("generate", "bench", "profile", "eval", "convert"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
    options = ("--live", "--frame-seconds", "0")
    assert main(["generate", PROMPT, "--model", str(chat), *SHORT, *options]) == 0
    text = written.getvalue().decode()
    assert words(direct().sequences[0].tolist()) in " ".join(text.split())
    assert "the Fr\\xe9chet bound" in " ".join(text.split())


def test_a_full_disk(chat, capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["generate", PROMPT, "--model", str(chat), *SHORT]) == 2
    assert capsys.readouterr().err == "dsb: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_half_written_folder(
    chat, tmp_path, capsys, monkeypatch, signals, number
):
    class Killed(io.StringIO):
        def write(self, text: str) -> int:
            if "writing" in text:  # the copy's folder is there, and the tokenizer in it
                assert [path.name for path in (tmp_path / "new").iterdir()] != []
                signal.raise_signal(number)
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Killed())
    for each in ENDING:  # whoever runs the tests may ignore one
        signal.signal(each, signal.SIG_DFL)
    prepare_process()
    with pytest.raises(SystemExit, match=str(128 + number)):
        main(["convert", str(chat), str(tmp_path / "new/copy")])
    assert "Traceback" not in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ENDING)
def test_a_second_signal_does_not_disturb_the_end(signals, number):
    cleaned = []

    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            for other in (number, *ENDING, signal.SIGINT):
                signal.raise_signal(other)
            cleaned.append(True)

    for each in ENDING:
        signal.signal(each, signal.SIG_DFL)
    with pytest.raises(SystemExit, match=str(128 + number)):
        run_process("dsb", work)
    assert cleaned
    for other in (number, *ENDING, signal.SIGINT):  # as in Python's own exit
        signal.raise_signal(other)


def test_a_signal_in_pythons_exit_is_no_exception(signals):
    for each, handler in ((signal.SIGINT, signal.default_int_handler), (ENDING[0], signal.SIG_DFL)):
        signal.signal(each, handler)
    signal.signal(ENDING[1], signal.SIG_IGN)  # as nohup does
    assert run_process("dsb", lambda: 3) == 3
    assert [signal.getsignal(each) for each in (signal.SIGINT, *ENDING)] == [
        signal.SIG_DFL, signal.SIG_DFL, signal.SIG_IGN,
    ]  # fmt: skip


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    commands = ("generate", "batch", "serve", "bench", "profile", "eval", "convert")
    assert all(command in out for command in commands)


def test_processes(chat):
    generate = ("-m", "dsb_runtime", "generate")
    done = python(*generate, "-", "--model", chat, *SHORT, input=PROMPT)
    assert done.stderr == ""
    assert done.stdout.splitlines()[0] == words(direct().sequences[0, 5:].tolist())
    done = python(*generate, "hi", "--model", "nobody/nothing", code=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("dsb: model='nobody/nothing': neither a folder nor a hub id")
