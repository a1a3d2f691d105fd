"""Captured steps serve prompts of many lengths, and refresh each of them by the same kernels."""

from __future__ import annotations

import pytest
import torch

import dsb_runtime as dsb
from dsb_kernels.rows import StepKind, read_rows
from dsb_runtime.engine.graphs import length_class, refresh_class
from dsb_runtime.engine.session import next_step
from tests.random_models import random_model
from tests.recorded import Recorder

SETTINGS = {"block_length": 8, "max_block_length": 8, "prefix_window": 8, "stop_at_eos": False}


@pytest.fixture(scope="module")
def model():
    plain = random_model("Llama", num_hidden_layers=1, max_position_embeddings=2100)
    return dsb.patch(plain, family="llada", mask_id=511)


def prompt(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, 500, (1, length), generator=generator)


def captures(monkeypatch, engine, lengths: list[int], gen_length: int = 16) -> list[tuple]:
    """What is captured for prompts of these lengths: the canvas and the step's shape. No refresh
    computes many more positions than the prompt has."""
    captured, launch = [], engine.loop.launch

    def watch(session, shape):
        if shape not in session.replays:
            captured.append((session.state.canvas.shape[1], shape))
        if shape.kind == StepKind.REFRESH:
            extra = shape.width - (length + gen_length)
            assert 0 <= extra < min(64, max(16, (length + gen_length) / 16))
        return launch(session, shape)

    with monkeypatch.context() as patches:
        patches.setattr(engine.loop, "launch", watch)
        for length in lengths:
            engine.generate(
                prompt(length), gen_length=gen_length, steps=gen_length // 4, **SETTINGS
            )
    return captured


def test_a_set_of_captures_serves_all_lengths_of_a_class(monkeypatch, model):
    """In any order of the lengths: longer prompts grow the canvas by a class at a time, and what is
    captured for the longest serves every other."""
    engine = dsb.Engine(model, capture=lambda step: step)
    lengths = torch.randint(100, 2001, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    captured = captures(monkeypatch, engine, lengths)
    assert len(set(captured)) == len(captured), "nothing is captured twice"
    windows = [shape for _, shape in captured if shape.kind == StepKind.WINDOW]
    canvases = {canvas for canvas, _ in captured}
    assert len(windows) == len(canvases) <= len({length_class(n + 16) for n in lengths})
    # On the longest canvas, the refreshes of the shorter prompts are captured once more.
    again = captures(monkeypatch, engine, lengths)
    assert {shape.kind for _, shape in again} == {StepKind.REFRESH}
    assert captures(monkeypatch, engine, lengths) == []


@pytest.mark.parametrize("seed", range(3))
def test_200_prompts_take_a_set_of_captures_for_each_class(monkeypatch, model, seed):
    """Sessions and shapes are real; no step runs. A refresh follows from the prompt's length, and
    windows do not depend on it, so that those of one decoding stand for all."""
    settings = {"gen_length": 64, "block_length": 32, "max_block_length": 32, "steps": 16}
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(100, 2001, (200,), generator=generator).tolist()
    engine, windows = dsb.Engine(model, capture=lambda step: step), set()
    launch = engine.loop.launch
    with monkeypatch.context() as patches:
        patches.setattr(engine.loop, "launch", lambda *a: windows.add(a[1]) or launch(*a))
        engine.generate(prompt(100), stop_at_eos=False, **settings)
    windows = {shape for shape in windows if shape.kind == StepKind.WINDOW}
    engine, captured, in_vain = dsb.Engine(model, capture=lambda step: step), [], 0
    config = dsb.DecodingConfig(**settings)
    for length in lengths:
        canvas = torch.cat([prompt(length), torch.full((1, 64), 511)], 1)
        leftpad = torch.zeros(1, dtype=torch.int32)
        session = engine.loop.session(config, canvas, leftpad, roomy=True)
        refresh = next_step(session, read_rows(session.state.table))
        assert refresh is not None and refresh.kind == StepKind.REFRESH
        in_vain += refresh.width - (length + 64)
        for shape in {refresh, *windows} - session.replays.keys():
            session.replays[shape] = lambda: None
            captured.append((session.state.canvas.shape[1], shape))
    canvases = {canvas for canvas, _ in captured}
    refreshes = sum(shape.kind == StepKind.REFRESH for _, shape in captured)
    alone = misses_of_multiples(lengths)
    print(
        f"{len(captured)} captures on {len(canvases)} canvases, of refreshes {refreshes}; "
        f"{in_vain / 200:.1f} positions in vain, each; padded to multiples of 64: "
        f"{alone * (1 + len(windows))} captures"
    )
    assert len(set(captured)) == len(captured), "nothing is captured twice"
    assert len(captured) - refreshes == len(windows) * len(canvases)
    assert len(canvases) <= len({length_class(n + 64) for n in lengths})
    assert refreshes <= len(canvases) * len({refresh_class(n + 64, 9999) for n in lengths})


def misses_of_multiples(lengths: list[int]) -> int:
    """How often none of 8 canvases that are kept has a prompt's length, a multiple of 64."""
    kept: list[int] = []
    misses = 0
    for length in lengths:
        canvas = -(-(length + 64) // 64)
        misses += canvas not in kept
        kept = [canvas, *(other for other in kept if other != canvas)][:8]
    return misses


def test_a_recorded_step_is_right_for_every_length(model):
    captured, direct = dsb.Engine(model, capture=Recorder()), dsb.Engine(model)
    recordings = []
    for length in 2 * (93, 40, 90, 41, 85):
        for gen_length in (24, 16):
            settings = {"gen_length": gen_length, "steps": 6, "record": True, **SETTINGS}
            out, expected = (e.generate(prompt(length), **settings) for e in (captured, direct))
            assert torch.equal(out.sequences, expected.sequences)
            assert torch.equal(out.step_map, expected.step_map) and out.nfe == expected.nfe
        recordings.append(len(captured.loop.capture.recordings))
    assert len(captured.loop.sessions) == 1 and recordings[4] == recordings[-1]
    widths = {refresh_class(n + g, 128) for n in (93, 40, 90, 41, 85) for g in (16, 24)}
    assert recordings[-1] <= len(widths) + 2, "the windows' classes are two at most"


def test_no_canvas_is_longer_than_the_rotary_table_allows():
    """Dynamic RoPE has other angles for texts that are longer than those of the training."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    plain = random_model("Llama", max_position_embeddings=100, rope_parameters=rope)
    model = dsb.patch(plain, family="llada", mask_id=511)
    settings = {"gen_length": 20, "record": True, **SETTINGS}
    expected = dsb.Engine(model).generate(prompt(76), **settings)
    captured = dsb.Engine(model, capture=lambda step: step)
    lane = dsb.BatchEngine(model).submit(prompt(76)[0], **settings).result(60)
    for out in (captured.generate(prompt(76), **settings), lane):
        assert torch.equal(out.sequences, expected.sequences)
        torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=0, atol=1e-5)


def test_classes_of_lengths():
    assert [length_class(n) for n in (1, 64, 65, 1024, 1025, 1281)] == [
        64,
        64,
        80,
        1024,
        1280,
        1536,
    ]
    for n in range(64, 5000):
        assert n <= length_class(n) < 1.25 * n + 1
        assert (
            n <= refresh_class(n, 9999) < n + min(64, max(16, n / 16)) and refresh_class(n, n) == n
        )
