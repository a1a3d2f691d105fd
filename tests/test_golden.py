"""The runtime against trajectories of the authors' published code, token for token."""

import pytest

from tests import golden
from tests.checkpoints import error_of


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_forward_reproduces_the_published_logits(family):
    assert error_of(golden.model(family), family) < 1e-4


@pytest.mark.parametrize(("family", "index"), golden.CASES)
def test_trajectory(family, index):
    golden.check_trajectory(golden.generate_of(family), family, index)


def test_every_method_and_rule_is_covered():
    assert {f: len(golden.one_of_each(f)) for f in golden.FAMILIES} == {"llada": 12, "dream": 6}
