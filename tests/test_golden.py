"""The runtime against trajectories of the authors' published code, token for token."""

import pytest
import torch
from safetensors.torch import load_file

import dsb_runtime as dsb
from tests import golden

CASES = [(f, i) for f in golden.FAMILIES for i in range(len(golden.cases(f)))]


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_forward_reproduces_the_published_logits(family):
    reference = load_file(golden.DATA / family / "forward.safetensors")
    with torch.no_grad():
        logits = golden.model(family)(reference["input_ids"][None]).logits[0]
    assert (logits - reference["logits"]).abs().max() < 1e-4


@pytest.mark.parametrize(("family", "index"), CASES)
def test_trajectory(family, index):
    case = golden.cases(family)[index]
    prompt = torch.tensor([case["prompt"]])
    out = dsb.generate(golden.model(family), prompt, **golden.settings(case))
    assert out.sequences[0].tolist() == case["sequence"]
    assert sum(out.tokens_per_forward) == case["gen_length"]
    if case["nfe"] is not None:
        assert out.nfe == case["nfe"]
    if case.get("tokens_per_forward") is not None:
        assert out.tokens_per_forward == case["tokens_per_forward"]


def test_every_method_and_rule_is_covered():
    seen = {(f, c["method"], c["rule"]) for f in golden.FAMILIES for c in golden.cases(f)}
    assert len(seen) == 18
