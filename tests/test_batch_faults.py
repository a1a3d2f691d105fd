"""Continuous batching: a request that fails, fails alone, and leaves the others as they are."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel

import dsb_runtime as dsb
from dsb_runtime.engine import lane
from dsb_runtime.engine.batcher import Batcher
from tests import golden
from tests.golden import prompts, refusal
from tests.test_batch_engine import SHAPE, alone, check
from tests.test_stop_strings import byte_level


def interrupted_once(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the third launch of a step raise."""
    launch, count = lane.Lane.launch, iter(range(10**6))

    def raising(self, shape):
        if next(count) == 2:
            raise error
        return launch(self, shape)

    monkeypatch.setattr(lane.Lane, "launch", raising)


def test_an_interrupt_gives_the_model_back(monkeypatch):
    model = golden.model("llada").train()
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupted_once(patch, KeyboardInterrupt())
            list(dsb.generate_batch(model, prompts(4), max_rows=2, **SHAPE))
        assert model.training
        outs = dict(dsb.generate_batch(model, prompts(4), max_rows=2, **SHAPE))
        assert model.training and len(outs) == 4
    finally:
        model.eval()


# --- what fails, fails alone -------------------------------------------------------------------


def check_others(model: PreTrainedModel, requests: list[dsb.Request], failed: int) -> BaseException:
    """All but one request get what they get alone. Returns the error of that one."""
    for i, request in enumerate(requests):
        if i != failed:
            check(request.result(60), alone(model, request.ids, **SHAPE))
    error = requests[failed].exception(60)
    assert error is not None
    return error


def test_a_callback_that_raises():
    def broken(tokens: list[int]) -> None:
        raise KeyError(tokens[0])

    model = golden.model("llada")
    engine = dsb.BatchEngine(model, max_rows=3)
    requests = [
        engine.submit(row, on_tokens=broken if i == 1 else None, **SHAPE)
        for i, row in enumerate(prompts(5))
    ]
    assert isinstance(check_others(model, requests, 1), KeyError)


def test_a_tokenizer_that_raises(monkeypatch):
    model, tokenizer = golden.model("llada"), byte_level()
    monkeypatch.setattr(tokenizer, "decode", mock.Mock(side_effect=LookupError))
    engine = dsb.BatchEngine(model, max_rows=2)
    requests = [
        engine.submit(row, stop_strings="a" if i == 1 else None, tokenizer=tokenizer, **SHAPE)
        for i, row in enumerate(prompts(3))
    ]
    assert isinstance(check_others(model, requests, 1), LookupError)


def test_a_request_that_cannot_enter_a_row(monkeypatch):
    enter = lane.Lane.enter

    def entering(self, request):
        if len(request.ids) == 14:
            raise MemoryError
        enter(self, request)

    monkeypatch.setattr(lane.Lane, "enter", entering)
    model = golden.model("llada")
    engine = dsb.BatchEngine(model, max_rows=3)
    requests = [engine.submit(row, **SHAPE) for row in prompts(6)]
    assert isinstance(check_others(model, requests, 1), MemoryError)


def test_a_done_callback_that_exits():
    engine, there = dsb.BatchEngine(golden.model("llada")), threading.Event()
    first = engine.submit([5, 6], on_tokens=lambda _: there.wait(60), gen_length=1)
    first.add_done_callback(lambda _: sys.exit())
    reader = ThreadPoolExecutor(1).submit(list, first)
    there.set()
    assert first.result(60).nfe == 1 and reader.result(60)
    assert engine.submit([5, 6], gen_length=1).result(60).nfe == 1


def test_a_fault_of_ours_keeps_what_is_done(monkeypatch):
    """One lane has finished its request when the other fails, and a third request waits."""
    model, next_shape = golden.model("llada"), lane.Lane.next_shape

    def faulty(self):
        if self.requests[0].config.cache == "none":
            raise LookupError
        return next_shape(self)

    monkeypatch.setattr(lane.Lane, "next_shape", faulty)
    rows = Batcher(model, max_rows=2)
    first, *others = (
        dsb.Request(model, [5, 6], None, gen_length=1, cache=cache)
        for cache in ("dsb", "none", "dsb")
    )
    rows.waiting.extend([first, *others])
    with pytest.raises(LookupError) as raised:
        rows.run(bool)
    assert rows.abandon(raised.value) == [first, *others] and rows.idle
    check(first.outcome, dsb.generate(model, first.ids[None], gen_length=1))
    assert all(request.outcome is raised.value for request in others)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("cache", ["dsb", "none"])
def test_nan_logits(cache, wrapped):
    """One token's embedding is NaN. Later requests that take the row have padding there."""
    model, poison = golden.model("llada"), 77
    embedding = model.get_input_embeddings().weight.data
    own, how = embedding[poison].clone(), {**SHAPE, "cache": cache}
    embedding[poison] = torch.nan
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: None) if wrapped else None
    try:
        rows = [row[row != poison] for row in prompts(5)]
        rows[2] = torch.cat([torch.tensor([poison]).repeat(30), rows[2]])
        engine = dsb.BatchEngine(model, max_rows=2)
        requests = [engine.submit(row, **how) for row in rows]
        for i, request in enumerate(requests):
            if i != 2:
                check(request.result(60), alone(model, rows[i], **how))
        message = str(requests[2].exception(60))
        assert message == "step 0: the model's logits are NaN (row 0)"
        with pytest.raises(FloatingPointError, match="step 0: the model's logits are NaN"):
            alone(model, rows[2], **how)
        # In a batch, whose next call has padding where the NaN were.
        check(alone(model, rows[1], **how), requests[1].result())
    finally:
        embedding[poison] = own
        if hook is not None:
            hook.remove()


@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_step_that_runs_out_of_memory(monkeypatch, most):
    """Steps of more than `most` rows find no memory, and other ones go on."""
    launch = lane.Lane.launch

    def limited(self, shape):
        if shape.num_rows > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return launch(self, shape)

    monkeypatch.setattr(lane.Lane, "launch", limited)
    model = golden.model("llada")
    engine = dsb.BatchEngine(model, max_rows=4)
    requests = [engine.submit(row, **SHAPE) for row in prompts(6)]
    for request in requests:
        if most:
            check(request.result(60), alone(model, request.ids, **SHAPE))
        else:
            with refusal("a refresh step of 1 x", "Tried", kind=torch.OutOfMemoryError):
                request.result(60)


def test_a_step_that_raises(monkeypatch):
    """A model's own hook, for example, may raise for one row: only that request fails."""
    launch = lane.Lane.launch

    def raising(self, shape):
        needs = [
            i for i in self.occupied
            if self.table[i].next_kind == shape.kind
        ][: shape.num_rows]  # fmt: skip
        if any(len(self.requests[i].ids) == 14 for i in needs):
            raise LookupError("not this one")
        return launch(self, shape)

    monkeypatch.setattr(lane.Lane, "launch", raising)
    model = golden.model("llada")
    engine = dsb.BatchEngine(model, max_rows=4)
    requests = [engine.submit(row, **SHAPE) for row in prompts(6)]
    assert str(check_others(model, requests, 1)) == "not this one"


def test_a_failed_prompt_does_not_stop_the_others():
    model = golden.model("llada")
    rows: list[Any] = [*prompts(3), [], "text", [1.5], [600], prompts(1)[0][None]]
    outs = {}
    with refusal("prompt 3: ids: an empty prompt", "(5 prompts failed)", kind=RuntimeError):
        for i, out in dsb.generate_batch(model, iter(rows), **SHAPE):
            outs[i] = out
    assert sorted(outs) == [0, 1, 2]


@pytest.mark.parametrize("bad", [False, True])
def test_prompts_that_raise_lose_none_that_were_read(bad):
    model, rows = golden.model("llada"), prompts(5)

    def source() -> Iterator[Any]:
        yield from rows[:4]
        yield [] if bad else rows[4]
        raise OSError("line 6 cannot be read")

    outs = {}
    with pytest.raises(OSError, match="line 6 cannot be read") as raised:
        for i, out in dsb.generate_batch(model, source(), max_rows=2, **SHAPE):
            outs[i] = out
    assert sorted(outs) == list(range(4 if bad else 5))
    for i, out in outs.items():
        check(out, alone(model, rows[i], **SHAPE))
    failure = raised.value.__context__
    assert str(failure).startswith("prompt 4: ids: an empty prompt") if bad else failure is None


def test_prompts_stay_the_callers():
    rows = (row for row in prompts(2) * 20)
    next(dsb.generate_batch(golden.model("llada"), rows, max_rows=1, **SHAPE))
    assert len(list(rows)) > 20


@pytest.mark.parametrize("name", ["drain", "release"])
def test_the_decoding_thread_does_not_wait_for_itself(name):
    engine, said = dsb.BatchEngine(golden.model("llada")), []

    def ask(*_: Any) -> None:
        try:
            getattr(engine, name)()
        except RuntimeError as error:
            said.append(str(error))

    there = threading.Event()
    engine.submit([5, 6], on_step=ask, gen_length=1)
    engine.submit([5, 6], on_tokens=ask, gen_length=1)
    last = engine.submit([5, 6], on_tokens=lambda _: there.wait(60), gen_length=1)
    last.add_done_callback(ask)
    there.set()
    engine.drain()
    expected = f"BatchEngine.{name}: called in the decoding thread, by a request's on_tokens, "
    assert len(said) == 3 and all(each.startswith(expected) for each in said)


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"max_rows": 0}, ValueError, "max_rows=0: expected an int >= 1"),
        ({"max_rows": 1.5}, TypeError, "max_rows=1.5"),
        ({"gen_length": 0}, ValueError, "gen_length=0"),
        ({"gen_length": 9000}, ValueError, "gen_length=9000 after a prompt of 1 needs 9001 pos"),
        ({"config": 3}, TypeError, "config=3: expected a DecodingConfig"),
        ({"generator": 3}, TypeError, "generator=int"),
        ({"top_p": 0.9}, ValueError, "top_p=0.9: llada samples"),
        ({"banned_tokens": (9999,)}, ValueError, "banned_tokens has 9999: expected ids"),
        ({"record": 1}, TypeError, "record=1"),
        ({"bloc": 3}, TypeError, "bloc=3: expected one of"),
    ],
)
def test_bad_input_is_refused_at_once(arguments, kind, said):
    with refusal(said, kind=kind):
        dsb.generate_batch(golden.model("llada"), [], **arguments)


@pytest.mark.parametrize(
    ("ids", "arguments", "kind", "said"),
    [
        ([], {}, ValueError, "an empty prompt"),
        (torch.ones(2, 3, dtype=torch.int64), {}, ValueError, "ids has shape (2, 3)"),
        (torch.ones(3), {}, TypeError, "ids has dtype torch.float32"),
        ([True], {}, TypeError, "ids[0]=True: expected a token id"),
        ([-1], {}, ValueError, "-1: expected ids from 0 to 511"),
        ([511], {}, ValueError, "the mask id inside a prompt"),
        ([5] * 9000, {}, ValueError, "positions: expected at most the model's"),
        ([5], {"on_tokens": 3}, TypeError, "on_tokens=3"),
        ([5], {"record": 1}, TypeError, "record=1"),
    ],
)
def test_bad_requests_are_refused(ids, arguments, kind, said):
    engine = dsb.BatchEngine(golden.model("llada"))
    with refusal(said, kind=kind):
        engine.submit(ids, **SHAPE, **arguments)
    assert engine.worker.thread is None
