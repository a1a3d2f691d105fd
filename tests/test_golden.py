"""The runtime against trajectories of the authors' published code, token for token."""

import pytest
import torch
from safetensors.torch import load_file

from tests import golden


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_forward_reproduces_the_published_logits(family):
    reference = load_file(golden.DATA / family / "forward.safetensors")
    with torch.no_grad():
        logits = golden.model(family)(reference["input_ids"][None]).logits[0]
    assert (logits - reference["logits"]).abs().max() < 1e-4


@pytest.mark.parametrize(("family", "index"), golden.CASES)
def test_trajectory(family, index):
    golden.check_trajectory(golden.generate_of(family), family, index)


def test_every_method_and_rule_is_covered():
    seen = {(f, c["method"], c["rule"]) for f in golden.FAMILIES for c in golden.cases(f)}
    assert len(seen) == 18
