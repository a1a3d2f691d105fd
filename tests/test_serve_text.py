"""Text of a growing response: whole characters, stop strings, the same pieces whatever the cuts."""

from __future__ import annotations

import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsb_runtime.doors.openai.text import HALF, GrowingText

EOS = 256
TEXT = "né €uro 🙂 end"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE({**vocabulary, "<end>": EOS, "<turn>": 257}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", extra_special_tokens=["<turn>"]
    )


def fed(tokenizer, ids: list[int], size: int, *stops: str) -> tuple[list[str], GrowingText]:
    """What is shown of tokens that arrive `size` at a time."""
    text = GrowingText(tokenizer, (EOS,), stops)
    shown = [text.grow(ids[at : at + size]) for at in range(0, len(ids), size)]
    return [*shown, text.finish()], text


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_pieces_are_whole_characters_up_to_the_eos(tokenizer, size):
    ids = [*tokenizer(TEXT).input_ids, EOS, *tokenizer("more").input_ids]
    shown, text = fed(tokenizer, ids, size)
    assert "".join(shown) == TEXT == text.text
    assert not any(HALF in piece for piece in shown)
    pieces = text.pieces()
    assert "".join(piece for piece, _ in pieces) == TEXT
    assert all(TEXT[offset:].startswith(piece) for piece, offset in pieces)


@pytest.mark.parametrize("stops", [(), ("zz",)])
def test_pieces_of_a_long_text_are_those_of_decoding_all_of_it(tokenizer, stops):
    ids = torch.randint(256, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    ids += tokenizer(TEXT * 9 + "zz").input_ids  # random bytes, then characters of several
    text = fed(tokenizer, ids, 7, *stops)[1]
    assert list(text.prefixes()) == [text.decoded(n) for n in range(1, len(text.ids) + 1)]
    assert "".join(piece for piece, _ in text.pieces()) == text.text


def test_a_text_that_depends_on_far_tokens_is_decoded_whole(tokenizer, monkeypatch):
    """As that of a tokenizer whose text begins with the number of its tokens."""
    text = fed(tokenizer, tokenizer(TEXT * 5).input_ids, 100)[1]
    decoded = text.decoded
    monkeypatch.setattr(text, "decoded", lambda n, first=0: f"{n - first:03}" + decoded(n, first))
    text.text = text.decoded(len(text.ids))
    assert "".join(piece for piece, _ in text.pieces()) == text.text


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer):
    ids = tokenizer("a🙂").input_ids[:-1]
    shown, _ = fed(tokenizer, ids, 1)
    assert "".join(shown) == "a" + HALF


STOPS = [("€u",), ("end", "ro"), ("🙂",), ("d",), ("né €uro 🙂 end",), ("never",)]


@pytest.mark.parametrize(("stops", "size"), list(itertools.product(STOPS, [1, 2, 100])))
def test_nothing_of_a_stop_string_is_shown(tokenizer, stops, size):
    ids = tokenizer(TEXT).input_ids
    shown, text = fed(tokenizer, ids, size, *stops)
    ends = [TEXT.index(stop) for stop in stops if stop in TEXT]
    assert "".join(shown) == TEXT[: min(ends, default=None)]
    assert text.stopped == bool(ends)
    # The tokens end with the one that completes a stop string, however they arrive.
    lengths = [len(TEXT[: TEXT.index(s)].encode()) + len(s.encode()) for s in stops if s in TEXT]
    assert len(text.ids) == min(lengths, default=len(ids))


@pytest.mark.parametrize("size", [1, 100])
def test_stop_string_may_be_a_special_token(tokenizer, size):
    ids = [*tokenizer("one").input_ids, 257, *tokenizer("two").input_ids]
    shown, text = fed(tokenizer, ids, size, "<turn>")
    assert "".join(shown) == "one" and text.stopped and len(text.ids) == 4
    assert "".join(fed(tokenizer, ids, size)[0]) == "onetwo"
