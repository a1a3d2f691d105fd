"""Bytes that the two scoring ops must move, and those that they do, at the models' real shapes.

The interpreter's loads and stores are counted address by address, with the production launch
geometry. Rows of `token_confidence` share nothing, and vocabulary shares and hidden columns of
`lm_head_confidence` nothing but the hidden rows, so that one row, and one share of an eighth of the
columns, are run and their bytes multiplied.
`python -m pytest -s tests/test_traffic.py -m slow` prints the table.

    must      each input once, each output once
    touched   distinct bytes that are read or written at all: what memory has to move
    asked     bytes of all loads of the large input; what exceeds `touched` comes from the caches
    partials  bytes of the states, written once and read once
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from dsb_kernels import lm_head_confidence as lm_head
from dsb_kernels import tuning
from dsb_kernels.confidence import launch_of, token_confidence
from tests.mutations import DEVICE
from tests.test_kernels2_traffic import L2_BYTES, counted

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="counts in the interpreter")
VOCABULARIES = {"LLaDA-8B": 126464, "iLLaDA-8B": 155136, "Dream-7B": 152064}
HIDDEN = {"LLaDA-8B": 4096, "iLLaDA-8B": 4096, "Dream-7B": 3584}


@dataclass
class Scoring:
    """Bytes of one call."""

    name: str
    must: int
    touched: int
    asked: int
    partials: int

    def line(self) -> str:
        return (
            f"{self.name:46} {self.must / 1e6:8.1f} {self.touched / self.must:8.3f} "
            f"{self.asked / self.must:8.3f} {self.partials / 1e6:6.2f} MB"
        )

    def check(self) -> None:
        assert self.touched <= 1.1 * self.must
        assert self.asked + self.partials <= 1.1 * self.must


def token_confidence_traffic(model: str, rows: int, monkeypatch) -> Scoring:
    """One row of `rows`, in their launch configuration."""
    V = VOCABULARIES[model]
    launch = launch_of(rows, V, "sm_90", sample=False)
    config = tuning.Config(launch.blocks, launch.num_warps, launch.num_stages)
    monkeypatch.setitem(tuning.CONFIGS, ("token_confidence", "any"), {1: config})
    logits = torch.zeros(1, V, dtype=torch.float16)
    with counted() as traffic:
        token, c = token_confidence(logits, banned=(V - 128,))
    outputs = traffic.touched(token) + traffic.touched(c)
    partials = traffic.asked_elsewhere(logits, token, c)
    assert partials == 2 * 6 * 4 * launch.grid[1] - 4 * launch.grid[1]  # one plane is not read
    return Scoring(
        name=f"token_confidence {model} {rows} rows",
        must=rows * (V * 2 + 8 + 4),
        touched=rows * (traffic.touched(logits) + outputs + partials),
        asked=rows * (traffic.asked(logits) + outputs),
        partials=rows * partials,
    )


def lm_head_traffic(model: str, rows: int, monkeypatch) -> Scoring:
    """One program's share of the vocabulary; there are as many as its launch has."""
    V, E = VOCABULARIES[model], HIDDEN[model]
    launch = lm_head.launch_of(rows, V, "sm_90", sample=False)
    share, programs = launch.share, launch.grid[0]
    config = tuning.Config(launch.blocks | {"PROGRAMS": 1}, launch.num_warps)
    monkeypatch.setitem(tuning.CONFIGS, ("lm_head_confidence", "any"), {1 << 62: config})
    columns = E // 8
    weight = torch.zeros(share, columns, dtype=torch.float16)
    hidden = torch.zeros(rows, columns, dtype=torch.float16)
    with counted() as traffic:
        token, c = lm_head.lm_head_confidence(hidden, weight)
    outputs = traffic.touched(token) + traffic.touched(c)
    partials = traffic.asked_elsewhere(weight, hidden, token, c)
    assert traffic.touched(hidden) == hidden.nbytes  # once from memory, then from the L2 cache:
    assert hidden.nbytes * 8 + programs * partials < L2_BYTES / 2
    shares, slices = V / share, E // columns  # the last share may be smaller
    partials = round(shares * partials)
    small = hidden.nbytes * slices + outputs + partials
    return Scoring(
        name=f"lm_head_confidence {model} {rows} rows",
        must=V * E * 2 + small - partials,
        touched=round(shares * traffic.touched(weight)) * slices + small,
        asked=round(shares * traffic.asked(weight)) * slices,
        partials=partials,
    )


@pytest.mark.parametrize("rows", [32, 1024])
def test_token_confidence_reads_logits_once(rows, monkeypatch):
    token_confidence_traffic("LLaDA-8B", rows, monkeypatch).check()


def test_ineligible_rows_are_not_read():
    logits = torch.zeros(3, 9000, dtype=torch.float16)
    with counted() as traffic:
        token_confidence(logits, eligible=torch.tensor([True, False, False]))
    assert traffic.touched(logits) == traffic.asked(logits) == 9000 * 2


def test_lm_head_reads_every_weight_once(monkeypatch):
    lm_head_traffic("LLaDA-8B", 32, monkeypatch).check()


@pytest.mark.slow
def test_table(monkeypatch):
    print(f"\n{'':46} {'must MB':>8} {'touched':>8} {'asked':>8} partials")
    for model in VOCABULARIES:
        for rows in (32, 64, 256, 1024):
            found = token_confidence_traffic(model, rows, monkeypatch)
            monkeypatch.undo()
            print(found.line())
            found.check()
    for model in VOCABULARIES:
        for rows in (16, 32, 64, 128):
            found = lm_head_traffic(model, rows, monkeypatch)
            monkeypatch.undo()
            print(found.line())
            found.check()
