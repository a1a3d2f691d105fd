"""The pictures of the docs are those that the commands draw today from the kept JSON."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from dsb_runtime.cli import main as cli

TESTED = re.search(r"^matplotlib==(.*)$", Path("constraints.txt").read_text(), re.MULTILINE)[1]


@pytest.mark.skipif(
    matplotlib.__version__ != TESTED, reason=f"matplotlib {TESTED} drew the pictures of the docs"
)
@pytest.mark.parametrize(
    ("command", "record", "picture"),
    [("eval", "eval_sudoku", "eval_sudoku"), ("bench", "bench_embedded", "bench"),
     ("bench", "bench_requests", "requests")],
)  # fmt: skip
def test_a_picture_of_the_docs_is_the_one_drawn_today(command, record, picture, tmp_path):
    path = tmp_path / "again.png"
    assert cli.main([command, "--from", f"benchmarks/{record}.json", "--plot", str(path)]) == 0
    again, kept = (matplotlib.image.imread(p) for p in (path, f"docs/{picture}.png"))
    assert again.shape == kept.shape
    # Another machine may round the edge of a letter otherwise.
    assert (np.abs(again - kept).max(-1) > 0.05).mean() < 0.0001
