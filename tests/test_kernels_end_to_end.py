"""Golden trajectories with every op of the step run by its Triton kernel."""

from __future__ import annotations

import pytest
import torch

import dsb_runtime as dsb
from tests import golden
from tests.mutations import kernels


def shortest(family: str, method: str, count: int) -> list[int]:
    """The `count` cases of a method with the fewest forwards (the interpreter is slow)."""
    cases = golden.cases(family)
    ours = [i for i, c in enumerate(cases) if c["method"] == method]
    return sorted(ours, key=lambda i: (cases[i]["nfe"] or 99, len(cases[i]["sequence"])))[:count]


QUICK = [("llada", i) for i in shortest("llada", "dsb_cache_greedy", 1)]
METHODS = ["naive", "dual_cache", "dsb_greedy", "dsb_cache_const", "dsb_cache_greedy"]
MORE = [(f, i) for f in golden.FAMILIES for m in METHODS for i in shortest(f, m, 1)]


def check(family: str, index: int) -> None:
    case = golden.cases(family)[index]
    prompt = torch.tensor([case["prompt"]])
    with kernels():
        out = dsb.generate(golden.model(family), prompt, **golden.settings(case))
    assert out.sequences[0].tolist() == case["sequence"]
    assert case["nfe"] in (None, out.nfe)
    assert case.get("tokens_per_forward") in (None, out.tokens_per_forward)


@pytest.mark.parametrize(("family", "index"), QUICK)
def test_trajectory(family, index):
    check(family, index)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "index"), sorted(set(MORE) - set(QUICK)))
def test_more_trajectories(family, index):
    check(family, index)
