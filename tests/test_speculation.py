"""Speculative launches: none is wider than what the rows turn out to need, and none is in vain,
where the window cannot grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dsb_runtime as dsb
from dsb_runtime.engine import loop
from tests.random_models import random_model
from tests.recorded import Recorder

SETTINGS = {"gen_length": 256, "block_length": 32, "steps": 73, "stop_at_eos": False}
IDS = torch.arange(3, 67)[None]
Classes = Counter[tuple[str, int]]  # how many steps of each kind and width


@pytest.fixture(scope="module")
def model():
    plain = random_model("Llama", num_hidden_layers=1, max_position_embeddings=512)
    return dsb.patch(plain, family="llada", mask_id=511)


def run(
    monkeypatch, model, on_step: Callable | None, capture: Any = None, **settings: Any
) -> tuple[Classes, ...]:
    """The steps that were needed, those that were launched, and those of them that were guessed."""
    # Where only the launches matter, no step need be recorded to be captured.
    engine = dsb.Engine(model, capture=capture or (lambda step: step))
    needed, launched, guessed = [], [], []
    launch, next_step, speculate = engine.loop.launch, loop.next_step, loop.speculate
    with monkeypatch.context() as patches:
        patches.setattr(engine.loop, "launch", lambda *a: launched.append(a[1]) or launch(*a))
        patches.setattr(loop, "next_step", lambda *a: needed.append(next_step(*a)) or needed[-1])
        patches.setattr(loop, "speculate", lambda *a: guessed.append(speculate(*a)) or guessed[-1])
        out = engine.generate(IDS, on_step=on_step, **settings)
    assert len(needed) == len(launched) + 1, "the last one is None"
    lists = ([shape for shape in x if shape is not None] for x in (needed, launched, guessed))
    counts = [Counter((shape.kind.label, shape.width) for shape in x) for x in lists]
    counts[1]["in vain"] = len(launched) - out.nfe
    return tuple(+count for count in counts)


@pytest.mark.parametrize("prefix", [0, 24, 32, 96])
@pytest.mark.parametrize("bound", [32, None])
def test_a_guess_stays_in_its_width_class(monkeypatch, model, bound, prefix):
    """A window that has a bound is certain but for refreshes, unless its prefix is what the block
    has just moved by."""
    settings = SETTINGS | {"max_block_length": bound, "prefix_window": prefix}
    needed, launched, guessed = run(monkeypatch, model, None, **settings)
    print(f"needed: {needed}\nlaunched: {launched}\nof these guessed: {guessed}")
    assert guessed or (bound, prefix) != (None, 0), "then a window is as wide as the commits say"
    if bound is None:
        assert (launched - needed).total() <= 2
    else:
        assert launched == needed
        assert prefix == 0 or guessed.total() >= 50


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [0, 24, 32, 96])
@pytest.mark.parametrize("bound", [32, None])
def test_recorded_steps_are_of_the_classes_of_a_watched_run(monkeypatch, model, bound, prefix):
    """A watched run guesses nothing. Both replay what they have recorded."""
    settings = SETTINGS | {"max_block_length": bound, "prefix_window": prefix}
    _, watched, none = run(monkeypatch, model, lambda event: None, Recorder(), **settings)
    _, launched, _ = run(monkeypatch, model, None, Recorder(), **settings)
    assert not none and (launched - watched).total() <= (2 if bound is None else 0)
    assert (watched - launched).total() <= (2 if bound is None else 0)


def test_a_naive_schedule_that_is_watched_launches_the_same(monkeypatch, model):
    settings = SETTINGS | {"gen_length": 128, "steps": 40, "schedule": "naive", "cache": "dual"}
    _, watched, none = run(monkeypatch, model, lambda event: None, **settings)
    _, launched, guessed = run(monkeypatch, model, None, **settings)
    assert launched == watched and not none
    assert guessed.total() >= 24
