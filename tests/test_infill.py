"""infill: masks anywhere, against the method's loop over the model's own forward."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import dsb_runtime as dsb
from dsb_runtime.engine.engine import Engine
from tests import golden
from tests.golden import biased_to_eos, refusal
from tests.mutations import kernels
from tests.plain_loop import plain_loop

MASK = {family: golden.model(family).dsb.mask_id for family in golden.FAMILIES}
SCHEDULES = [("naive", None), ("dsb", 4), ("dsb", None)]
CACHES = ["none", "dual", "dsb"]
RULES = [("threshold", 0.4), ("factor", 1.0), ("frechet", 0.0), ("quota", 6)]


def blanks(family: str, length: int, seed: int, share: float = 0.5, suffix: int = 3) -> Tensor:
    """A row (length,) of random tokens and masks, which has no mask in its last positions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 500, (length,), generator=generator)
    masked = torch.rand(length, generator=generator) < share
    masked[length - suffix :] = False
    masked[int(torch.randint(0, length - suffix, (), generator=generator))] = True
    return ids.masked_fill(masked, MASK[family])


def settings_of(
    schedule: str, top: int | None, cache: str, rule: str, value: float, ids: Tensor, mask: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of `infill` and those of the method's row. Quotas are a step for each mask of a
    block, or half as many steps as there are masks."""
    shape = {"block_length": 4, "max_block_length": top, "schedule": schedule, "cache": cache}
    if rule != "quota":
        return {**shape, rule: value}, {**shape, "rule": rule, "value": value}
    (masks,) = (ids == mask).nonzero(as_tuple=True)
    blocks = -(-int(masks[-1] + 1 - masks[0]) // 4)
    steps = (2 if blocks > 1 else 1) if schedule == "naive" else -(-len(masks) // 2)
    total = steps * blocks if schedule == "naive" else steps
    return {**shape, "steps": total}, {**shape, "rule": "quota", "steps": steps}


def tied(event: dsb.StepEvent) -> bool:
    """Whether two candidates of the only row have nearly the same confidence."""
    confidence = event.confidence[0][event.position[0] >= 0]
    return bool((confidence.sort().values.diff() < 1e-5).any())


@settings(max_examples=120, deadline=None)
@given(
    family=st.sampled_from(golden.FAMILIES),
    way=st.sampled_from(list(itertools.product(SCHEDULES, CACHES, RULES))),
    length=st.integers(8, 24),
    suffix=st.integers(0, 5),
    share=st.sampled_from([0.1, 0.5, 0.9]),
    full_every=st.sampled_from([1, 2]),
    after=st.sampled_from([0, 0, 2, 99]),
    cfg_scale=st.sampled_from([0.0, 0.0, 0.5, 2.0]),
    context=st.sampled_from([None, None, 0, 1, 4]),
    seed=st.integers(0, 999),
)
@example("dream", (("dsb", 4), "none", ("quota", 6)), 16, 0, 0.5, 1, 0, 2.0, 0, 16)
def test_every_way_equals_the_plain_loop(
    family, way, length, suffix, share, full_every, after, cfg_scale, context, seed
):
    (schedule, top), cache, (rule, value) = way
    ids = blanks(family, length, seed, share, suffix)
    assume((ids != MASK[family]).sum() > 1)  # among masks alone, all candidates are equally sure
    ours, method = settings_of(schedule, top, cache, rule, value, ids, MASK[family])
    if context is not None:
        ours |= {"context_masks": context}
        method |= {"context_masks": context}
    elif cache != "none" and full_every > 1:
        ours |= {"refresh_policy": "response", "full_refresh_every": full_every}
        method |= {"full_every": full_every}
    if cache != "none":
        ours |= {"suffix_window": after}
        method |= {"suffix_window": after}
    events: list[tuple[str, bool]] = []
    out = dsb.infill(
        golden.model(family), ids[None], on_step=lambda e: events.append((e.kind, tied(e))),
        cfg_scale=cfg_scale, **ours,
    )  # fmt: skip
    # Guidance makes several candidates so sure that the order of their confidences is rounding's.
    assume(not any(tie for _, tie in events))
    kinds = [kind for kind, _ in events]
    expected, expected_kinds = plain_loop(family, ids, cfg_scale=cfg_scale, **method)
    assert out.sequences[0].tolist() == expected and kinds == expected_kinds
    given = ids != MASK[family]
    assert torch.equal(out.sequences[0, given], ids[given])
    assert out.row_tokens == [int((~given).sum())] == [sum(out.tokens_per_forward)]


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("cache", CACHES)
def test_rows_of_a_batch_are_what_they_are_alone(family, cache):
    """Rows differ in length and in where their masks stand; one begins with a mask."""
    rows = [blanks(family, length, length) for length in (7, 30, 12, 21)]
    rows[0][0] = MASK[family]
    ids, mask = golden.left_pad(rows)
    how = {} if cache == "none" else {"refresh_policy": "response", "suffix_window": 2}
    infill = functools.partial(
        dsb.infill, golden.model(family), block_length=4, cache=cache, threshold=0.4, **how
    )  # fmt: skip
    batch = infill(ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = infill(row[None])
        assert batch.sequences[i, -len(row) :].tolist() == alone.sequences[0].tolist()
        assert batch.row_nfe[i] == alone.nfe and batch.row_tokens[i] == alone.row_tokens[0]
    assert torch.equal(batch.sequences[mask == 0], ids[mask == 0])


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("cache", CACHES)
def test_masks_at_the_end_are_a_response(family, cache):
    (prompt,) = golden.prompts(1)
    for sampling in ({}, {"temperature": 0.8}):
        how = {"block_length": 8, "cache": cache, "threshold": 0.5, "stop_at_eos": True, **sampling}
        expected = dsb.generate(
            golden.model(family), prompt[None], gen_length=24,
            generator=torch.Generator().manual_seed(3), **how,
        )  # fmt: skip
        ids = torch.cat([prompt, prompt.new_full((24,), MASK[family])])[None]
        out = dsb.infill(
            golden.model(family), ids, generator=torch.Generator().manual_seed(3), **how
        )
        assert torch.equal(out.sequences, expected.sequences)
        assert vars(out) | {"sequences": None} == vars(expected) | {"sequences": None}


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("schedule", ["naive", "dsb"])
def test_an_eos_is_a_token_unless_the_row_is_to_stop_there(family, schedule):
    ended = 0
    with biased_to_eos(family) as model:
        eos = model.dsb.eos_ids[0]
        for seed in range(12):
            ids = blanks(family, 24, seed)
            ids[7] = eos if seed % 2 else ids[7]
            how = {"schedule": schedule, "cache": "dsb", "block_length": 6}
            method = {**how, "rule": "threshold", "value": 0.5}
            whole, short = (
                dsb.infill(model, ids[None], threshold=0.5, **stop, **how)
                for stop in ({}, {"stop_at_eos": True})
            )
            assert whole.sequences[0].tolist() == plain_loop(family, ids, **method)[0]
            expected, kinds = plain_loop(family, ids, stop_at_eos=True, **method)
            assert short.sequences[0].tolist() == expected and short.nfe == len(kinds)
            masked = ids == MASK[family]
            assert whole.row_tokens == [int(masked.sum())]
            assert torch.equal(short.sequences[0, ~masked], ids[~masked])
            ended += short.nfe < whole.nfe and short.row_tokens < whole.row_tokens
    assert ended, "at least one row must end early, or this shows nothing"


@pytest.mark.slow
def test_kernels_fill_the_same_tokens():
    """One row has more candidates than the other one, behind its padding, has positions."""
    rows = [blanks("dream", 10, 1, share=0.9, suffix=1), blanks("dream", 4, 2, suffix=1)]
    ids, mask = golden.left_pad(rows)
    infill = functools.partial(
        dsb.infill, golden.model("dream"), ids, attention_mask=mask, block_length=10, steps=2,
        refresh_policy="response",
    )  # fmt: skip
    expected = infill()
    with kernels():
        out = infill()
    assert torch.equal(out.sequences, expected.sequences) and out.row_nfe == expected.row_nfe


def test_captured_steps_serve_blanks_in_other_places():
    """The place of the masks is in the row table: a captured step of one call serves the next."""
    captured: list[int] = []

    def capture(run):
        captured.append(1)
        return run

    model = golden.model("dream")
    engine = Engine(model, capture=capture)
    for first in (4, 9, 5):
        ids = torch.arange(20, 44)[None]
        ids[:, first : first + 6] = MASK["dream"]
        out = engine.infill(ids, block_length=3, steps=6, suffix_window=2)
        expected = dsb.infill(model, ids, block_length=3, steps=6, suffix_window=2)
        assert torch.equal(out.sequences, expected.sequences)
    assert len(captured) == 2, "one refresh, and one window step"


def test_bad_input():
    model, ids = golden.model("llada"), torch.tensor([[5, 511, 6], [5, 6, 7]])
    infill = functools.partial(dsb.infill, model)
    with refusal("input_ids: row 1 has no mask id 511"):
        infill(ids)
    with refusal("gen_length=8", "expected no gen_length", kind=TypeError):
        infill(ids[:1], gen_length=8)
    with refusal("config=3", kind=TypeError):
        infill(ids[:1], 3)
    with refusal("block_length='x'", kind=TypeError):
        infill(ids[:1], block_length="x")
    with refusal("input_ids has", "positions: expected at most the model's"):
        infill(torch.full((1, 5000), 511))
    with refusal("input_ids=list", kind=TypeError):
        infill([[5, 511]])
    with refusal("steps=4", "rows of 1 and of 2; expected one row at a time"):
        infill(torch.tensor([[5, 511, 6, 511, 511], [5, 6, 511, 6, 6]]), schedule="naive",
               block_length=2, steps=4)  # fmt: skip
    with refusal("mask id inside a prompt", "dsb_runtime.infill"):
        dsb.generate(model, ids[:1])
    # A mask in the padding is none; a config's gen_length gives way to the masks.
    mask = torch.tensor([[0, 1, 1]])
    with refusal("row 0 has no mask"):
        infill(torch.tensor([[511, 5, 6]]), attention_mask=mask)
    blank = torch.tensor([[5, 511, 511, 6, 511, 8]])
    config = dsb.DecodingConfig(gen_length=64, block_length=32)
    expected = infill(blank, block_length=4).sequences
    assert torch.equal(infill(blank, config).sequences, expected)
    assert torch.equal(infill(blank, block_length=2**31 - 1).sequences, expected)
