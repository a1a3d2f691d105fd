"""Classifier-free guidance through every road. That its tokens equal those of a loop over the
model's own forward, with every schedule, rule and cache, is a property in `test_infill.py`."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch

import dsb_runtime as dsb
from dsb_runtime.engine.engine import Engine
from tests import golden
from tests.golden import biased_to_eos, prompts
from tests.mutations import kernels
from tests.plain_loop import plain_loop
from tests.recorded import Recorder

SHAPE = {"gen_length": 16, "block_length": 8, "cfg_scale": 1.5}
CACHES = ["none", "dual", "dsb"]


@pytest.mark.parametrize(("family", "cache"), list(itertools.product(golden.FAMILIES, CACHES)))
def test_rows_of_a_batch_are_what_they_are_alone(family, cache):
    generate = functools.partial(dsb.generate, golden.model(family), threshold=0.5, cache=cache)
    golden.check_batch(generate, generate, prompts(3), **SHAPE)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_a_hooked_model_and_replayed_steps_decode_the_same(family):
    model, (prompt,) = golden.model(family), prompts(1)
    ids = torch.cat([prompt, prompt.new_full((16,), model.dsb.mask_id)])
    how = {"block_length": 8, "schedule": "dsb", "cache": "dsb"}
    expected, _ = plain_loop(family, ids, cfg_scale=1.5, rule="threshold", value=0.5, **how)
    plain, _ = plain_loop(family, ids, rule="threshold", value=0.5, **how)
    assert expected != plain, "guidance must change a token, or this shows nothing"
    recorder = Recorder()
    replayed = Engine(model, capture=recorder).generate(prompt[None], threshold=0.5, **SHAPE)
    assert replayed.sequences[0].tolist() == expected and recorder.replays
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    try:
        called = dsb.generate(model, prompt[None], threshold=0.5, **SHAPE)
    finally:
        hook.remove()
    assert called.sequences[0].tolist() == expected


def test_nan_of_both_runs_are_forgotten():
    """The next call has padding where they were, and an attention that is called masks it only."""
    model = copy.deepcopy(golden.model("llada"))
    model.model.layers[0].register_forward_hook(lambda *_: None)
    engine, weight = Engine(model), model.model.layers[0].self_attn.v_proj.weight.data
    ids, mask = golden.left_pad([prompts(1)[0], prompts(1)[0][:3]])
    expected, own = engine.generate(ids, attention_mask=mask, **SHAPE), weight.clone()
    weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        engine.generate(ids, **SHAPE)
    weight.copy_(own)
    again = engine.generate(ids, attention_mask=mask, **SHAPE)
    assert torch.equal(again.sequences, expected.sequences)


def test_sampling_cuts_and_an_eos_see_the_guided_logits():
    """A cut to one token is greedy, and the recorded probability is that of the guided logits."""
    ids = prompts(1)[0][None]
    generate = functools.partial(dsb.generate, golden.model("dream"), ids, **SHAPE)
    greedy, cut = (generate(steps=1, cache="none", **how).sequences
                   for how in ({}, {"temperature": 0.7, "top_k": 1}))  # fmt: skip
    assert torch.equal(greedy, cut)
    recorded = generate(threshold=0.99, record=True)
    seen = {}

    def watch(event):
        for i, done, c in zip(event.position[0], event.commit[0], event.confidence[0], strict=True):
            if done:
                seen[int(i) - ids.shape[1]] = c.log()

    generate(threshold=0.99, on_step=watch)
    logprobs = torch.stack([seen[i] for i in range(16)])
    golden.check_logprobs(recorded.logprobs[0], logprobs)
    with biased_to_eos("llada") as model:
        out = dsb.generate(model, prompts(1, seed=3)[0][None], stop_at_eos=True, **SHAPE)
        end = out.row_tokens[0]
        assert end < 16 and set(out.sequences[0, -(16 - end) :].tolist()) == {model.dsb.eos_ids[0]}


@pytest.mark.slow
def test_kernels_decode_the_same():
    ids, mask = golden.left_pad([prompts(1)[0], prompts(1)[0][:3]])
    how = {"gen_length": 2, "block_length": 2, "threshold": 1.0, "cfg_scale": 1.5}
    how["attention_mask"] = mask
    expected = dsb.generate(golden.model("llada"), ids, **how)
    with kernels():
        actual = dsb.generate(golden.model("llada"), ids, **how)
    assert torch.equal(actual.sequences, expected.sequences)
