"""The definition of unmask_and_slide against the method in plain Python (`dsb_kernels.method`)."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsb_kernels.commit import initial_rows, unmask_and_slide
from dsb_kernels.method import EOS, MASK, Row, choose
from dsb_kernels.rows import Column, StepKind, UnmaskSpec, read_rows

RULE_VALUES = {
    "threshold": st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    "factor": st.sampled_from([0.25, 1.0, 2.0, 8.0]),
    "frechet": st.sampled_from([-1.0, 0.0, 0.25, 0.9]),
    "entropy": st.sampled_from([0.0, 0.5, 2.0]),
    "eb": st.sampled_from([0.0, 0.5, 2.0, 9.0]),
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
    stop = draw(st.booleans())
    # Tokens that are given between the first mask and the last.
    inside = st.integers(prompt + 1, prompt + gen - 2)
    given = (
        draw(st.dictionaries(inside, st.integers(0, 3))) if gen > 2 and draw(st.booleans()) else {}
    )
    return Row(
        prompt_length=prompt, gen_length=gen, block_length=block, schedule=schedule, cache=cache,
        max_block_length=max_block,
        prefix_window=draw(st.integers(0, 6)), rule=rule, value=draw(RULE_VALUES[rule]),
        steps=steps, stop_at_eos=stop,
        eos_bound=stop and draw(st.booleans()), leftpad=draw(st.integers(0, prompt - 1)),
        refresh_commit=draw(st.sampled_from(["select", "first"])) if cache != "none" else "select",
        min_prefix=draw(st.integers(0, 1)) if cache == "dual" else 0,
        full_every=draw(st.integers(1, 3)) if cache != "none" else 1,
        progress=draw(st.sampled_from([0.0, 0.25, 1.0])),
        given=given, suffix_length=draw(st.integers(0, 3)),
    )  # fmt: skip


class Batch:
    """Rows like this one, stepped by the op."""

    def __init__(self, row: Row, count: int = 1) -> None:
        names = [f.name for f in fields(UnmaskSpec) if hasattr(row, f.name)]
        self.spec = UnmaskSpec(
            **{name: getattr(row, name) for name in names}, rule_value=row.value, mask_id=MASK,
            eos_ids=(EOS,),
        )  # fmt: skip
        self.canvas = torch.tensor([row.canvas] * count)
        leftpad = torch.tensor([row.leftpad] * count)
        self.table, self.position = initial_rows(self.canvas, leftpad, self.spec)
        self.commit = torch.zeros_like(self.position, dtype=torch.bool)
        self.confidence = torch.zeros_like(self.position, dtype=torch.float32)

    def step(self, token: Tensor, confidence: Tensor, active: list[bool] | None = None) -> None:
        mask = torch.tensor(active or [True] * len(self.canvas))
        unmask_and_slide(
            self.canvas, self.table, self.position, self.commit, self.confidence, token,
            confidence, mask, None, self.spec,
        )  # fmt: skip


def test_a_cache_policy_without_a_branch_is_an_error(monkeypatch):
    monkeypatch.setattr("dsb_kernels.rows.CACHES", ("mine",))
    batch = Batch(Row(prompt_length=1, gen_length=1, block_length=1, cache="mine"))
    with pytest.raises(NotImplementedError, match="cache='mine': next_prefix has no branch"):
        batch.step(torch.tensor([[3]]), torch.tensor([[0.9]]))


@settings(max_examples=250, deadline=None)
@given(row=rows(), data=st.data())
def test_every_step_equals_the_method(row, data):
    batch, committed = Batch(row), set()
    while not row.done:
        candidates = row.candidates()
        num = len(candidates)
        (before,) = read_rows(batch.table)
        assert batch.position[0, :num].tolist() == candidates and before.num_candidates == num
        assert num <= row.block_length + len(row.given)
        tokens = data.draw(st.lists(st.integers(0, 3), min_size=num, max_size=num))
        confidences = data.draw(st.lists(CONFIDENCE, min_size=num, max_size=num))
        if row.rule in ("entropy", "eb"):  # negative entropies
            confidences = [-4 * c for c in confidences]
        canvas, unused = batch.canvas.clone(), batch.position.shape[1] - num
        confidence = torch.tensor([confidences + [2.0] * unused])
        batch.step(torch.tensor([tokens + [0] * unused]), confidence)
        positions = row.advance(tokens, confidences)

        chosen = batch.commit[0].nonzero().flatten().tolist()
        assert chosen == [candidates.index(i) for i in positions]
        assert batch.confidence[0].tolist() == confidence[0].tolist()
        assert batch.canvas[0].tolist() == row.canvas
        (after,) = read_rows(batch.table)
        assert StepKind(after.next_kind).label == row.next_kind
        for name in ("start", "end", "prefix", "unmasked", "since_refresh", "step", "refreshes"):
            assert getattr(after, name) == getattr(row, name), name
        assert row.done or after.planned == row.planned
        assert (after.took_part, after.new, after.failed) == (1, len(positions), 0)
        assert after.forwards == before.forwards + 1 and after.leftpad == row.leftpad
        # What must hold whatever the rule.
        assert after.start >= before.start and (after.end >= before.end or row.eos_bound)
        assert not committed & set(positions), "a position is committed once"
        committed |= set(positions)
        assert positions, "every step commits"
        filled = canvas[0] != MASK
        if row.done and EOS in row.canvas:  # the response after the EOS that ended the row is EOS
            filled[row.canvas.index(EOS) : row.length] = False
        assert torch.equal(batch.canvas[0][filled], canvas[0][filled]), "commits are final"
    assert (batch.canvas != MASK).all()


def test_counts_of_frechet_and_factor():
    # 0.9 alone: 0.9 - 0 - 0.1 = 0.8; with 0.75: 1.65 - 1 - 0.25 = 0.4; with 0.5: 2.15 - 2.5 < 0.
    assert choose([0.5, 0.9, 0.75], "frechet", 0.25) == [1, 2]
    assert choose([0.5, 0.9, 0.75], "frechet", 0.5) == [1]
    # Where only the last rank fails, factor takes all.
    assert choose([0.9, 0.9, 0.1], "factor", 1.0) == [0, 1, 2]
    assert choose([0.9, 0.1, 0.1], "factor", 1.0) == [0]


def test_counts_of_entropy_and_eb():
    assert choose([-1.5, -0.25, -0.5], "entropy", 0.5) == [1, 2]
    # Before the ranks 1, 2 and 3 the entropies sum to 0, 0.25 and 0.75.
    assert choose([-1.5, -0.25, -0.5], "eb", 0.25) == [1, 2]
    assert choose([-1.5, -0.25, -0.5], "eb", 0.75) == [0, 1, 2]


def test_progress_lowers_the_threshold_as_the_block_fills():
    row = Row(1, 4, 4, schedule="naive", cache="none", value=0.8, progress=0.5)
    assert len(row.advance([5] * 4, [0.8, 0.7, 0.8, 0.7])) == 2  # 0.8 while all is masked
    assert len(row.advance([5] * 2, [0.6, 0.5])) == 1  # 0.6 with half of the block masked
    assert row.candidates() == [4]


@pytest.mark.parametrize("steps", [1, 3, 5, 8, 16])
def test_quota_spreads_masks_over_steps(steps):
    row = Row(2, 16, 16, cache="none", rule="quota", steps=steps)
    counts = []
    while not row.done:
        num = len(row.candidates())
        counts.append(len(row.advance([5] * num, [0.5] * num)))
    assert len(counts) == steps and sum(counts) == 16
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1


def test_nan_confidence_commits_nothing_and_is_flagged():
    row = Row(1, 4, 4, cache="none", value=0.5)
    batch = Batch(row, 2)
    before = read_rows(batch.table)[0]
    batch.step(torch.full((2, 4), 7), torch.tensor([[0.9, float("nan"), 0.9, 0.9], [0.9] * 4]))
    assert batch.canvas.tolist() == [row.canvas, [1, 7, 7, 7, 7]]
    after = read_rows(batch.table)
    before.took_part = before.failed = 1  # and nothing else
    assert after[0] == before and after[1].failed == 0


def test_inactive_rows_stay_as_they_are():
    batch = Batch(Row(1, 4, 2, value=0.5), 2)
    before = [x[1].clone() for x in (batch.canvas, batch.table, batch.position)]
    batch.step(torch.full((2, 2), 7), torch.full((2, 2), 0.9), [True, False])
    after = [x[1] for x in (batch.canvas, batch.table, batch.position)]
    assert all(map(torch.equal, after, before)) and batch.table[0, Column.NEW] == 2
    assert not batch.commit[1].any() and not batch.confidence[1].any()


def test_a_spec_keeps_every_value_through_its_code():
    spec = Batch(Row(1, 4, 2, rule="frechet", value=0.1 + 0.2, max_block_length=3)).spec
    assert UnmaskSpec.decode(spec.encode()) == spec
