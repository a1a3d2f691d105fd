"""A sparse context against a loop over the model's own forward. That `context_masks` does so with
every schedule, rule and cache is a property in `test_infill.py`."""

from __future__ import annotations

import functools
import itertools
import json

import pytest
import torch
from torch import Tensor

import dsb_runtime as dsb
from benchmarks import sparse_context
from dsb_runtime.engine.engine import Engine
from tests import golden
from tests.golden import biased_to_eos, prompts, refusal
from tests.mutations import kernels
from tests.plain_loop import plain_loop
from tests.recorded import Recorder
from tests.test_infill import CACHES, blanks

SHAPE = {"gen_length": 32, "block_length": 4, "context_masks": 3, "threshold": 0.5}


def with_masks(family: str, prompt: Tensor, count: int) -> Tensor:
    return torch.cat([prompt, prompt.new_full((count,), golden.model(family).dsb.mask_id)])


@pytest.mark.parametrize(
    ("family", "cache", "schedule"),
    list(itertools.product(golden.FAMILIES, CACHES, ["naive", "dsb"])),
)
def test_masks_behind_an_eos_are_left_out(family, cache, schedule):
    """Some rows have an EOS with masks to its left, in some of them it is given."""
    how = {"cache": cache, "schedule": schedule, "block_length": 6, "stop_at_eos": True}
    differs = 0
    with biased_to_eos(family) as model:
        for seed, context in itertools.product(range(3), (None, 2)):
            ids = blanks(family, 24, seed)
            ids[15] = model.dsb.eos_ids[0] if seed == 1 else ids[15]
            ours = {"eos_bound": True, "context_masks": context}
            out = dsb.infill(model, ids[None], threshold=0.5, **how, **ours)
            expected, kinds = plain_loop(family, ids, rule="threshold", value=0.5, **how, **ours)
            assert out.sequences[0].tolist() == expected and out.nfe == len(kinds)
            whole = dsb.infill(model, ids[None], threshold=0.5, **how)
            differs += not torch.equal(out.sequences, whole.sequences)
    assert differs, "leaving masks out must change a token, or this shows nothing"


@pytest.mark.parametrize(("family", "cache"), list(itertools.product(golden.FAMILIES, CACHES)))
def test_rows_of_a_batch_are_what_they_are_alone(family, cache):
    with biased_to_eos(family) as model:
        generate = functools.partial(
            dsb.generate, model, stop_at_eos=True, eos_bound=True, cache=cache
        )
        golden.check_batch(generate, generate, prompts(3), **SHAPE)


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_a_hooked_model_and_replayed_steps_decode_the_same(family, cfg_scale):
    model, (prompt,) = golden.model(family), prompts(1)
    how = {**SHAPE, "cfg_scale": cfg_scale, "record": True}
    expected = dsb.generate(model, prompt[None], **how)
    whole = dsb.generate(model, prompt[None], **{**how, "context_masks": None})
    assert not torch.equal(expected.sequences, whole.sequences)
    recorder = Recorder()
    replayed = Engine(model, capture=recorder).generate(prompt[None], **how)
    assert recorder.replays
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    try:
        called = dsb.generate(model, prompt[None], **how)
    finally:
        hook.remove()
    for out in (replayed, called):
        assert torch.equal(out.sequences, expected.sequences) and out.row_nfe == expected.row_nfe
        golden.check_logprobs(out.logprobs, expected.logprobs)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_a_refresh_computes_what_it_sees(family):
    """The prompt, the block, three masks and the last position: the model gets no other tokens."""
    model, (prompt,) = golden.model(family), prompts(1)
    seen: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: seen.append(args[0].shape[1])
    )
    try:
        out = dsb.generate(model, prompt[None], **SHAPE, cache="none")
    finally:
        hook.remove()
    committed = list(itertools.accumulate([0, *out.tokens_per_forward[:-1]]))
    assert seen == [min(len(prompt) + 4 + n + 3 + 1, len(prompt) + 32) for n in committed]


def test_what_cannot_hold_is_refused():
    for settings, said in (
        ({"context_masks": 4, "refresh_policy": "response"}, "a response refresh computes every"),
        ({"eos_bound": True, "stop_at_eos": True, "refresh_policy": "response"}, "expected False"),
        ({"eos_bound": True}, "expected stop_at_eos=True with it"),
        ({"context_masks": -1}, "context_masks=-1: expected an int >= 0"),
    ):
        with refusal(said):
            dsb.DecodingConfig(gen_length=8, block_length=4, **settings)


@pytest.mark.slow
def test_kernels_decode_the_same():
    ids, mask = golden.left_pad([prompts(1)[0], prompts(1)[0][:3]])
    how = {"gen_length": 8, "block_length": 2, "steps": 4, "context_masks": 1}
    how |= {"attention_mask": mask, "stop_at_eos": True, "eos_bound": True}
    expected = dsb.generate(golden.model("llada"), ids, **how)
    with kernels():
        actual = dsb.generate(golden.model("llada"), ids, **how)
    assert torch.equal(actual.sequences, expected.sequences)


def test_its_benchmark_counts_the_positions_that_are_left_out(tmp_path, capsys):
    file = tmp_path / "sparse.json"
    options = ["--problems", "2", "--gen-length", "48", "--cache", "dsb", "--batch", "2"]
    assert sparse_context.main([*options, "--json", str(file)]) == 0
    whole, eight, bound = json.loads(file.read_text())["lines"]
    assert "`context_masks=8` and `eos_bound`" in capsys.readouterr().out
    assert bound["positions"] <= eight["positions"] < whole["positions"]
    assert (whole["exact"], whole["interval"][1]) == (2, 1.0)
