"""A sparse context against a loop over the model's own forward. That `context_masks` does so with
every schedule, rule and cache is a property in `test_infill.py`."""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dsb_runtime as dsb
from benchmarks import sparse_context
from dsb_kernels import attention_kernel
from dsb_kernels.block_lists import BlockLists, blocks_visible
from dsb_runtime.engine import sparse
from dsb_runtime.engine.batcher import Batcher
from dsb_runtime.engine.engine import Engine
from tests import golden
from tests.golden import biased_to_eos, prompts, refusal
from tests.mutations import DEVICE, kernels
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


@pytest.fixture
def listed(monkeypatch) -> list[Tensor]:
    """The definitions are given the kernels' lists of KV blocks. Holds, for each list of each step,
    how many KV blocks it leaves out."""
    left_out: list[Tensor] = []

    def recorded(visible: Tensor, *window: Tensor) -> BlockLists:
        num_blocks, indices = blocks_visible(visible, *window)
        left_out.append(indices.shape[1] - num_blocks)
        return num_blocks, indices

    monkeypatch.setattr(sparse, "use_triton", lambda *tensors: True)
    monkeypatch.setattr(sparse, "blocks_visible", recorded)
    return left_out


def long(family: str, cache: str, schedule: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Prompts of different lengths and settings of a canvas of four or five KV blocks."""
    how = {"gen_length": 200, "block_length": 32, "threshold": 0.2, "stop_at_eos": True}
    how |= {"context_masks": 3, "eos_bound": True, "cache": cache, "schedule": schedule}
    return [prompt.repeat(4) for prompt in prompts(2)], how


def by_masks_alone(model: PreTrainedModel, *args: Any, **named: Any) -> dsb.GenerationOutput:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "use_triton", lambda *tensors: False)
        return dsb.generate(model, *args, **named)


@pytest.mark.parametrize(
    ("family", "cache", "schedule"),
    list(itertools.product(golden.FAMILIES, CACHES, ["naive", "dsb"])),
)
def test_lists_of_blocks_change_no_token(listed, family, cache, schedule):
    """The rows are of different lengths, so that one has left padding."""
    rows, how = long(family, cache, schedule)
    ids, mask = golden.left_pad(rows)
    with biased_to_eos(family) as model:
        expected = by_masks_alone(model, ids, attention_mask=mask, **how)
        assert not listed
        out = dsb.generate(model, ids, attention_mask=mask, **how)
    assert any(count.any() for count in listed)
    assert torch.equal(out.sequences, expected.sequences) and out.row_nfe == expected.row_nfe


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_lists_of_blocks_in_replayed_steps_and_rows_that_come_and_go(listed, family):
    rows, how = long(family, "dsb", "dsb")
    model = golden.model(family)
    expected = [by_masks_alone(model, row[None], **how) for row in rows]
    batcher = Batcher(model, 2, capture=(recorder := Recorder()))
    requests = [dsb.Request(model, row, None, **how) for row in rows]
    batcher.waiting.extend(requests)
    while not batcher.idle:
        for request in batcher.run(lambda done: True):
            request.settle()
    assert recorder.replays and any(count.any() for count in listed)
    for request, alone in zip(requests, expected, strict=True):
        out = request.result(timeout=0)
        assert torch.equal(out.sequences, alone.sequences) and out.nfe == alone.nfe


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
@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts in the interpreter")
def test_kernels_decode_the_same_and_visit_fewer_blocks(monkeypatch):
    """Two of three KV blocks are behind an EOS, and one row is padded."""
    model, prompt = golden.model("llada"), prompts(1)[0]
    end = prompt.new_tensor([model.dsb.eos_ids[0]])
    rows = [torch.cat([with_masks("llada", prompt[:n], 2), end]) for n in (5, 3)]
    ids, mask = golden.left_pad([with_masks("llada", row, 150) for row in rows])
    how = {"block_length": 2, "threshold": 0.01, "context_masks": 1, "attention_mask": mask}
    how |= {"stop_at_eos": True, "eos_bound": True}
    expected = dsb.infill(model, ids, **how)
    visited, find_block = Counter[bool](), attention_kernel._find_block

    def counted(*args: Any, **named: Any) -> Any:
        visited[listing] += 1
        return find_block(*args, **named)

    monkeypatch.setattr(attention_kernel, "_find_block", counted)
    for listing in (True, False):
        monkeypatch.setattr(sparse, "use_triton", lambda *tensors, listing=listing: listing)
        with kernels():
            actual = dsb.infill(model, ids, **how)
        assert torch.equal(actual.sequences, expected.sequences) and actual.nfe == expected.nfe
    assert 2 * visited[True] < visited[False]


def test_its_benchmark_counts_the_positions_that_are_left_out(tmp_path, capsys):
    file = tmp_path / "sparse.json"
    options = ["--problems", "2", "--gen-length", "40", "48", "--cache", "dsb", "--batch", "2"]
    assert sparse_context.main([*options, "--json", str(file)]) == 0
    lines = json.loads(file.read_text())["lines"]
    assert [line["response"] for line in lines] == [40] * 4 + [48] * 4
    whole, eight, bound, both = lines[4:]
    assert "`context_masks=8` and `eos_bound`" in capsys.readouterr().out
    assert both["positions"] <= eight["positions"] < bound["positions"] <= whole["positions"]
    assert lines[0]["positions"] < whole["positions"]
    assert (whole["exact"], whole["interval"][1]) == (2, 1.0)
