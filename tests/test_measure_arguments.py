"""Wrong arguments of the commands that measure: one line on stderr and exit code 2."""

from __future__ import annotations

import copy
import functools
import json
import operator
from pathlib import Path

import pytest
import torch

from benchmarks import decode, roofline
from dsb_runtime.cli import main as cli
from dsb_runtime.config import DecodingConfig
from dsb_runtime.files import sole_writer
from dsb_runtime.measure.scores import Score
from tests.commands import ROOT

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
H100 = "roofline --preset tiny --gpu h100"
WRITTEN = ("--json", "--plot")

# The same option of several commands.
SHARED = [
    *((command, "--seed -1", "--seed=-1: expected an int")
      for command in ("bench", "profile", "eval", "decode")),
    *((command, "--batch 0", "--batch=0: expected an int >= 1") for command in ("profile", "eval")),
    *((command, "--prompt-length 0", "--prompt-length=0") for command in ("bench", "profile")),
    *((command, f"{option} /nowhere/at/all.json", f"{option} /nowhere/at/all.json: no such folder")
      for command in ("bench", "eval", "decode") for option in WRITTEN),
    *((command, f"{option} /", f"{option} /: a folder; expected a file")
      for command, option in (("bench", "--json"), ("profile", "--torch"), (H100, "--json"))),
    *((command, "--plot picture.txt", "--plot picture.txt: expected a file ending in")
      for command in ("bench", "eval", "decode")),
    *((command, f"--from a.json {options}", f"--from and {refused}: nothing is measured; expected")
      for command, options, refused in (
        ("bench", "--json b.json", "--json"), ("eval", "--js b.json", "--json"),
        ("bench", "--batch 1 2 --rounds=5", "--batch, --rounds"), ("bench", "--rate 2", "--rate"),
        ("bench", "--no-stop-at-eos --device cpu", "--device, --stop-at-eos"),
        ("eval", "--limit 500 --quick", "--limit"), ("eval", "--task words", "--task"),
        ("eval", "--seed 0 --gen-length 64", "--gen-length, --seed"))),
    *((command, "--from /nowhere/at/all.json", "--from /nowhere/at/all.json: No such file")
      for command in ("bench", "eval")),
    *((command, "--model /no/such/folder", "expected a checkpoint folder or a hub id")
      for command in ("bench", "profile")),
    *((command, "--from /dev/zero", "--from /dev/zero: expected a JSON file of at most")
      for command in ("bench", "eval")),
    *((command, f"--batch {10**30}", f"{10**30}") for command in ("bench", "profile", "eval",
      "decode", H100)),
    *((command, f"--batch {2**31 - 1}", f"--batch={2**31 - 1}: 132 positions a row and their K/V")
      for command in ("bench --gen-length 4", "profile --gen-length 4")),
    *((command, f"--prompt-length {2**31 - 1}", "positions: expected at most the model's 512")
      for command in ("bench", "profile")),
    *((command, "--tokens-per-forward 40", "--tokens-per-forward 40: expected at most --block, 32")
      for command in ("decode", H100)),
]  # fmt: skip
OWN = [
    ("bench --batch 2 0", "--batch=0: expected an int >= 1"),
    ("bench --prompt-length 500 --gen-length 64", "needs 564 positions"),
    ("bench --rounds 0", "--rounds=0"),
    ("bench --gen-length 8 --block-length 9", "block_length=9"),
    ("bench --top-p 0.5", "top_p=0.5: llada samples"),
    ("bench --json /proc/a.json", "--json /proc/a.json: No such file or directory; expected"),
    ("bench --from /", "--from /: Is a directory; expected a file"),
    ("bench --preset tiny --model x", "--preset and --model: expected one of the two"),
    ("bench --preset tiny --dtype int8", "--dtype int8: expected one of auto, float32"),
    ("profile --profile-steps 0", "--profile-steps=0: expected an int >= 1"),
    ("profile --warmup -1", "--warmup=-1: expected an int >= 0"),
    ("profile --prompt-length 12 --gen-length 24 --block-length 8 --steps 24 --warmup 24",
     "--warmup 24: the decoding has 24 steps; expected at most 23"),
    ("profile --graphs", "the model is not on a CUDA device"),
    ("profile --torch trace.txt", "--torch trace.txt: expected a file ending in .json"),
    ("profile --tor trace.json", "unrecognized arguments: --tor"),
    ("eval --limit 99999999999", "--limit=99999999999: expected an int from 1 to 1000000"),
    ("eval --task chess", "argument --task: invalid choice: 'chess' (choose from"),
    ("eval --gen-length 0", "--gen-length=0: expected an int"),
    ("eval --block-length 4 0", "block_length=0: expected an int from 1 to 64"),
    (f"eval --json {ROOT}/benchmarks/bench_embedded.json",
     "expected what dsb eval --json writes, or a new file"),
    (f"bench --preset tiny --gen-length {2**31 - 1}", "positions: expected at most the model's"),
    (f"{H100} --tflops 1e999", "--tflops: '1e999': expected a number above 0"),
    ("eval --limit 0 --model /asked/before/it/is/read", "--limit=0"),
    ("eval --gen-length 8 --block-length 9", "block_length=9: expected an int from 1 to 8"),
    ("eval --from setup.py", "--from setup.py: expected a JSON file"),
    ("decode --batch 0", "argument --batch: '0': expected an int above 0"),
    ("decode --block 200", "block_length=200: expected an int from 1 to 128"),
    ("decode --no-graphs", "--no-graphs: a CPU has none; expected it with --device cuda"),
    ("decode --prompt 40000", "--prompt 40000: expected at most 32640 before 128"),
    ("decode --against /nope", "--against /nope: expected a checkout with dsb_runtime in it"),
    ("decode --against . --phases", "--against and --phases: expected one of the two"),
    pytest.param("decode --device cuda", "--device cuda: no CUDA device here; expected cpu",
                 marks=NO_GPU),
    ("roofline --preset tiny", "no ceilings: expected --gpu, --bandwidth and --tflops, or --meas"),
    ("roofline --gpu h100", "--preset None: expected one of llada-8b"),
    (f"{H100} --prompt 0", "--prompt: '0': expected an int above 0"),
    (f"{H100} --batch 1.5", "--batch: '1.5': expected an int above 0"),
    ("roofline --preset tiny --bandwidth nan --tflops 1", "'nan': expected a number above 0"),
    ("roofline --preset tiny --tflops 3", "--tflops alone: expected --bandwidth and --tflops"),
    (f"{H100} --dtype float32", "--dtype float32: data sheet figures"),
    (f"{H100} --block 300", "--block 300: expected at most --gen, 256"),
    (f"{H100} --width 2000", "--width 2000: expected at most --prompt + --gen"),
    (f"{H100} --refresh-share 2", "--refresh-share 2: expected a number in"),
    ("roofline --measured /nope.json", "--measured /nope.json: No such file"),
]  # fmt: skip


def run(line: str) -> int | str | None:
    """The exit code of a command line; those of `dsb` are asked for a CPU."""
    command, *options = line.split()
    try:
        if command in ("decode", "roofline"):
            return {"decode": decode, "roofline": roofline}[command].main(options)
        device = () if "--from" in options else ("--device", "cpu")
        return cli.main([command, *device, *options])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("line", "message"),
    [*((f"{command} {options}", message) for command, options, message in SHARED), *OWN],
)
def test_bad_arguments_are_one_line(line, message, capsys):
    assert run(line) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert captured.err.count("\n") == 1
    command = line.split()[0]
    module = command in ("decode", "roofline")
    assert captured.err.startswith(f"python -m benchmarks.{command}: " if module else "dsb")


MEASURED = {"settings": {}, "ceilings": {}, "machine": {"device": ""}, "runs": [{"batch": 1}]}


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        *((c, "{", "expected a JSON file") for c in ("bench --from", "roofline --measured")),
        *((c, "[" * 100_000, "expected a JSON file")
          for c in ("bench --from", "eval --from", "roofline --measured")),
        *(("bench --from", text, "expected what dsb bench --json writes")
          for text in ("[]", '{"batches": []}', '"batches"')),
        *(("eval --from", text, "expected what dsb eval --json writes")
          for text in ("[]", "{}", "3", '[{"rule": "none"}]')),
        *(("roofline --measured", text, "expected the JSON of")
          for text in ("[]", '{"runs": []}', '{"runs": [{"batch": 1}]}')),
        ("roofline --measured", json.dumps(MEASURED), "has no window_step_ms"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_one_line(command, text, message, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert run(f"{command} {path}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_asking_whether_a_file_can_be_written_changes_none(tmp_path: Path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("mine")
    for path in (old, new):
        assert run(f"bench --json {path} --plot picture.txt") == 2
    assert old.read_text() == "mine" and not new.exists()


@pytest.mark.parametrize("command", ["bench", "eval"])
def test_two_commands_do_not_write_one_file(command, tmp_path, capsys):
    path = tmp_path / "scores.json"
    with sole_writer("--json", path):
        assert run(f"{command} --json {path}") == 2
    error = f"dsb: --json {path}: another process writes it; expected one at a time\n"
    assert capsys.readouterr() == ("", error) and not path.exists()


def leaves(value: object, path: tuple = ()) -> list[tuple]:
    """The path of everything in a record; of a list, of what its first entry has."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1])
    paths = []
    for key, item in inside:
        paths.append((*path, key))
        if isinstance(item, (dict, list)):
            paths += leaves(item, (*path, key))
    return paths


@pytest.mark.parametrize("command", ["bench", "eval"])
def test_an_altered_file_is_shown_or_refused_in_one_line(command, tmp_path, capsys):
    record = json.loads((ROOT / "benchmarks/bench_embedded.json").read_text())
    if command == "eval":
        config = DecodingConfig(gen_length=64, progress=0.5)
        scores = [Score(config, 20, exact, 2.5, 30.0).line() for exact in (19, 20)]
        record = {"task": "words", "model": "0", "problems": 20, "seed": 0, "scores": scores}
    refused, path = 0, tmp_path / "x.json"
    for place in leaves(record):
        for value in (None, "[/x]", 10**400, {}):
            altered = copy.deepcopy(record)
            functools.reduce(operator.getitem, place[:-1], altered)[place[-1]] = value
            path.write_text(json.dumps(altered))
            code, error = run(f"{command} --from {path}"), capsys.readouterr().err
            assert (code, error.count("\n")) in ((0, 0), (2, 1)), (place, value)
            refused += code == 2
    assert refused > 20
