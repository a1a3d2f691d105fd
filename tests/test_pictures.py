"""The pictures of the docs are those that their commands draw today: from the kept JSON, and of the
decoding that docs/method.md shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from dsb_runtime.cli import main as cli

TESTED = re.search(r"^matplotlib==(.*)$", Path("constraints.txt").read_text(), re.MULTILINE)[1]
DECODING = re.search(
    r"```\ndsb (generate [^`]*)--trace trace.png", Path("docs/method.md").read_text()
)
COMMANDS = {
    "eval_sudoku": ["eval", "--from", "benchmarks/eval_sudoku.json", "--plot"],
    "bench": ["bench", "--from", "benchmarks/bench_embedded.json", "--plot"],
    "requests": ["bench", "--from", "benchmarks/bench_requests.json", "--plot"],
    "trace": [*shlex.split(DECODING[1].replace("\\\n", "")), "--device", "cpu", "--trace"],
}


@pytest.mark.skipif(
    matplotlib.__version__ != TESTED, reason=f"matplotlib {TESTED} drew the pictures of the docs"
)
@pytest.mark.parametrize("picture", COMMANDS)
def test_a_picture_of_the_docs_is_the_one_drawn_today(picture, tmp_path):
    path = tmp_path / "again.png"
    assert cli.main([*COMMANDS[picture], str(path)]) == 0
    again, kept = (matplotlib.image.imread(p) for p in (path, f"docs/{picture}.png"))
    assert again.shape == kept.shape
    # Another machine may round the edge of a letter otherwise.
    assert (np.abs(again - kept).max(-1) > 0.05).mean() < 0.0001
