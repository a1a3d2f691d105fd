"""Drafts: the tokens of steps one by one, in fewer forwards."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dsb_runtime as dsb
from dsb_kernels.rows import Column, StepKind
from dsb_runtime.engine import loop
from dsb_runtime.engine.draft_windows import DraftWindows
from dsb_runtime.engine.drafts import DraftingStep
from dsb_runtime.engine.step import StepShape
from tests import golden
from tests.golden import biased_to_eos, left_pad, prompts, refusal
from tests.mutations import kernels
from tests.recorded import Recorder

SHAPE = {"gen_length": 24, "block_length": 8}
QUICK = [
    (family, golden.cases(family).index(case))
    for family in golden.FAMILIES
    for case in golden.one_of_each(family)
]
SHORT = [golden.shortest(f, m) for f in golden.FAMILIES for m in ("dsb_cache_greedy", "naive")]


def slow_unless(quick: list[tuple[str, int]]) -> list[Any]:
    """Every golden case, of which the others are slow."""
    return [
        case if case in quick else pytest.param(*case, marks=pytest.mark.slow)
        for case in golden.CASES
    ]


def engine_of(family: str = "llada", captured: bool = False) -> dsb.Engine:
    how: dict[str, Any] = {"capture": Recorder()} if captured else {"graphs": False}
    return dsb.Engine(golden.model(family), **how)


def guesses(rule: dict[str, Any]) -> dict[str, Any]:
    """Settings of drafts by which random models guess right now and then."""
    return {"drafts": 1} | ({"draft_threshold": 0.3} if "threshold" in rule else {})


def check_equal(plain: dsb.GenerationOutput, drafted: dsb.GenerationOutput) -> None:
    """A decoding with drafts is the one without, whose row steps are forwards and drafts."""
    assert torch.equal(drafted.sequences, plain.sequences)
    assert drafted.row_tokens == plain.row_tokens
    assert sum(drafted.tokens_per_forward) == sum(plain.tokens_per_forward)
    assert len(drafted.tokens_per_forward) == drafted.nfe
    assert sum(drafted.row_nfe) + drafted.drafts.accepted == sum(plain.row_nfe)
    assert drafted.drafts.accepted <= drafted.drafts.run
    if len(plain.row_nfe) == 1:
        assert drafted.nfe + drafted.drafts.accepted == plain.nfe
    if plain.step_map is not None:
        assert torch.equal(drafted.step_map, plain.step_map)
        golden.check_logprobs(drafted.logprobs, plain.logprobs)


# --- equal tokens -----------------------------------------------------------------------------


def check_trajectory(engine: dsb.Engine, family: str, index: int) -> None:
    """The trajectory of the authors' code, in its forwards less the drafts that were accepted."""
    case = golden.cases(family)[index]
    how = golden.settings(case)
    out = engine.generate(torch.tensor([case["prompt"]]), **how, **guesses(how))
    assert out.sequences[0].tolist() == case["sequence"]
    assert sum(out.tokens_per_forward) == case["gen_length"]
    assert case["nfe"] in (None, out.nfe + out.drafts.accepted)


@pytest.mark.parametrize(("family", "index"), slow_unless(QUICK))
def test_trajectory(family, index):
    check_trajectory(engine_of(family), family, index)


@pytest.mark.parametrize(("family", "index"), slow_unless(SHORT))
def test_captured_trajectory(family, index):
    engine = engine_of(family, captured=True)
    for _ in range(2):  # the second time from recordings alone
        check_trajectory(engine, family, index)


RULES: list[dict[str, Any]] = [
    {"threshold": 0.6}, {"threshold": 0.3}, {"factor": 1.0}, {"frechet": 0.0}, {"steps": 24},
    {"steps": 12, "confidence": "random"}, {"threshold": 0.6, "progress": 0.5},
    {"entropy": 2.0}, {"eb": 1.0}, {"threshold": 0.5, "temperature": 0.2},
]  # fmt: skip
ANY_SETTINGS = {
    "schedule": st.sampled_from([("naive", None), ("dsb", 8), ("dsb", None)]),
    "cache": st.sampled_from(["none", "dual", "dsb"]),
    "rule": st.sampled_from(RULES),
    "stop": st.booleans(),
    "prefix": st.sampled_from([None, 1, 5, 100]),
    "refresh": st.sampled_from([None, "select", "first"]),
    "policy": st.sampled_from(["full", "response"]),
}


def settings_of(any_: dict[str, Any]) -> dict[str, Any]:
    schedule, longest = any_["schedule"]
    how = {**SHAPE, "schedule": schedule, "max_block_length": longest, "cache": any_["cache"]}
    how |= {"stop_at_eos": any_["stop"], **any_["rule"]}
    if any_["cache"] != "none":
        how |= {"refresh_commit": any_["refresh"], "refresh_policy": any_["policy"]}
    if any_["cache"] == "dsb":
        how["prefix_window"] = any_["prefix"]
    return how


ANY_CALL = given(
    family=st.sampled_from(golden.FAMILIES), any_=st.fixed_dictionaries(ANY_SETTINGS),
    count=st.integers(1, 3), seed=st.integers(0, 99), captured=st.booleans(), fill=st.booleans(),
)  # fmt: skip


@settings(max_examples=6, deadline=None)
@ANY_CALL
def test_any_settings_give_the_same_tokens(family, any_, count, seed, captured, fill):
    """In a batch and alone, captured or not, to the last mask or an EOS, after a prompt or in
    blanks."""
    check_call(family, any_, count, seed, captured, fill)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@ANY_CALL
def test_many_settings_give_the_same_tokens(family, any_, count, seed, captured, fill):
    check_call(family, any_, count, seed, captured, fill)


def check_call(
    family: str, any_: dict[str, Any], count: int, seed: int, captured: bool, fill: bool
) -> None:
    how = settings_of(any_)
    ids, mask = left_pad(prompts(count, seed=seed))
    if fill:
        given = torch.randint(2, 500, (count, 24), generator=torch.Generator().manual_seed(seed))
        given[:, ::2] = given[:, -1] = golden.model(family).dsb.mask_id
        ids, mask = torch.cat([ids, given], 1), torch.cat([mask, torch.ones_like(given)], 1)
        how.pop("gen_length")
        how |= {"block_length": 4, "max_block_length": how["max_block_length"] and 4}
        if "steps" in how:
            how["steps"] = 12

    def decode(engine: dsb.Engine, **more: Any) -> dsb.GenerationOutput:
        call = engine.infill if fill else engine.generate
        generator = torch.Generator().manual_seed(seed)
        return call(ids, attention_mask=mask, generator=generator, record=True, **how, **more)

    with biased_to_eos(family) if any_["stop"] else contextlib.nullcontext():
        plain = decode(engine_of(family))
        check_equal(plain, decode(engine_of(family, captured), **guesses(how)))


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("cache", ["none", "dual", "dsb"])
@pytest.mark.parametrize("captured", [False, True])
def test_some_drafts_are_accepted_and_some_dropped(family, cache, captured):
    """Otherwise the tests above would show nothing. The K/V cache ends as it does without them."""
    ids, mask = left_pad(prompts(3))
    how = {**SHAPE, "attention_mask": mask, "cache": cache, "steps": 24, "stop_at_eos": False}
    engine, alone = engine_of(family, captured), engine_of(family)
    out, plain = engine.generate(ids, **how, drafts=1), alone.generate(ids, **how)
    check_equal(plain, out)
    assert 0 < out.drafts.accepted < out.drafts.run
    if cache != "none" and not captured:  # a captured step may have more padding
        torch.testing.assert_close(engine.loop.storage, alone.loop.storage, atol=1e-4, rtol=1e-4)


def test_drafts_of_a_model_that_is_called():
    """A hook, so that the model's own forward runs, with the rows of drafts beside the others."""
    ids, mask = left_pad(prompts(3))
    model = golden.model("llada")
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    try:
        for cache in ("none", "dual", "dsb"):
            how = {**SHAPE, "attention_mask": mask, "cache": cache, "steps": 24}
            out = engine_of().generate(ids, **how, drafts=1)
            check_equal(engine_of().generate(ids, **how), out)
            assert 0 < out.drafts.accepted < out.drafts.run
    finally:
        hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "count", "length"), [("dsb", 1, 4), ("none", 2, 4)])
def test_drafts_by_kernel(cache, count, length):
    how = {"gen_length": length, "block_length": 4, "steps": length, "cache": cache}
    ids, mask = left_pad([row[:6] for row in prompts(count, seed=1)])
    plain = engine_of().generate(ids, attention_mask=mask, **how)
    with kernels():
        out = engine_of().generate(ids, attention_mask=mask, **how, drafts=1)
    check_equal(plain, out)
    assert out.drafts.accepted > 0


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_no_step_with_drafts_can_be_wrong(data):
    """Steps of any kind and capacity, too small for some rows or drafts among them, lead a batch to
    the tokens that its rows get alone."""
    rows = prompts(3)
    ids, mask = left_pad(rows)
    leftpad = (mask.shape[1] - mask.sum(-1)).int()
    config = dsb.DecodingConfig(steps=24, drafts=1, **SHAPE)
    engine = engine_of()
    with torch.no_grad():
        masks = ids.new_full((3, 24), engine.model.dsb.mask_id)
        session = engine.loop.session(config, torch.cat([ids, masks], 1), leftpad)
        for _ in range(400):
            tables = loop.read_tables(session.step.tables())
            shape = loop.next_step(session, tables.now, tables.drafts)
            if shape is None:
                break
            if data.draw(st.integers(0, 2)) > 0:
                whole = data.draw(st.booleans())
                kind = StepKind.REFRESH if whole else StepKind.WINDOW
                length = session.state.canvas.shape[1]
                width = length if whole else data.draw(st.integers(1, length))
                count, candidates = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
                drafts = 0 if whole else data.draw(st.integers(0, 3))
                shape = StepShape(kind, count, width, candidates, drafts)
            session.step(shape)
    accepted = session.step.drafts.counts[:, 1].tolist()
    for i, row in enumerate(rows):
        alone = dsb.generate(golden.model("llada"), row[None], steps=24, **SHAPE)
        assert session.state.canvas[i, -24:].tolist() == alone.sequences[0, -24:].tolist()
        assert session.state.table[i, Column.FORWARDS] == alone.nfe
    assert sum(accepted) <= sum(session.step.drafts.counts[:, 0])


# --- a wrong draft ----------------------------------------------------------------------------


def test_a_draft_of_wrong_tokens_is_dropped(monkeypatch):
    """Its keys and values then are nowhere, though every other thing of its state is right."""
    guess = DraftingStep.guess

    def wrong(step: DraftingStep) -> None:
        guess(step)
        step.drafts.canvas[:, -1] = 7  # a token that the step does not commit

    monkeypatch.setattr(DraftingStep, "guess", wrong)
    how = {**SHAPE, "steps": 24, "stop_at_eos": False}
    ids = prompts(2)[1][None]
    engine, alone = engine_of(), engine_of()
    out, plain = engine.generate(ids, **how, drafts=1), alone.generate(ids, **how)
    check_equal(plain, out)
    assert out.nfe == plain.nfe and out.drafts.run > out.drafts.accepted == 0
    torch.testing.assert_close(engine.loop.storage, alone.loop.storage, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mistake", ["keep", "own keys", "equal", "canvas"])
def test_mistakes_are_seen(mistake, monkeypatch):
    """Deliberate mistakes of which `check_equal` or the K/V cache must tell."""
    if mistake == "keep":  # an accepted draft leaves the cache as it was
        monkeypatch.setattr(DraftWindows, "keep", lambda *_: None)
    elif mistake == "own keys":  # a draft's queries see the K/V of the step before in its window
        rotate = DraftWindows.rotate

        def zero(self: DraftWindows, i: int, *rest: Tensor) -> Tensor:
            q = rotate(self, i, *rest)
            self.values[i].zero_()
            return q

        monkeypatch.setattr(DraftWindows, "rotate", zero)
    elif mistake == "equal":  # every draft is accepted
        monkeypatch.setattr(DraftingStep, "equal", lambda self: torch.ones(1, dtype=torch.bool))
    else:  # only the window is compared, not the tokens
        same = lambda self: (self.state.table == self.drafts.table).all(-1)  # noqa: E731
        monkeypatch.setattr(DraftingStep, "equal", same)
    how = {**SHAPE, "stop_at_eos": False, "steps": 24}
    ids = prompts(2)[1][None]
    engine, alone = engine_of(), engine_of()
    with pytest.raises(AssertionError):
        out, plain = engine.generate(ids, **how, drafts=1), alone.generate(ids, **how)
        check_equal(plain, out)
        torch.testing.assert_close(engine.loop.storage, alone.loop.storage, atol=1e-4, rtol=1e-4)


# --- what a caller sees -----------------------------------------------------------------------


def test_events_are_those_of_the_steps_one_by_one():
    """Each step has its event, whatever the forward that it ran in."""
    ids, mask = left_pad(prompts(3))
    how = {**SHAPE, "attention_mask": mask, "steps": 24, "stop_at_eos": False}
    seen: list[list[dsb.StepEvent]] = [[], []]
    out, plain = (
        engine_of().generate(ids, **how, drafts=drafts, on_step=seen[1 - drafts].append)
        for drafts in (1, 0)
    )
    check_equal(plain, out)
    drafted, single = seen
    assert [event.index for event in drafted] == list(range(len(drafted)))
    assert sum(not event.draft for event in drafted) == out.nfe
    assert sum(len(event.rows) for event in drafted if event.draft) == out.drafts.accepted
    assert not any(event.draft for event in single)
    for i in range(3):

        def steps(events: list[dsb.StepEvent], row: int = i) -> list[Any]:
            return [
                (e.kind, e.before[e.rows.index(row)], e.canvas[row].tolist(),
                 e.position[row][e.commit[row]].tolist(), e.table[row])
                for e in events if row in e.rows
            ]  # fmt: skip

        assert steps(drafted) == steps(single)


def test_steps_with_drafts_are_launched_ahead(monkeypatch):
    """The host guesses the next launch as it does without drafts, and wastes few."""
    engine = engine_of(captured=True)
    ahead, launched, launch = [], [], engine.loop.launch
    speculate = loop.speculate
    monkeypatch.setattr(engine.loop, "launch", lambda *a: launched.append(a[1]) or launch(*a))
    monkeypatch.setattr(loop, "speculate", lambda *a: ahead.append(speculate(*a)) or ahead[-1])
    out = engine.generate(prompts(1)[0][None], **SHAPE, steps=24, drafts=1)
    assert sum(shape is not None for shape in ahead) >= 4
    assert out.nfe <= len(launched) <= out.nfe + 3


def test_without_drafts_a_step_is_what_it_was():
    engine = engine_of()
    ids = prompts(1)[0][None]
    canvas = torch.cat([ids, ids.new_full((1, 24), engine.model.dsb.mask_id)], 1)
    config = dsb.DecodingConfig(**SHAPE)
    step = engine.loop.session(config, canvas, torch.zeros(1, dtype=torch.int32)).step
    assert not isinstance(step, DraftingStep) and step.tables() is step.state.table
    assert step.tables().shape[1] == len(Column)
    assert engine.generate(ids, **SHAPE).drafts == (0, 0)


def test_bad_input():
    with refusal("drafts=2", "expected an int from 0 to 1"):
        dsb.DecodingConfig(drafts=2)
    with refusal("draft_threshold=0.8", "drafts=0"):
        dsb.DecodingConfig(draft_threshold=0.8)
    with refusal("draft_threshold=0.8", "by steps itself"):
        dsb.DecodingConfig(steps=4, drafts=1, draft_threshold=0.8)
