"""generate: caches against no cache, batches against singles, seeds, EOS, events."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dsb_runtime as dsb
from dsb_runtime.engine.output import until_eos
from tests import golden
from tests.golden import biased_to_eos, prompts

SCHEDULES = [("naive", None), ("dsb", 8), ("dsb", None)]
CACHES = ["none", "dual", "dsb"]
RULES = [
    {"threshold": 0.6}, {"factor": 1.0}, {"frechet": 0.0}, {"steps": 12}, {"entropy": 2.0},
    {"eb": 1.0}, {"threshold": 0.6, "progress": 0.5},
]  # fmt: skip
MATRIX = list(itertools.product(golden.FAMILIES, SCHEDULES, CACHES, RULES))


@pytest.mark.parametrize(("family", "schedule", "cache", "rule"), MATRIX)
def test_batch_rows_equal_single_runs(family, schedule, cache, rule):
    generate = golden.generate_of(family)
    batch = golden.check_batch(
        generate, generate, prompts(3), gen_length=24, block_length=8, schedule=schedule[0],
        max_block_length=schedule[1], cache=cache, **rule,
    )  # fmt: skip
    assert sum(batch.tokens_per_forward) == 3 * 24


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("rule", RULES)
def test_window_over_everything_equals_no_cache(family, rule):
    """A prefix window back to position 0 and a block to the end recompute every row."""
    decode = functools.partial(
        dsb.generate, golden.model(family), prompts(2)[1][None], gen_length=16, block_length=16
    )
    cached = decode(cache="dsb", prefix_window=1000, refresh_commit="select", **rule)
    plain = decode(cache="none", **rule)
    assert cached.sequences.tolist() == plain.sequences.tolist()
    assert cached.tokens_per_forward == plain.tokens_per_forward


@settings(max_examples=25, deadline=None)
@given(case=st.sampled_from(MATRIX), gen=st.integers(8, 20), seed=st.integers(0, 99))
def test_everything_is_committed_once(case, gen, seed):
    family, (schedule, top), cache, rule = case
    assume("steps" not in rule)
    seen: set[int] = set()
    edges = [(0, 0)]

    def watch(event: dsb.StepEvent) -> None:
        picked = event.position[0][event.commit[0]].tolist()
        assert picked and not seen & set(picked)
        seen.update(picked)
        start, end, _ = event.before[0]
        assert all(start <= p < end for p in picked)
        assert start >= edges[-1][0] and end >= edges[-1][1]
        edges.append((start, end))

    prompt = prompts(1, seed=seed)[0]
    out = dsb.generate(
        golden.model(family), prompt[None], gen_length=gen, block_length=8, schedule=schedule,
        max_block_length=top, cache=cache, stop_at_eos=False, on_step=watch, **rule,
    )  # fmt: skip
    assert seen == set(range(len(prompt), len(prompt) + gen))
    assert out.nfe <= gen
    assert not (out.sequences == golden.model(family).dsb.mask_id).any()


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("cache", CACHES)
def test_stop_at_eos_changes_nothing_before_the_eos(family, cache):
    config = {"gen_length": 32, "block_length": 8, "cache": cache, "threshold": 0.5}
    ended = 0
    with biased_to_eos(family) as model:
        for prompt in prompts(6, seed=3):
            whole, short = (
                dsb.generate(model, prompt[None], stop_at_eos=stop, **config)
                for stop in (False, True)
            )
            length = whole.row_tokens[0]
            expected = whole.sequences.clone()
            expected[0, len(prompt) + length :] = model.dsb.eos_ids[0]
            assert torch.equal(short.sequences, expected)
            assert short.row_tokens == whole.row_tokens
            assert whole.tokens_per_forward[: short.nfe] == short.tokens_per_forward
            ended += short.nfe < whole.nfe
    assert ended, "at least one run must end early, or this shows nothing"


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_stop_at_eos_in_a_batch(family):
    settings = {"gen_length": 32, "block_length": 8, "threshold": 0.5, "stop_at_eos": True}
    with biased_to_eos(family):
        generate = golden.generate_of(family)
        batch = golden.check_batch(generate, generate, prompts(6, seed=3), **settings)
    assert len(set(batch.row_nfe)) > 1, "rows must end at different times, or this shows nothing"


def test_counting_rule():
    response = torch.tensor([[5, 6, 1, 7], [1, 1, 1, 1], [5, 6, 7, 8], [5, 6, 7, 1]])
    every = torch.ones_like(response, dtype=torch.bool)
    assert until_eos(response, every, (1,)).sum(-1).tolist() == [3, 1, 4, 4]
    assert until_eos(response, every, (9, 7)).sum(-1).tolist() == [4, 4, 3, 3]
    assert until_eos(response, every, ()).sum(-1).tolist() == [4, 4, 4, 4]
    some = torch.tensor(
        [[False, True, False, True]] * 4
    )  # the EOS before the first mask counts not
    assert until_eos(response, some, (1,)).sum(-1).tolist() == [1, 1, 2, 2]


def test_the_prompt_may_be_int32_and_is_not_written_to():
    model, prompt = golden.model("llada"), prompts(1)[0][None]
    ids = prompt.int()
    out = dsb.generate(model, ids, gen_length=8, block_length=4)
    assert out.sequences.dtype == torch.int64 and torch.equal(ids, prompt)
    expected = dsb.generate(model, prompt, gen_length=8, block_length=4)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(prompt, prompts(1)[0][None])


def test_on_step_must_be_callable():
    with pytest.raises(TypeError, match="on_step=3"):
        dsb.generate(golden.model("llada"), prompts(1)[0][None], on_step=3)
