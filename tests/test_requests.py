"""`dsb bench --requests`: prompts that arrive over time, by continuous and by static batching."""

from __future__ import annotations

import json

import pytest

from dsb_runtime.cli.main import main
from dsb_runtime.measure.requests import Run

SHORT = ("--rounds", "1", "--max-rows", "3", "--gen-length", "16", "--block-length", "8")


def test_word_problems_are_answered_by_both_ways(tmp_path, capsys):
    """Both ways must give the same tokens, or the command fails."""
    path, picture = tmp_path / "r.json", tmp_path / "rows.png"
    words = ["bench", "--requests", "7", "--rounds", "1", "--max-rows", "3"]
    assert main([*words, "--json", str(path), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "7 requests at once" in printed and "continuous over static" in printed
    record = json.loads(path.read_text())
    for way in (record["continuous"], record["static"]):
        assert way["tokens"] == record["static"]["tokens"] > 7
        assert 1 <= way["mean_rows"] <= 3 >= max(rows for _, rows in way["rows"])
        assert 0 < way["first_median"] <= way["last_median"] <= way["last_p99"] <= way["seconds"]
    assert picture.stat().st_size > 1000
    assert main(["bench", "--from", str(path)]) == 0
    assert capsys.readouterr().out == printed


def test_random_prompts_have_uneven_lengths_and_arrive_over_time(tmp_path, capsys):
    path = tmp_path / "r.json"
    words = [
        "bench",
        "--preset",
        "tiny",
        "--requests",
        "6",
        "--rate",
        "50",
        "--prompt-length",
        "12",
    ]
    assert main([*words, *SHORT, "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["rate"] == 50 and "at 50 a second" in capsys.readouterr().out
    # Each response has its own length, of which all tokens count.
    assert 6 * 4 < record["continuous"]["tokens"] == record["static"]["tokens"] < 6 * 16


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rate", "5"], "--rate: expected it with --requests"),
        (["--max-rows", "5"], "--max-rows: expected it with --requests"),
        (["--requests", "5", "--batch", "2"], "--batch and --requests: expected one of the two"),
        (["--requests", "0"], "--requests=0: expected an int from 1 to 1000000"),
        (["--requests", "2", "--rate", "0"], "--rate=0.0: expected a number in (0, 1e+06]"),
        (["--requests", "2", "--drafts", "1"], "drafts=1: a draft costs"),
    ],
)
def test_wrong_options_are_one_line(words, said, capsys):
    assert main(["bench", *words]) == 2
    assert capsys.readouterr().err.startswith(f"dsb: {said}")


def test_rows_in_use_are_averaged_over_time():
    assert Run(rows=[(0.0, 2), (1.0, 4), (3.0, 0), (4.0, 0)]).mean_rows == (2 + 8) / 4
