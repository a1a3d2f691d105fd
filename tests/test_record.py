"""What is recorded of a decoding: when each token was committed, and how probable it was then."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import dsb_runtime as dsb
from tests import golden
from tests.golden import biased_to_eos, refusal

SHAPE = {"gen_length": 16, "block_length": 8, "threshold": 0.4}


@torch.no_grad()
def replayed(family: str, out: dsb.GenerationOutput, canvas: Tensor, row: int) -> Tensor:
    """The log-probability of each token of a row, by the model's own forward over the canvas as it
    was before the forward that committed the token."""
    model = golden.model(family)
    step_map = torch.full_like(canvas[row], -1)
    step_map[-out.step_map.shape[1] :] = out.step_map[row]
    result = torch.zeros(len(step_map))
    for step in range(int(step_map.max()) + 1):
        before = torch.where(step_map >= step, model.dsb.mask_id, out.sequences[row])
        logits = model(before[None]).logits[0].double()
        if model.dsb.family.shift:
            logits = torch.cat([logits[:1], logits[:-1]])
        now = step_map == step
        tokens = out.sequences[row, now]
        result[now] = logits.log_softmax(-1)[now, tokens].float()
    return result[-out.step_map.shape[1] :]


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("confidence", ["probability", "margin"])
def test_log_probabilities_are_those_of_the_forward_that_committed(family, temperature, confidence):
    ids = torch.stack([golden.prompts(2)[1], golden.prompts(2, seed=4)[1]])
    nucleus = {"top_k": 3} if family == "dream" and temperature else {}
    how = {**SHAPE, "cache": "none", "confidence": confidence, "temperature": temperature}

    def decode(**more) -> dsb.GenerationOutput:
        generator = torch.Generator().manual_seed(5)
        return dsb.generate(
            golden.model(family), ids, generator=generator, **how, **nucleus, **more
        )

    out, plain = decode(record=True), decode()
    assert torch.equal(out.sequences, plain.sequences) and plain.step_map is plain.logprobs is None
    assert out.step_map.dtype == torch.int32 and out.logprobs.dtype == torch.float32
    for row in range(2):
        counts = out.step_map[row].bincount().tolist()
        assert len(counts) == out.row_nfe[row] and min(counts) > 0
        torch.testing.assert_close(
            out.logprobs[row], replayed(family, out, out.sequences, row), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_a_record_says_what_the_events_say(family):
    """With a cache, in a batch whose rows need different steps, and in an engine that captures."""
    ids, mask = golden.left_pad(golden.prompts(3))
    (length,) = {ids.shape[1]}
    expected: dict[tuple[int, int], tuple[int, float]] = {}
    steps = [0] * 3

    def watch(event: dsb.StepEvent) -> None:
        for row in event.rows:
            for k in event.commit[row].nonzero().flatten().tolist():
                where = row, int(event.position[row, k]) - length
                expected[where] = steps[row], float(event.confidence[row, k])
            steps[row] += 1

    how = {**SHAPE, "attention_mask": mask, "record": True, "stop_at_eos": False}
    watched = dsb.generate(golden.model(family), ids, on_step=watch, **how)
    engine = dsb.Engine(golden.model(family), capture=lambda run: run)
    for out in (watched, engine.generate(ids, **how)):
        assert len(expected) == out.step_map.numel()
        for (row, place), (step, probability) in expected.items():
            assert out.step_map[row, place] == step
            assert out.logprobs[row, place].exp() == pytest.approx(probability, abs=1e-5)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_nothing_is_recorded_of_what_was_given_or_follows_the_eos(family):
    with biased_to_eos(family) as model:
        ids, mask = golden.left_pad(golden.prompts(6, seed=3))
        how = {**SHAPE, "gen_length": 32, "attention_mask": mask, "stop_at_eos": True}
        out = dsb.generate(model, ids, **how, record=True)
        assert min(out.row_tokens) < 32
        for row, tokens in enumerate(out.row_tokens):
            assert (out.step_map[row, :tokens] >= 0).all()
            assert (out.step_map[row, tokens:] == -1).all()
            assert not out.logprobs[row, tokens:].any()
        ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
        ids[0, [2, 4]] = model.dsb.mask_id
        out = dsb.infill(model, ids, record=True)
        assert (out.step_map >= 0)[0].tolist() == (out.logprobs < 0)[0].tolist()
        assert (out.step_map >= 0)[0].nonzero().flatten().tolist() == [2, 4]


def test_samples_of_a_prompt_have_their_own_noise():
    model = golden.model("llada")
    rows = golden.prompts(2)
    ids, mask = golden.left_pad(rows)
    how = {**SHAPE, "attention_mask": mask, "temperature": 1.0}
    seed = torch.Generator().manual_seed
    out = dsb.generate(model, ids, num_return_sequences=3, generator=seed(1), **how)
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids.repeat_interleave(3, 0))
    assert len({tuple(row) for row in out.sequences.tolist()}) == 6
    how["attention_mask"] = mask.repeat_interleave(3, 0)
    same = dsb.generate(model, ids.repeat_interleave(3, 0), generator=seed(1), **how)
    assert torch.equal(out.sequences, same.sequences)
    drawn = {"gen_length": 16, "confidence": "random", "steps": 8, "num_return_sequences": 2}
    out = dsb.generate(model, ids[:1], record=True, **drawn)
    assert not torch.equal(*out.step_map), "a drawn order makes samples differ, too"
    blank = torch.cat([rows[0], torch.tensor([511, 511, 4])])[None]
    assert len(dsb.infill(model, blank, num_return_sequences=2, temperature=1.0).row_nfe) == 2


def test_weights_updated_in_place_are_those_of_the_next_call():
    model = copy.deepcopy(golden.model("llada"))
    (prompt,) = golden.prompts(1)
    how = {**SHAPE, "temperature": 1.0, "record": True}
    seen = []
    for _ in range(2):
        out = dsb.generate(model, prompt[None], generator=torch.Generator().manual_seed(1), **how)
        fresh = dsb.Engine(copy.deepcopy(model), graphs=False)
        same = fresh.generate(prompt[None], generator=torch.Generator().manual_seed(1), **how)
        assert torch.equal(out.sequences, same.sequences)
        assert torch.equal(out.logprobs, same.logprobs)
        seen.append(out.logprobs)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(out.sequences).logits.logsumexp(-1).mean().backward()
        optimizer.step()
    assert not torch.equal(*seen)


def test_bad_input():
    model, ids = golden.model("llada"), golden.prompts(1)[0][None]
    with refusal("num_return_sequences=2", "temperature=0"):
        dsb.generate(model, ids, num_return_sequences=2)
    with refusal("num_return_sequences=0", "expected an int >= 1"):
        dsb.generate(model, ids, num_return_sequences=0)
    with refusal("record=1", "expected True or False", kind=TypeError):
        dsb.generate(model, ids, record=1)
