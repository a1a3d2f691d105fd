"""Bytes that scoring and the linear ops must move, and those that they do, at the models' real
shapes.

The interpreter's loads and stores are counted address by address, with the production launch
geometry. Rows of `token_confidence` share nothing, and vocabulary shares and hidden columns of
`lm_head_confidence` nothing but the hidden rows, so that one row, and one share of an eighth of the
columns, are run and their bytes multiplied. Tiles of features, and the input features of a split,
share no weights either: the linear ops are run for two tiles, or 256 of the input features.
`python -m pytest -s tests/test_traffic.py -m slow` prints the table.

    must      each input once, each output once
    touched   distinct bytes that are read or written at all: what memory has to move
    asked     bytes of all loads of the large input; what exceeds `touched` comes from the caches
    partials  bytes of the states, or of the splits' sums, written once and read once

The splits' sums (N x E x 4 bytes each, see `tuning.CONFIGS`) are counted as if they went to memory.
Up to 32 rows all is within 1.1 of what must move. From 64 rows on the sums of the output projection
are more than that; they are at most 8.4 MB at a time, which stay in the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from dsb_kernels import _configs as tuning
from dsb_kernels import linear_add_norm as add_norm
from dsb_kernels import lm_head
from dsb_kernels import window_linear as window
from dsb_kernels.token_confidence import launch_of, token_confidence
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
    launch = lm_head.launch_of(rows, V, torch.float16, "sm_90", sample=False)
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


# Name, output and input features, gated.
LINEARS = {
    "LLaDA-8B": [("qkv", 12288, 4096, False), ("gate_up", 12288, 4096, True)],
    "iLLaDA-8B": [("qkv", 6144, 4096, False), ("gate_up", 12288, 4096, True)],
    "Dream-7B": [("qkv", 4608, 3584, False), ("gate_up", 18944, 3584, True)],
}
ADDED = {
    "LLaDA-8B": [("out", 4096, 4096), ("down", 4096, 12288)],
    "Dream-7B": [("out", 3584, 3584), ("down", 3584, 18944)],
}
COLUMNS = 256  # input features that are run


def window_linear_traffic(model: str, rows: int, name: str, F: int, E: int, gated: bool) -> Scoring:
    """Two of the tiles of features."""
    launch = window.launch_of(rows, F, torch.float16, "sm_90", gated=gated)
    share = 2 * launch.blocks["BLOCK_V"] / F
    assert 1 / share * 2 == launch.grid[0]  # nothing ragged: every tile is like these
    x = torch.zeros(rows, COLUMNS, dtype=torch.float16)
    weight = torch.zeros(round(F * share) * (2 if gated else 1), COLUMNS, dtype=torch.float16)
    parts = E // COLUMNS
    with counted() as traffic:
        out = window.window_linear(x, weight, gated=gated)
    assert traffic.asked_elsewhere(x, weight, out) == 0
    assert traffic.touched(x) == x.nbytes < L2_BYTES / 2  # once from memory
    assert traffic.asked(out) == out.nbytes  # every element written, once
    return Scoring(
        name=f"window_linear {model} {name} {rows} rows",
        must=round((weight.nbytes * parts + out.nbytes) / share) + x.nbytes * parts,
        touched=round((traffic.touched(weight) * parts + traffic.touched(out)) / share)
        + traffic.touched(x) * parts,
        asked=round(traffic.asked(weight) * parts / share),
        partials=0,
    )


def linear_add_norm_traffic(model: str, rows: int, name: str, E: int, F: int) -> Scoring:
    """All output features, with the splits of the whole."""
    launch = add_norm.launch_of(rows, E, F, torch.float16, "sm_90")
    splits = launch.grid[1]
    assert splits * launch.share == F
    x, weight = (torch.zeros(n, COLUMNS, dtype=torch.float16) for n in (rows, E))
    parts = F // COLUMNS
    residual, gain = torch.zeros(rows, E, dtype=torch.float16), torch.ones(E, dtype=torch.float16)
    assert add_norm.launch_of(rows, E, COLUMNS, torch.float16, "sm_90").grid[1] == splits
    with counted() as traffic:
        out = add_norm.linear_add_norm(x, weight, residual, gain, 1e-5)
    named = (x, weight, residual, gain, out)
    partials = traffic.asked_elsewhere(*named)
    assert partials == 2 * splits * rows * E * 4
    assert traffic.asked(residual) == 2 * residual.nbytes and traffic.asked(out) == out.nbytes
    small = traffic.touched(residual) + traffic.touched(gain) + traffic.touched(out)
    return Scoring(
        name=f"linear_add_norm {model} {name} {rows} rows",
        must=(weight.nbytes + x.nbytes) * parts + 3 * residual.nbytes + gain.nbytes,
        touched=(traffic.touched(weight) + traffic.touched(x)) * parts + small,
        asked=traffic.asked(weight) * parts,
        partials=partials,
    )


def linear_traffic(model: str, rows: int) -> list[Scoring]:
    found = [window_linear_traffic(model, rows, *linear) for linear in LINEARS[model]]
    return found + [linear_add_norm_traffic(model, rows, *shape) for shape in ADDED.get(model, ())]


def check_linear(found: Scoring, rows: int) -> None:
    if rows <= 32 or not found.partials:
        found.check()
    else:
        assert found.touched <= 1.1 * found.must and found.asked <= 1.1 * found.must
        assert found.partials / 2 < 10e6 < L2_BYTES / 4


def test_linear_layers_read_every_weight_once():
    for linear in LINEARS["LLaDA-8B"]:
        check_linear(window_linear_traffic("LLaDA-8B", 32, *linear), 32)
    check_linear(linear_add_norm_traffic("Dream-7B", 32, *ADDED["Dream-7B"][0]), 32)


@pytest.mark.slow
def test_linear_table():
    print(f"\n{'':46} {'must MB':>8} {'touched':>8} {'asked':>8} partials")
    for model in LINEARS:
        for rows in (16, 32, 64, 128):
            for found in linear_traffic(model, rows):
                print(found.line(), f"{(found.touched + found.partials) / found.must:.3f}")
                check_linear(found, rows)


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
