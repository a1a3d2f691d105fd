"""Schedules and selection rules against a direct transcription of their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_kernels.commit import initial_state, unmask_and_slide
from dsb_kernels.method import EOS, MASK, Row, choose
from dsb_kernels.rows import UnmaskSpec

RULE_VALUES = {
    "threshold": st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    "factor": st.sampled_from([0.25, 1.0, 2.0, 8.0]),
    "frechet": st.sampled_from([-1.0, 0.0, 0.25, 0.9]),
    "quota": st.just(0.0),
}
# Few distinct values, exact in float32, so that ties and equalities with a bound occur.
CONFIDENCE = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.5, 0.75, 0.875, 0.9375, 1.0])


@st.composite
def rows(draw) -> Row:
    gen = draw(st.integers(1, 24))
    block = draw(st.integers(1, gen))
    schedule = draw(st.sampled_from(["dsb", "naive"]))
    cache = draw(st.sampled_from(["dsb", "dual", "none"]))
    rule = draw(st.sampled_from(sorted(RULE_VALUES)))
    blocks = -(-gen // block)
    # Steps of the response, or of one block, where each is planned at least one step.
    steps = draw(st.integers(1, max(1, gen // blocks if schedule == "naive" else gen)))
    max_block = draw(st.none() | st.integers(block, gen + 4)) if schedule == "dsb" else None
    prompt = draw(st.integers(1, 6))
    commit = draw(st.sampled_from(["select", "first"])) if cache != "none" else "select"
    return Row(
        prompt=prompt, gen=gen, block=block, max_block=max_block, schedule=schedule, cache=cache,
        prefix_window=draw(st.integers(0, 6)), rule=rule, value=draw(RULE_VALUES[rule]),
        steps=steps, refresh_commit=commit,
        min_prefix=draw(st.integers(0, 1)) if cache == "dual" else 0,
        stop_at_eos=draw(st.booleans()), leftpad=draw(st.integers(0, prompt - 1)),
    )  # fmt: skip


def spec_of(row: Row) -> UnmaskSpec:
    return UnmaskSpec(
        prompt_length=row.prompt, block_length=row.block, max_block_length=row.max_block,
        schedule=row.schedule, cache=row.cache, prefix_window=row.prefix_window,
        min_prefix=row.min_prefix, rule=row.rule, rule_value=row.value, steps=row.steps,
        refresh_commit=row.refresh_commit, mask_id=MASK, eos_ids=(EOS,),
        stop_at_eos=row.stop_at_eos,
    )  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(row=rows(), data=st.data())
def test_every_step_equals_the_transcription(row, data):
    spec = spec_of(row)
    canvas = torch.tensor([row.canvas])
    leftpad = torch.tensor([row.leftpad], dtype=torch.int32)
    state = initial_state(canvas, leftpad, spec)
    active = torch.tensor([True])
    committed: set[int] = set()
    for _ in range(row.gen + 1):
        if row.done:
            break
        at = row.candidates()
        held = (state.position >= 0).sum().item()
        assert state.position[0, :held].tolist() == at
        assert len(at) <= row.block, "candidates always fit block_length"
        tokens = data.draw(st.lists(st.integers(0, 3), min_size=held, max_size=held))
        confidences = data.draw(st.lists(CONFIDENCE, min_size=held, max_size=held))
        before, start, end = canvas.clone(), state.start.item(), state.end.item()

        pad = [0] * (state.position.shape[1] - held)
        commit = unmask_and_slide(
            canvas, torch.tensor([tokens + pad]), torch.tensor([confidences + [2.0] * len(pad)]),
            state, active, leftpad, spec,
        )  # fmt: skip
        picked = row.advance(tokens, confidences)

        assert commit[0].nonzero().flatten().tolist() == [at.index(i) for i in picked]
        assert canvas[0].tolist() == row.canvas
        now = (state.start, state.end, state.prefix, state.committed, state.since_refresh)
        assert [int(t) for t in now] == [row.s, row.e, row.p, row.n, row.since]
        assert (bool(state.refresh), bool(state.done)) == (row.refresh, row.done)
        # What must hold whatever the rule.
        assert state.start.item() >= start and state.end.item() >= end
        assert not committed & set(picked), "a position is committed once"
        committed |= set(picked)
        assert picked, "every step commits"
        filled = before[0] != MASK
        if row.done and EOS in row.canvas:  # what follows the EOS that ended the row is EOS
            filled[row.canvas.index(EOS) :] = False
        assert torch.equal(canvas[0][filled], before[0][filled]), "commits are final"
    assert row.done and bool(state.done)
    assert (canvas != MASK).all()


@settings(max_examples=300, deadline=None)
@given(
    confidences=st.lists(CONFIDENCE, min_size=1, max_size=12),
    rule=st.sampled_from(["threshold", "factor", "frechet"]),
    data=st.data(),
)
def test_rule_alone(confidences, rule, data):
    value = data.draw(RULE_VALUES[rule])
    gen = len(confidences)
    row = Row(1, gen, gen, None, "dsb", "none", 0, rule, value, 1, "select", 0, False)
    spec, canvas = spec_of(row), torch.tensor([row.canvas])
    leftpad = torch.zeros(1, dtype=torch.int32)
    state = initial_state(canvas, leftpad, spec)
    commit = unmask_and_slide(
        canvas, torch.full((1, gen), 7), torch.tensor([confidences]), state,
        torch.tensor([True]), leftpad, spec,
    )  # fmt: skip
    assert commit[0].nonzero().flatten().tolist() == choose(confidences, rule, value, 0)


def test_frechet_commits_the_largest_rank_that_passes():
    # 0.9 alone: 0.9 - 0 - 0.1 = 0.8; with 0.75: 1.65 - 1 - 0.25 = 0.4; with 0.5: 2.15 - 2.5 < 0.
    assert choose([0.5, 0.9, 0.75], "frechet", 0.25, 0) == [1, 2]
    assert choose([0.5, 0.9, 0.75], "frechet", 0.5, 0) == [1]


def test_factor_takes_all_when_only_the_last_rank_fails():
    assert choose([0.9, 0.9, 0.1], "factor", 1.0, 0) == [0, 1, 2]
    assert choose([0.9, 0.1, 0.1], "factor", 1.0, 0) == [0]


@pytest.mark.parametrize("steps", [1, 3, 5, 8, 16])
def test_quota_spreads_masks_over_steps(steps):
    row = Row(2, 16, 16, None, "dsb", "none", 0, "quota", 0.0, steps, "select", 0, False)
    counts = []
    while not row.done:
        held = len(row.candidates())
        counts.append(len(row.advance([5] * held, [0.5] * held)))
    assert len(counts) == steps and sum(counts) == 16
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1


def test_nan_confidence_commits_nothing_and_is_flagged():
    row = Row(1, 4, 4, None, "dsb", "none", 0, "threshold", 0.5, 1, "select", 0, False)
    spec, canvas = spec_of(row), torch.tensor([row.canvas, row.canvas])
    leftpad = torch.zeros(2, dtype=torch.int32)
    state = initial_state(canvas, leftpad, spec)
    confidence = torch.tensor([[0.9, float("nan"), 0.9, 0.9], [0.9] * 4])
    unmask_and_slide(
        canvas, torch.full((2, 4), 7), confidence, state, torch.tensor([True, True]), leftpad, spec
    )
    assert state.failed.tolist() == [True, False]
    assert canvas.tolist() == [row.canvas, [1, 7, 7, 7, 7]]


def test_inactive_rows_stay_as_they_are():
    row = Row(1, 4, 2, None, "dsb", "dsb", 0, "threshold", 0.5, 1, "select", 0, False)
    spec, canvas = spec_of(row), torch.tensor([row.canvas, row.canvas])
    leftpad = torch.zeros(2, dtype=torch.int32)
    state = initial_state(canvas, leftpad, spec)
    untouched = {k: v[1].clone() for k, v in vars(state).items()}
    unmask_and_slide(
        canvas, torch.full((2, 2), 7), torch.full((2, 2), 0.9), state,
        torch.tensor([True, False]), leftpad, spec,
    )  # fmt: skip
    assert canvas[1].tolist() == row.canvas
    assert all(torch.equal(getattr(state, k)[1], v) for k, v in untouched.items())
