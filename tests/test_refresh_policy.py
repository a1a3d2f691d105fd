"""refresh_policy="response" against a plain loop over transformers' own forward passes."""

from __future__ import annotations

import pytest
import torch

import dsb_runtime as dsb
from tests import golden
from tests.plain_loop import plain_loop

SHAPE = {"gen_length": 32, "block_length": 8}


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("cache", ["dsb", "dual"])
@pytest.mark.parametrize("every", [None, 2, 3, 100])
def test_equals_the_plain_loop(family, cache, every):
    policy = {} if every is None else {"refresh_policy": "response", "full_refresh_every": every}
    for prompt in golden.prompts(3):
        masks = prompt.new_full((SHAPE["gen_length"],), golden.model(family).dsb.mask_id)
        expected, kinds = plain_loop(
            family, torch.cat([prompt, masks]), block_length=8, cache=cache, value=0.5,
            full_every=every or 1,
        )  # fmt: skip
        seen: list[str] = []
        out = dsb.generate(
            golden.model(family), prompt[None], cache=cache, threshold=0.5,
            on_step=lambda e, seen=seen: seen.append(e.kind), **SHAPE, **policy,
        )  # fmt: skip
        assert out.sequences[0].tolist() == expected
        assert seen == kinds
        assert ("response" in seen) == (every is not None)


def test_the_default_is_a_full_refresh_in_four():
    kinds: list[str] = []
    dsb.generate(
        golden.model("llada"), golden.prompts(1)[0][None], gen_length=40, block_length=4, steps=40,
        refresh_policy="response", on_step=lambda e: kinds.append(e.kind),
    )  # fmt: skip
    refreshes = [k for k in kinds if k != "window"]
    assert refreshes[:8] == ["refresh", *["response"] * 3] * 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"refresh_policy": "none"}, "refresh_policy='none'"),
        ({"refresh_policy": "response", "cache": "none"}, "refresh_policy='response'"),
        ({"full_refresh_every": 3}, "full_refresh_every=3"),
        ({"refresh_policy": "response", "full_refresh_every": 1}, "full_refresh_every=1"),
    ],
)
def test_bad_settings(settings, named):
    with pytest.raises(ValueError, match=named):
        dsb.DecodingConfig(**settings)
