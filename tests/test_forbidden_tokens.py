"""Tokens that may not be proposed: `banned_tokens`, and EOS before `min_new_tokens`."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dsb_runtime as dsb
from dsb_kernels.score import CONFIDENCES
from dsb_runtime.engine.engine import Engine
from dsb_runtime.engine.sampling import ban_of, propose
from dsb_runtime.families import DREAM, LLADA, DiffusionInfo
from tests import golden
from tests.golden import biased_to_eos, refusal
from tests.mutations import kernels
from tests.plain_loop import plain_loop
from tests.test_infill import CACHES, MASK, RULES, SCHEDULES, blanks, settings_of

(PROMPT,) = golden.prompts(1)
SHAPE: dict[str, Any] = {"gen_length": 24, "block_length": 8, "threshold": 0.5}


def response(out: dsb.GenerationOutput, length: int = 24) -> list[int]:
    return out.sequences[0, -length:].tolist()


@functools.cache
def usual(family: str, count: int = 3) -> tuple[int, ...]:
    """The tokens that the model proposes first, so that a ban changes much."""
    return tuple(
        dict.fromkeys(response(dsb.generate(golden.model(family), PROMPT[None], **SHAPE)))
    )[:count]


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(golden.FAMILIES),
    way=st.sampled_from(list(itertools.product(SCHEDULES, CACHES, RULES))),
    share=st.sampled_from([0.3, 1.0]),
    min_new_tokens=st.integers(0, 6),
    stop=st.booleans(),
    cfg_scale=st.sampled_from([0.0, 0.0, 1.5]),
    seed=st.integers(0, 99),
)
def test_every_way_equals_the_plain_loop(family, way, share, min_new_tokens, stop, cfg_scale, seed):
    """Masks anywhere: the response begins at the first of them, and so does the count."""
    (schedule, top), cache, (rule, value) = way
    ids = blanks(family, 18, seed, share, suffix=2)
    masks = (ids == MASK[family]).nonzero()
    earliest = min(min_new_tokens, int(masks[-1] + 1 - masks[0]))
    ours, method = settings_of(schedule, top, cache, rule, value, ids, MASK[family])
    with biased_to_eos(family) as model:
        out = dsb.infill(
            model, ids[None], banned_tokens=usual(family), min_new_tokens=earliest,
            stop_at_eos=stop, cfg_scale=cfg_scale, **ours,
        )  # fmt: skip
        expected, kinds = plain_loop(
            family, ids, usual(family), earliest, cfg_scale, stop_at_eos=stop, **method
        )
    assert out.sequences[0].tolist() == expected and out.nfe == len(kinds)
    filled = out.sequences[0, ids == MASK[family]].tolist()
    assert not {*filled} & {*usual(family)}


def test_no_eos_before_so_many_tokens_and_one_right_after():
    with biased_to_eos("llada") as model:
        short = dsb.generate(model, PROMPT[None], **SHAPE)
        assert short.row_tokens[0] < 12, "the answer must end early, or this shows nothing"
        later = dsb.generate(model, PROMPT[None], min_new_tokens=12, **SHAPE)
        assert 12 < later.row_tokens[0] < 24
        whole = dsb.generate(model, PROMPT[None], min_new_tokens=24, **SHAPE)
        assert not {*response(whole)} & {*model.dsb.eos_ids} and whole.row_tokens == [24]


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_rows_of_a_batch_are_what_they_are_alone(family):
    with biased_to_eos(family) as model:
        golden.check_batch(
            functools.partial(dsb.generate, model), functools.partial(dsb.generate, model),
            golden.prompts(3), banned_tokens=usual(family), min_new_tokens=9, **SHAPE,
        )  # fmt: skip


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8}])
def test_a_hook_that_bans_does_the_same(family, sampling):
    """A hook on the LM head makes logits -inf, as a processor of transformers does. There are more
    banned tokens than any kernel has branches for."""
    model, banned = golden.model(family), (*usual(family), *range(100, 400))

    def ban(head: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor(banned), -torch.inf)

    generate = functools.partial(dsb.generate, input_ids=PROMPT[None], **SHAPE, **sampling)
    seeded = torch.Generator().manual_seed
    out = generate(model, banned_tokens=banned, generator=seeded(1))
    assert not {*response(out)} & {*banned}
    handle = model.lm_head.register_forward_hook(ban)
    try:
        hooked = generate(model, generator=seeded(1))
        both = generate(model, generator=seeded(1), banned_tokens=banned[:5])
    finally:
        handle.remove()
    assert torch.equal(out.sequences, hooked.sequences) and out.nfe == hooked.nfe
    assert torch.equal(out.sequences, both.sequences)


class Plainly(nn.Module):
    """A head that is called, since it is no linear layer."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.inner = head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden)


@pytest.mark.parametrize("family", [LLADA, DREAM], ids=lambda family: family.name)
@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_every_road_scores_the_distribution_without_the_tokens(family, confidence, temperature):
    """The LM head's op, a head that is called, logits, and Dream's cuts, against logits that are
    -inf from the beginning. EOS is the most likely token, and the next one is banned."""
    head = nn.Linear(12, 40)
    head.bias.data[[7, 8, 9]] += torch.tensor([6.0, 5.0, 3.0])
    hidden = torch.randn(11, 12, generator=torch.Generator().manual_seed(3))
    info, early = DiffusionInfo(family, 39, (7, 38)), torch.arange(11) % 3 == 0
    config = dsb.DecodingConfig(
        gen_length=16, block_length=8, steps=4, temperature=temperature, confidence=confidence,
        banned_tokens=[8, 20, 8], top_k=30 if family is DREAM and temperature else None,
    )  # fmt: skip
    draws = {"seed": torch.tensor(5), "noise_ids": torch.arange(11)}
    eligible = torch.ones(11, dtype=torch.bool)
    how: dict[str, Any] = {"eligible": eligible, "config": config, "info": info, **draws}
    logits = head(hidden).detach()
    logits[:, [8, 20]] = -torch.inf
    logits[early[:, None] & torch.isin(torch.arange(40), torch.tensor(info.eos_ids))] = -torch.inf
    expected_token, expected = propose(logits, None, **how)
    ban = ban_of(config, 40, hidden)
    with torch.no_grad():
        kept = head(hidden)
        for scored, by in ((hidden, head), (hidden, Plainly(head)), (kept, None)):
            token, c = propose(scored, by, **how, ban=ban, early=early)
            assert token.tolist() == expected_token.tolist()
            torch.testing.assert_close(c, expected)
        assert torch.equal(kept, head(hidden)), "a hook may keep the logits"
    assert not {8, 20, 39} & {*expected_token.tolist()}


@pytest.mark.slow
def test_kernels_propose_the_same():
    generate = functools.partial(
        dsb.generate, golden.model("llada"), PROMPT[None], gen_length=10, block_length=10, steps=2,
        banned_tokens=usual("llada"), min_new_tokens=4,
    )  # fmt: skip
    expected = generate()
    with kernels():
        assert torch.equal(generate().sequences, expected.sequences)


def test_captured_steps_know_their_ban():
    """Calls with other tokens take turns in one engine whose steps are captured."""
    engine = Engine(golden.model("llada"), capture=lambda run: run)
    for banned in ((), usual("llada"), usual("llada", 1), ()):
        out = engine.generate(PROMPT[None], banned_tokens=banned, **SHAPE)
        expected = dsb.generate(golden.model("llada"), PROMPT[None], banned_tokens=banned, **SHAPE)
        assert torch.equal(out.sequences, expected.sequences)


def test_what_is_recorded_is_the_models_own():
    """A log-probability is that of the model's distribution, with the banned tokens in it."""
    model, banned = golden.model("llada"), usual("llada")
    how = {"gen_length": 1, "block_length": 1, "banned_tokens": banned}
    out = dsb.generate(model, PROMPT[None], record=True, **how)
    with torch.no_grad():
        ids = torch.cat([PROMPT, torch.tensor([model.dsb.mask_id])])[None]
        own = model(ids).logits[0, -1].log_softmax(-1)
    golden.check_logprobs(out.logprobs[0, 0], own[out.sequences[0, -1]])


def test_bad_input():
    model = golden.model("llada")
    generate = functools.partial(dsb.generate, model, PROMPT[None], **SHAPE)
    with refusal("banned_tokens=5: expected a tuple of token ids", kind=TypeError):
        generate(banned_tokens=5)
    with refusal("banned_tokens='x': expected an int >= 0", kind=TypeError):
        generate(banned_tokens=["x"])
    with refusal("banned_tokens=-1: expected an int >= 0"):
        generate(banned_tokens=(-1,))
    with refusal("banned_tokens has 512: expected ids from 0 to 511"):
        generate(banned_tokens=(512,))
    with refusal("banned_tokens has the mask id 511, which is never proposed"):
        generate(banned_tokens=(3, 511))
    with refusal("banned_tokens has 511 ids of 512: no token is left"):
        generate(banned_tokens=tuple(range(511)))
    with refusal("min_new_tokens=25: expected an int from 0 to 24 (at most gen_length)"):
        generate(min_new_tokens=25)
    with refusal("min_new_tokens=True", kind=TypeError):
        generate(min_new_tokens=True)
    nameless = dsb.load_model(golden.DATA / "llada", dtype="float32", device="cpu", eos_ids=())
    with refusal("min_new_tokens=4: the model names no EOS id; load it with eos_ids=(...)"):
        dsb.generate(nameless, PROMPT[None], min_new_tokens=4, **SHAPE)
    all_but_eos = tuple(i for i in range(511) if i not in model.dsb.eos_ids)
    with refusal("no token is left"):
        generate(banned_tokens=all_but_eos, min_new_tokens=1)
    assert {*response(generate(banned_tokens=all_but_eos))} == {*model.dsb.eos_ids}
