"""refresh_policy="response" against a plain loop over transformers' own forward passes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

import dsb_runtime as dsb
from dsb_kernels.method import Row, source
from tests import golden

SHAPE = {"gen_length": 32, "block_length": 8}


class StaleLayer(DynamicLayer):
    """K and V of every position, of which a forward overwrites those that it computes."""

    first = 0  # position of the coming forward

    def update(self, key_states: Tensor, value_states: Tensor, **options: Any) -> Any:
        if not self.is_initialized:  # the first forward computes every position
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states.clone(), value_states.clone()
        last = self.first + key_states.shape[2]
        self.keys[:, :, self.first : last] = key_states
        self.values[:, :, self.first : last] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2] if self.is_initialized else query_length, 0

    def get_seq_length(self) -> int:
        return 0


@torch.no_grad()
def plain_loop(
    family: str, prompt: torch.Tensor, cache: str, every: int | None, threshold: float
) -> tuple[list[int], list[str]]:
    """Tokens and the kinds of forwards; every refresh is full where `every` is None."""
    model = golden.model(family)
    shift, first_only = model.dsb.family.shift, model.dsb.family.refresh_commit == "first"
    row = Row(
        len(prompt), 32, 8, cache=cache, prefix_window=model.dsb.family.prefix_window,
        value=threshold, refresh_commit="first" if first_only else "select",
        min_prefix=int(shift and not first_only), full_every=every or 1,
    )  # fmt: skip
    canvas = torch.cat([prompt, prompt.new_full((32,), model.dsb.mask_id)])
    names = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    cache_argument = "cache" if "cache" in names else "past_key_values"  # before transformers 5.23
    stored = Cache(layers=[StaleLayer() for _ in range(model.config.num_hidden_layers)])
    kinds: list[str] = []
    while not row.done:
        kinds.append(row.next_kind)
        first, last = row.computed(shift)
        for layer in stored.layers:
            layer.first = first
        logits = model(
            canvas[None, first:last], position_ids=torch.arange(first, last)[None],
            use_cache=True, **{cache_argument: stored},
        ).logits[0]  # fmt: skip
        candidates = row.candidates()
        scores = logits[[source(i, shift) - first for i in candidates]].double().softmax(-1)
        allowed = scores.clone()
        allowed[:, model.dsb.mask_id] = -1
        tokens = allowed.argmax(-1)
        confidences = scores.gather(1, tokens[:, None])[:, 0].tolist()
        for i in row.advance([7] * len(candidates), confidences):
            canvas[i] = tokens[candidates.index(i)]
    return canvas.tolist(), kinds


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("cache", ["dsb", "dual"])
@pytest.mark.parametrize("every", [None, 2, 3, 100])
def test_equals_the_plain_loop(family, cache, every):
    policy = {} if every is None else {"refresh_policy": "response", "full_refresh_every": every}
    for prompt in golden.prompts(3):
        expected, kinds = plain_loop(family, prompt, cache, every, 0.5)
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
