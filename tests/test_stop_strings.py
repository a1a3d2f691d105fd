"""Stop strings: a row ends where its text before the first mask contains one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import dsb_runtime as dsb
from dsb_kernels.rows import StepKind
from dsb_runtime.engine.engine import Engine
from dsb_runtime.engine.stops import StopStrings
from tests import golden
from tests.golden import biased_to_eos, refusal

BYTES = list(bytes_to_unicode().values())
SHAPE: dict[str, Any] = {"gen_length": 24, "block_length": 8, "threshold": 0.5}
LETTERS = "abcdefgh"


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the golden models' 512 ids: single bytes, and pieces of two or
    three letters. Id 1 is the EOS."""
    pieces = [f"{a}{b}{c}" for a in LETTERS for b in LETTERS for c in ("", "a", "b", "c")]
    vocab = ["<unk>", "<end>", *BYTES, *pieces][:510]
    words = {word: i for i, word in enumerate([*vocab, "<turn>", "<mask>"])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>", mask_token="<mask>",
        extra_special_tokens=["<turn>"],
    )  # fmt: skip


def text_of(ids: list[int]) -> str:
    return str(byte_level().decode(ids, skip_special_tokens=True))


def ids_of(text: str) -> list[int]:
    """One token for each byte."""
    names = bytes_to_unicode()
    return [byte_level().convert_tokens_to_ids(names[byte]) for byte in text.encode()]


def expected(model: Any, ids: Tensor, stop: str, **settings: Any) -> tuple[list[int], int, int]:
    """What a loop would return that decodes without stop strings and looks at the canvas after
    every forward: the response, how many of its tokens count, and the number of forwards."""
    canvases: list[list[int]] = []
    width = ids.shape[1]
    dsb.generate(model, ids, on_step=lambda e: canvases.append(e.canvas[0].tolist()), **settings)
    ends = {model.dsb.mask_id, *(model.dsb.eos_ids if settings["stop_at_eos"] else ())}
    for steps, canvas in enumerate(canvases, start=1):
        response = canvas[width:]
        text = response[: next((i for i, t in enumerate(response) if t in ends), None)]
        for n in range(len(text) + 1):
            if stop in text_of(text[:n]):
                fill = [model.dsb.eos_ids[0]] * (len(response) - n)
                return text[:n] + fill, n, steps
    return response, len(response), len(canvases)


def some_stops(model: Any, ids: Tensor, **settings: Any) -> list[str]:
    """Pieces of the text that the model writes: one that begins and ends inside of tokens, one of
    its first characters, one of its last, and one that it never writes."""
    out = dsb.generate(model, ids, **settings)
    text = text_of(out.sequences[0, ids.shape[1] :].tolist()).replace("\ufffd", "")
    middle = len(text) // 2
    return [text[middle : middle + 3], text[:1], text[-2:], "never"]


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("cache", ["none", "dual", "dsb"])
@pytest.mark.parametrize("schedule", ["naive", "dsb"])
def test_a_row_ends_where_a_plain_loop_would_end_it(family, cache, schedule):
    how = {**SHAPE, "cache": cache, "schedule": schedule, "stop_at_eos": False}
    (ids,), model, early = golden.prompts(1), golden.model(family), 0
    for stop in some_stops(model, ids[None], **how):
        tokens, count, steps = expected(model, ids[None], stop, **how)
        out = dsb.generate(
            model, ids[None], stop_strings=[stop, "nor this"], tokenizer=byte_level(), **how
        )
        assert out.sequences[0].tolist() == ids.tolist() + tokens
        assert (out.row_tokens, out.nfe, out.row_nfe) == ([count], steps, [steps])
        early += count < 24
    assert early >= 2, "some must end early, or this shows nothing"


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("captured", [False, True])
def test_rows_of_a_batch_end_by_themselves(family, captured):
    """Also where steps are captured, for which the prompts get more padding."""
    model, rows = golden.model(family), golden.prompts(3)
    stop = some_stops(model, rows[1][None], **SHAPE)[0]
    engine = Engine(model, capture=(lambda run: run) if captured else None)
    alone = functools.partial(dsb.generate, model, stop_strings=stop, tokenizer=byte_level())
    together = functools.partial(engine.generate, stop_strings=stop, tokenizer=byte_level())
    out = golden.check_batch(together, alone, rows, **SHAPE)
    assert len({*out.row_tokens}) > 1, "one must end early, or this shows nothing"


def test_an_eos_ends_the_text():
    """A stop string that would follow the EOS, or be spelt by the EOS that fill the rest.
    Without `stop_at_eos` the text goes on, while the count ends at the EOS as ever."""
    ids = golden.prompts(1, seed=3)[0][None]
    with biased_to_eos("llada") as model:
        whole = dsb.generate(model, ids, stop_at_eos=False, **SHAPE)
        response = whole.sequences[0, -24:].tolist()
        later = text_of(response[whole.row_tokens[0] :])[-2:]
        stopped = dsb.generate(model, ids, **SHAPE)
        assert later not in text_of(response[: whole.row_tokens[0]])
        for stop in (later, "<end>", "end"):
            out = dsb.generate(model, ids, stop_strings=stop, tokenizer=byte_level(), **SHAPE)
            assert torch.equal(out.sequences, stopped.sequences)
            assert (out.nfe, out.row_tokens) == (stopped.nfe, stopped.row_tokens)
        first = text_of(response).replace("\ufffd", "")[:1]
        for stop_at_eos in (False, True):
            how = {**SHAPE, "stop_at_eos": stop_at_eos}
            tokens, count, steps = expected(model, ids, first, **how)
            out = dsb.generate(model, ids, stop_strings=first, tokenizer=byte_level(), **how)
            assert out.sequences[0, -24:].tolist() == tokens and out.nfe == steps
            assert out.row_tokens == [min(count, whole.row_tokens[0])]


def test_characters_and_special_tokens():
    stops = StopStrings(["né", "<turn>"], byte_level())
    turn, unknown = byte_level().convert_tokens_to_ids(["<turn>", "<unk>"])
    ids = ids_of("un né")
    assert stops.length(ids) == len(ids) == 6, "é has two bytes"
    assert stops.length(ids[:-1]) is None, "half a character completes nothing"
    assert (
        stops.length([*ids[:-1], turn, 50]) == 6 and stops.length([unknown, *ids_of("<")]) is None
    )
    # What the pieces of the next tokens begin with is kept, as transformers keeps it.
    (piece,) = byte_level().convert_tokens_to_ids(["abc"])
    assert StopStrings(["ab"], byte_level()).length([*ids_of("x"), piece, 9]) == 2
    assert StopStrings(["b", "ab"], byte_level()).length([piece, *ids_of("b")]) == 1


def test_what_is_watched_and_recorded_ends_with_the_row():
    model, (ids,) = golden.model("llada"), golden.prompts(1)
    stop = some_stops(model, ids[None], **SHAPE)[0]
    events: list[dsb.StepEvent] = []
    how = {**SHAPE, "stop_strings": [stop], "tokenizer": byte_level()}
    out = dsb.generate(model, ids[None], record=True, on_step=events.append, **how)
    (count,) = out.row_tokens
    assert torch.equal(events[-1].canvas, out.sequences) and len(events) == out.nfe
    assert events[-1].table[0].next_kind == StepKind.NOTHING
    assert out.step_map is not None and out.logprobs is not None
    assert (out.step_map[0, :count] >= 0).all() and (out.step_map[0, count:] == -1).all()
    assert (out.logprobs[0, count:] == 0).all()
    assert torch.equal(dsb.generate(model, ids[None], **how).sequences, out.sequences)


def test_bad_input():
    generate = functools.partial(dsb.generate, golden.model("llada"), torch.tensor([[5]]), **SHAPE)
    with refusal("stop_strings=5: expected a string or a list of strings", kind=TypeError):
        generate(stop_strings=5, tokenizer=byte_level())
    with refusal("stop_strings=['a', 3]: expected a string", kind=TypeError):
        generate(stop_strings=["a", 3], tokenizer=byte_level())
    with refusal("stop_strings=['']: expected some text"):
        generate(stop_strings=[""], tokenizer=byte_level())
    with refusal("tokenizer=NoneType: stop_strings needs the model's tokenizer", kind=TypeError):
        generate(stop_strings=["a"])
    nameless = dsb.load_model(golden.DATA / "llada", dtype="float32", device="cpu", eos_ids=())
    with refusal("stop_strings='a': an EOS fills what follows", "names no EOS id"):
        dsb.generate(nameless, torch.tensor([[5]]), stop_strings="a", tokenizer=byte_level())
    assert generate(stop_strings=[]).row_tokens == generate().row_tokens


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("stop_at_eos", [True, False])
def test_requests_beside_others_end_where_they_end_alone(family, stop_at_eos):
    model, rows = golden.model(family), golden.prompts(3)
    how = {**SHAPE, "stop_at_eos": stop_at_eos, "steps": 12, "threshold": None}
    with biased_to_eos(family):
        stops = [some_stops(model, row[None], **how) for row in rows]
        engine = dsb.BatchEngine(model, max_rows=3)
        wants = [(row, stop) for row, own in zip(rows, stops, strict=True) for stop in own if stop]
        requests = [
            engine.submit(row, stop_strings=stop, tokenizer=byte_level(), record=True, **how)
            for row, stop in wants
        ]
        ended = 0
        for (row, stop), request in zip(wants, requests, strict=True):
            alone = dsb.generate(
                model, row[None], stop_strings=stop, tokenizer=byte_level(), record=True, **how
            )
            out = request.result()
            assert torch.equal(out.sequences, alone.sequences) and out.nfe == alone.nfe
            assert out.row_tokens == alone.row_tokens
            assert torch.equal(out.step_map, alone.step_map)
            ended += out.nfe < 12
        assert ended
