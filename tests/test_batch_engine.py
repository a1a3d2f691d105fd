"""Continuous batching: a request gets what its prompt gets alone, whatever comes and goes."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import dsb_runtime as dsb
from dsb_runtime.engine import batcher, lane
from dsb_runtime.engine.batcher import READ_AHEAD, Batcher
from dsb_runtime.engine.cache import cache_shape_of
from tests import golden
from tests.commands import python
from tests.golden import biased_to_eos, prompts, refusal
from tests.recorded import Recorder

SHAPE = {"gen_length": 16, "block_length": 8}
# Settings of every kind; those of one family only are left out for the other.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"gen_length": 24},
    {"gen_length": 9, "stop_at_eos": False},
    {"threshold": 0.6, "cache": "dual", "schedule": "naive"},
    {"cache": "none", "threshold": 0.5},
    {"steps": 16, "schedule": "naive"},
    {"gen_length": 32, "steps": 8},
    {"factor": 1.0, "max_block_length": 8},
    {"eb": 1.0, "refresh_policy": "response", "full_refresh_every": 3},
    {"threshold": 0.9, "block_length": 2, "refresh_policy": "response"},
    {"temperature": 0.8},
    {"temperature": 0.8, "gen_length": 24, "stop_at_eos": False},
    {"temperature": 0.5, "top_p": 0.9, "steps": 16, "confidence_temperature": 0.3},
    {"steps": 16, "confidence": "random"},
    {"cfg_scale": 1.5, "threshold": 0.6},
    {"cfg_scale": 1.5, "threshold": 0.6, "cache": "none"},
    {"context_masks": 2, "eos_bound": True, "threshold": 0.6},
    {"banned_tokens": (12, 300), "min_new_tokens": 6, "suffix_window": 3},
]


def settings_of(family: str) -> list[dict[str, Any]]:
    return [
        {**SHAPE, **each} for each in SETTINGS if family == "dream" or "top_p" not in each
    ]  # fmt: skip


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check(out: dsb.GenerationOutput, expected: dsb.GenerationOutput) -> None:
    """The same tokens in the same forwards, and the same record."""
    assert torch.equal(out.sequences, expected.sequences)
    assert out.tokens_per_forward == expected.tokens_per_forward
    assert (out.nfe, out.row_nfe) == (expected.nfe, expected.row_nfe)
    assert out.row_tokens == expected.row_tokens
    assert (out.step_map is None) == (expected.step_map is None)
    if out.step_map is not None:
        assert torch.equal(out.step_map, expected.step_map)
        golden.check_logprobs(out.logprobs, expected.logprobs)


def alone(model: PreTrainedModel, prompt: torch.Tensor, seed: int = 0, **settings: Any):
    return dsb.generate(model, prompt[None], generator=seeded(seed), **settings)


# --- every request is as if it were alone ----------------------------------------------------


@st.composite
def scripts(draw: st.DrawFn, most: int) -> dict[str, Any]:
    """Who comes when, with which settings, and who is cancelled how many rounds later."""
    family = draw(st.sampled_from(golden.FAMILIES))
    request = st.fixed_dictionaries({
        "length": st.integers(1, 70),
        "seed": st.integers(0, 3),
        "record": st.booleans(),
        "arrives": st.integers(0, 12),
        "cancelled": st.sampled_from([None, None, None, 0, 1, 3]),
        "settings": st.sampled_from(settings_of(family)),
    })  # fmt: skip
    requests = draw(st.lists(request, min_size=2, max_size=most))
    return {"family": family, "max_rows": draw(st.integers(1, 5)), "requests": requests}


def check_script(script: dict[str, Any], captured: bool) -> None:
    model, asked = golden.model(script["family"]), script["requests"]
    comes, goes = defaultdict(list), defaultdict(list)
    texts = prompts(1, seed=len(asked))[0].repeat(14)
    for i, each in enumerate(asked):
        comes[each["arrives"]].append(i)
        if each["cancelled"] is not None:
            goes[each["arrives"] + each["cancelled"]].append(i)
    with biased_to_eos(script["family"]):
        rows = Batcher(model, script["max_rows"], capture=Recorder() if captured else None)
        made: dict[int, dsb.Request] = {}
        for now in range(10_000):
            for i in comes.pop(now, []):
                each, ids = asked[i], (texts[: asked[i]["length"]] + i) % 500 + 2
                made[i] = dsb.Request(
                    model, ids, None, seeded(each["seed"]), each["record"], **each["settings"]
                )
                rows.waiting.append(made[i])
            for i in goes.pop(now, []):
                made[i].cancel()
            for request in rows.run(lambda done: True) if not rows.idle else []:
                request.settle()
            assert rows.running <= script["max_rows"]
            if rows.idle and not comes and not goes:
                break
        for i, request in made.items():
            each = asked[i]
            if not request.cancelled():
                expected = alone(
                    model, request.ids, each["seed"], record=each["record"], **each["settings"]
                )
                check(request.result(timeout=0), expected)


@settings(max_examples=6, deadline=None)
@given(script=scripts(5))
def test_rows_that_come_and_go(script):
    check_script(script, captured=False)


@settings(max_examples=3, deadline=None)
@given(script=scripts(3))
def test_rows_that_come_and_go_captured(script):
    check_script(script, captured=True)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(script=scripts(14), captured=st.booleans())
def test_many_rows_that_come_and_go(script, captured):
    check_script(script, captured)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_generate_batch_is_a_loop_over_generate(family):
    """With one generator, which every prompt draws its seed from."""
    how = {"gen_length": 16, "block_length": 8, "temperature": 0.7}
    rows = [*prompts(5), *prompts(3, seed=1)]
    with biased_to_eos(family) as model:
        source = seeded(7)
        expected = [dsb.generate(model, row[None], generator=source, **how) for row in rows]
        ids = (row.tolist() if i % 2 else row for i, row in enumerate(rows))
        outs = dict(dsb.generate_batch(model, ids, max_rows=3, generator=seeded(7), **how))
    assert sorted(outs) == list(range(8))
    for i, out in outs.items():
        check(out, expected[i])


def test_a_wrapped_model_is_called():
    model, calls = golden.model("llada"), []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    try:
        for i, out in dsb.generate_batch(model, prompts(4), max_rows=2, **SHAPE):
            check(out, alone(model, prompts(4)[i], **SHAPE))
    finally:
        hook.remove()
    assert calls


# --- threads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("captured", [False, True])
def test_threads_submit_at_once(captured):
    rows, together = prompts(6), threading.Barrier(3)
    with biased_to_eos("llada") as model:
        engine = dsb.BatchEngine(model, max_rows=2, capture=Recorder() if captured else None)
        wants = [{**SHAPE, **(SETTINGS[i] if i else {"temperature": 0.6})} for i in (0, 1, 4)]

        def submit(which: int) -> list[dsb.Request]:
            together.wait()
            return [engine.submit(row, generator=seeded(5), **wants[which]) for row in rows]

        with ThreadPoolExecutor(3) as pool:
            requests = list(pool.map(submit, range(3)))
        for want, mine in zip(wants, requests, strict=True):
            assert wait(mine, timeout=120).not_done == set()
            for row, request in zip(rows, mine, strict=True):
                check(request.result(), alone(model, row, 5, **want))
        engine.drain()
        assert engine.worker.thread is None and engine.batcher.idle


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("schedule", ["dsb", "naive"])
def test_the_finished_prefix_grows(family, schedule):
    how, told = {**SHAPE, "schedule": schedule, "steps": 16, "stop_at_eos": False}, []
    with biased_to_eos(family) as model:
        engine = dsb.BatchEngine(model, max_rows=2)
        requests = [engine.submit(row, on_tokens=told.append, **how) for row in prompts(1)]
        requests += [engine.submit(row, **how) for row in prompts(3)]
        for request in requests:
            pieces = list(request)
            out = request.result()
            expected = out.sequences[0, len(request.ids) :][: out.row_tokens[0]].tolist()
            assert [*chain(*pieces)] == expected and all(pieces)
            assert list(request) == [expected]  # again, from the beginning
    assert len(told) > 1 and [*chain(*told)] == [*chain(*requests[0])]


def test_cancel_frees_the_row():
    model = golden.model("llada")
    engine = dsb.BatchEngine(model, max_rows=1)
    began = threading.Event()
    slow = {"gen_length": 64, "steps": 64, "stop_at_eos": False}
    first = engine.submit(prompts(1)[0], on_tokens=lambda _: began.set(), **slow)
    second = engine.submit(prompts(2)[1], **SHAPE)
    assert began.wait(60) and first.cancel() and not second.done()
    with pytest.raises(CancelledError):
        first.result()
    with pytest.raises(CancelledError):
        list(first)
    check(second.result(), alone(model, prompts(2)[1], **SHAPE))
    assert wait([first], timeout=0).done and not second.cancel()


def test_the_model_is_as_before_once_all_results_are_there():
    model = golden.model("llada")
    engine = dsb.BatchEngine(model)
    model.train()
    try:
        for _ in range(3):
            [r.result() for r in [engine.submit(row, **SHAPE) for row in prompts(3)]]
            assert all(module.training for module in model.modules())
    finally:
        model.eval()


@pytest.mark.parametrize("captured", [False, True])
def test_weights_are_replaced_between_requests(captured):
    model = golden.model("llada")
    engine = dsb.BatchEngine(model, capture=Recorder() if captured else None)
    own, row = model.lm_head.weight.data, prompts(2)[1]
    before = engine.submit(row, **SHAPE).result()
    engine.drain()
    try:
        model.lm_head.weight.data = own.flip(0).contiguous()  # at another address
        after = engine.submit(row, **SHAPE).result()
        check(after, alone(model, row, **SHAPE))
        engine.drain()
        model.lm_head.weight.data.copy_(own)  # in place
        check(engine.submit(row, **SHAPE).result(), before)
    finally:
        engine.release()
        model.lm_head.weight.data = own
    assert not torch.equal(before.sequences, after.sequences)


# --- memory -----------------------------------------------------------------------------------


def test_prompts_are_read_as_rows_get_free():
    read = 0

    def endless() -> Iterator[torch.Tensor]:
        nonlocal read
        while True:
            read += 1
            yield prompts(3)[read % 3]

    outs = dsb.generate_batch(golden.model("llada"), endless(), max_rows=3, **SHAPE)
    for done, _ in enumerate(outs):
        assert read <= done + 1 + 3 + READ_AHEAD
        if done == 20:
            break


def test_memory_is_bounded(monkeypatch):
    """Half of what is free has room for two short rows: then two are decoded at a time, whatever
    their settings, and a prompt that is too long is refused by itself."""
    model = golden.model("llada")
    row = lane.row_bytes(cache_shape_of(model), 64)
    monkeypatch.setattr(batcher, "free_bytes", lambda device: 5 * row)
    engine = dsb.BatchEngine(model)
    waiting: list[int] = []
    step = lane.Lane.step

    def counted(self):
        used = sum(each.nbytes for each in engine.batcher.lanes)
        waiting.append(engine.running)
        assert used <= 5 * row // 2
        return step(self)

    monkeypatch.setattr(lane.Lane, "step", counted)
    requests = [
        engine.submit(each, **{**SHAPE, "temperature": 0.1 * (i // 3)})
        for i, each in enumerate(prompts(5))
    ]
    long = engine.submit(torch.arange(2, 302), **SHAPE)
    last = engine.submit(prompts(1)[0], **SHAPE)
    for request in (requests[0], requests[3], last):
        check(request.result(60), alone(model, request.ids, **SHAPE))
    with refusal(
        "gen_length=16 after a prompt of 300", "expected at most", kind=torch.OutOfMemoryError
    ):
        long.result(60)
    assert max(waiting) == 2


def test_arrivals_keep_nobody_waiting_for_long():
    """A crowd of arrivals is refreshed in parts, between which the others have their windows."""
    model = golden.model("llada")
    batcher = Batcher(model, 16)
    how = partial(dsb.Request, model, gen_length=32, block_length=32, steps=32, config=None)
    batcher.waiting.append(how(ids=prompts(1)[0]))
    batcher.run(lambda done: True)
    for row in prompts(4) * 4:
        batcher.waiting.append(how(ids=row))
    kinds = []
    for _ in range(6):
        batcher.run(lambda done: True)
        table = batcher.lanes[0].table
        kinds.append((table[0].took_part, sum(row.took_part for row in table)))
    assert kinds[:4] == [(1, 1), (0, 4), (1, 5), (0, 8)]
    assert kinds[4:] == [(1, 13), (0, 3)]


# --- processes --------------------------------------------------------------------------------


LEFT_BEHIND = """
import os, sys, torch
import dsb_runtime as dsb
from tests import golden
torch.set_num_threads(1)
model = golden.model("llada")
engine = dsb.BatchEngine(model, max_rows=2)
slow = {"gen_length": 64, "steps": 64, "stop_at_eos": False}
left = [engine.submit([5, 6, 7], **slow) for _ in range(400)]
next(iter(left[0]))
child = os.fork()
out = engine.submit([8, 9], gen_length=8)
if child == 0:
    same = dsb.generate(model, torch.tensor([[8, 9]]), gen_length=8).sequences
    os._exit(0 if torch.equal(out.result(60).sequences, same) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), left[-1].done())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_begins_anew_and_an_exit_does_not_wait():
    assert python("-c", LEFT_BEHIND, timeout=120).stdout.split() == ["0", "False"]
