"""What generate and DecodingConfig refuse: a message of one line, before any compute."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import dsb_runtime as dsb
from tests import golden

NAN = math.nan
PROMPT = torch.tensor([[5, 6, 7, 8]])
SHAPE = {"gen_length": 16, "block_length": 8}


@pytest.fixture(params=golden.FAMILIES)
def model(request) -> PreTrainedModel:
    return golden.model(request.param)


@contextlib.contextmanager
def no_compute(model: PreTrainedModel) -> Iterator[None]:
    """Fails when any module of the model runs."""
    ran: list[str] = []
    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            hook = module.register_forward_pre_hook(lambda m, _: ran.append(type(m).__name__))
            hooks.enter_context(hook)
        yield
    assert not ran


def refused(
    model: PreTrainedModel, kind: type[Exception], *said: str, ids: Any = PROMPT, **arguments: Any
) -> None:
    """generate raises `kind` before any compute, with one line that holds all of `said`."""
    with no_compute(model), golden.refusal(*said, kind=kind):
        dsb.generate(model, ids, **arguments)


# --- settings ---------------------------------------------------------------------------------

WRONG_VALUES = [
    ({"gen_length": 0}, "gen_length=0: expected an int >= 1"),
    ({"gen_length": 10**20}, f"gen_length={10**20}: expected an int from 1 to 2147483647"),
    ({"max_block_length": 2**63 - 1}, "expected an int from 8 to 2147483647"),
    ({"full_refresh_every": 2**31, "refresh_policy": "response"}, "an int from 2 to 2147483647"),
    ({"block_length": 0}, "block_length=0: expected an int from 1 to 16"),
    ({"block_length": 17}, "block_length=17: expected an int from 1 to 16 (at most gen_length)"),
    ({"max_block_length": 7}, "max_block_length=7: expected an int >= 8 (at least block_length)"),
    ({"max_block_length": 8, "schedule": "naive"}, "max_block_length=8: only schedule='dsb'"),
    ({"schedule": "greedy"}, "schedule='greedy': expected one of dsb, naive"),
    ({"cache": "prefix"}, "cache='prefix': expected one of dsb, dual, none"),
    ({"cache": None}, "cache=None"),
    ({"prefix_window": -1}, "prefix_window=-1: expected an int >= 0"),
    ({"prefix_window": 4, "cache": "dual"}, "prefix_window=4: only cache='dsb'"),
    ({"prefix_window": 4, "cache": "none"}, "prefix_window=4: only cache='dsb'"),
    ({"threshold": 1.01}, "threshold=1.01: expected a number in [0, 1]"),
    ({"threshold": -0.1}, "threshold=-0.1"),
    ({"threshold": NAN}, "threshold=nan"),
    ({"factor": 0.0}, "factor=0.0: expected a number in (0, 1e+06]"),
    ({"factor": math.inf}, "factor=inf"),
    ({"factor": 10**400}, "factor=1"),
    ({"frechet": 1.5}, "frechet=1.5: expected a number in [-1, 1]"),
    ({"steps": 0}, "steps=0: expected an int from 1 to 16"),
    ({"steps": 17}, "steps=17: expected an int from 1 to 16 (at most gen_length)"),
    ({"steps": 3, "schedule": "naive"}, "steps=3: schedule='naive'"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"temperature": math.inf}, "temperature=inf"),
    ({"top_p": 0.0}, "top_p=0.0: expected a number in (0, 1]"),
    ({"top_p": 1.5}, "top_p=1.5"),
    ({"top_k": 0}, "top_k=0: expected an int >= 1"),
    ({"refresh_commit": "last"}, "refresh_commit='last': expected one of select, first"),
    ({"refresh_commit": "first", "cache": "none"}, "refresh_commit='first': cache='none'"),
    ({"threshold": 0.9, "factor": 1.0}, "threshold=0.9, factor=1.0: expected at most one of"),
    ({"threshold": 0.9, "factor": 1.0, "frechet": 0.2, "steps": 4},
     "threshold=0.9, factor=1.0, frechet=0.2, steps=4: expected at most one of threshold"),
    ({"confidence": "logit"}, "confidence='logit': expected one of probability, margin, entropy"
     ", random"),
    ({"confidence": "entropy"}, "confidence='entropy': the rule of threshold is not defined for it;"
     " expected 'probability' or 'margin'"),
    ({"confidence": "margin", "frechet": 0.2}, "expected 'probability'"),
    ({"confidence": "probability", "eb": 0.2}, "expected 'entropy'"),
    ({"progress": 0.5, "steps": 4}, "it lowers a threshold; expected None with steps"),
    ({"confidence": "random"}, "the rule of threshold is not defined for it"),
    ({"confidence_temperature": 0.5}, "a drawn order does not fit threshold; expected steps"),
    ({"confidence_temperature": 0.5, "confidence": "random", "steps": 4}, "a drawn order already"),
    ({"suffix_window": 4, "cache": "none"}, "suffix_window=4: cache='none' has no window steps"),
    ({"progress": 0.0}, "progress=0.0: expected a number in (0, 1]"),
]  # fmt: skip
INTS = ("gen_length", "block_length", "max_block_length", "prefix_window", "suffix_window", "steps",
        "top_k", "context_masks")  # fmt: skip
REALS = (
    "threshold", "factor", "frechet", "entropy", "eb", "progress", "temperature", "top_p",
    "confidence_temperature", "cfg_scale",
)  # fmt: skip


@pytest.mark.parametrize(("settings", "said"), WRONG_VALUES)
def test_values_of_settings(settings, said):
    refused(golden.model("llada"), ValueError, said, **{**SHAPE, **settings})
    with golden.refusal(said):
        dsb.DecodingConfig(**{**SHAPE, **settings})


def test_numbers_of_numpy_are_numbers():
    config = dsb.DecodingConfig(
        gen_length=np.int64(16), block_length=np.uint8(8), factor=np.float32(1)
    )
    assert config == dsb.DecodingConfig(gen_length=16, block_length=8, factor=1.0)
    assert (type(config.gen_length), type(config.factor)) == (int, float)


@pytest.mark.parametrize("name", [*INTS, *REALS, "stop_at_eos"])
@pytest.mark.parametrize("value", [True, 8.0, "8", [8], 1j, np.float64(8)])
def test_types_of_settings(name, value):
    right = {"stop_at_eos": (bool,), **dict.fromkeys(REALS, (float,))}.get(name, ())
    if isinstance(value, right) and not (name in REALS and isinstance(value, bool)):
        value = None if name == "stop_at_eos" else "x"
    refused(golden.model("llada"), TypeError, f"{name}={value!r}: expected", **{name: value})


def test_the_default_threshold_gives_way_and_confidences_have_their_rules():
    assert dsb.DecodingConfig().threshold == 0.9
    names = ("threshold", "factor", "frechet", "entropy", "eb", "steps")
    for name, value in zip(names, (0.0, 1.0, 0.2, 0.5, 0.5, 4), strict=True):
        rule = {name: value}
        config = vars(dsb.DecodingConfig(**rule))
        assert config["confidence"] == ("entropy" if name in ("entropy", "eb") else "probability")
        assert {n: config[n] for n in names if config[n] is not None} == rule
    for rule in ({}, {"factor": 1.0}, {"steps": 8}):
        assert dsb.DecodingConfig(confidence="margin", **rule).confidence == "margin"
    assert dsb.DecodingConfig(confidence="entropy", steps=8).rule == "quota"


def test_names_of_settings(model):
    refused(model, TypeError, "blocklength=8: expected one of gen_length", blocklength=8)
    config = dsb.DecodingConfig(**SHAPE)
    refused(model, TypeError, "config and steps", config=config, steps=4)
    for wrong in (SHAPE, 16, "dsb"):
        refused(model, TypeError, f"config={wrong!r}: expected a DecodingConfig", config=wrong)
    refused(model, TypeError, "block_length=None", block_length=None)


def test_settings_that_depend_on_the_model():
    llada, dream = golden.model("llada"), golden.model("dream")
    refused(llada, ValueError, "top_p=0.9: llada samples", **SHAPE, top_p=0.9)
    refused(llada, ValueError, "top_k=5: llada samples", **SHAPE, top_k=5)
    said = ("prefix_window=0: dream predicts", "expected at least 1")
    refused(dream, ValueError, *said, **SHAPE, prefix_window=0)
    dsb.generate(llada, PROMPT, **SHAPE, prefix_window=0)
    endless = dsb.load_model(golden.DATA / "llada", device="cpu", eos_ids=())
    refused(endless, ValueError, "stop_at_eos=True: the model names no EOS", stop_at_eos=True)
    assert dsb.generate(endless, PROMPT, **SHAPE).row_tokens == [16]


# --- prompts ----------------------------------------------------------------------------------

WRONG_PROMPTS = [
    ([[5, 6]], TypeError, ("input_ids=list: expected an integer tensor", "torch.tensor([ids])")),
    ({"input_ids": PROMPT}, TypeError, ("input_ids=dict: expected", "inputs['input_ids']")),
    (PROMPT[0], ValueError, ("input_ids has shape (4,)", "input_ids[None]")),
    (None, TypeError, ("input_ids=NoneType",)),
    (PROMPT.float(), TypeError, ("torch.float32", "expected torch.int64 or int32")),
    (PROMPT.bool(), TypeError, ("torch.bool",)),
    (PROMPT.to(torch.uint8), TypeError, ("torch.uint8",)),
    (PROMPT[0], ValueError, ("shape (4,)", "expected (B, P)")),
    (PROMPT[None], ValueError, ("shape (1, 1, 4)",)),
    (PROMPT[:, :0], ValueError, ("shape (1, 0)", "an empty prompt")),
    (PROMPT[:0], ValueError, ("shape (0, 4)",)),
    (PROMPT.to("meta"), ValueError, ("input_ids is on meta", "expected the model's cpu")),
    (torch.tensor([[5, 512]]), ValueError, ("input_ids holds 512", "0 to 511")),
    (torch.tensor([[5, -1]]), ValueError, ("input_ids holds -1",)),
    (torch.tensor([[5, 511, 6]]), ValueError, ("input_ids[0, 1]=511", "mask id")),
    (torch.tensor([[5, 6], [7, 511]]), ValueError, ("input_ids[1, 1]=511",)),
]


@pytest.mark.parametrize(("ids", "kind", "said"), WRONG_PROMPTS)
def test_prompts(model, ids, kind, said):
    refused(model, kind, *said, ids=ids, **SHAPE)


@pytest.mark.parametrize(
    ("family", "room", "prompt"), [("llada", 1024, 1), ("llada", 1024, 1009), ("dream", 2048, 2033)]
)
def test_beyond_the_models_positions(family, room, prompt):
    ids = torch.full((1, prompt), 5)
    gen = room - prompt + 1
    said = (f"gen_length={gen}", f"needs {room + 1}", f"at most the model's {room}")
    refused(golden.model(family), ValueError, *said, ids=ids, gen_length=gen, block_length=8)


def test_the_last_position_is_fine():
    out = dsb.generate(golden.model("llada"), torch.full((1, 1008), 5), **SHAPE, threshold=0.0)
    assert out.sequences.shape == (1, 1024)


WRONG_MASKS = [
    ([[1, 1, 1, 0]], ValueError, ("left padding",)),
    ([[1, 0, 1, 1]], ValueError, ("left padding",)),
    ([[0, 1, 0, 1]], ValueError, ("left padding",)),
    ([[0, 0, 0, 0]], ValueError, ("row 0 is all padding",)),
    ([[1, 1, 1, 1], [0, 0, 0, 0]], ValueError, ("row 1 is all padding",)),
    ([[1, 1, 1]], ValueError, ("shape (1, 3)", "(1, 4)")),
    ([1, 1, 1, 1], ValueError, ("shape (4,)",)),
    ([[0, 1, 2, 1]], ValueError, ("0 (padding) and 1 (prompt) only",)),
    ([[0, 1, -1, 1]], ValueError, ("0 (padding) and 1 (prompt) only",)),
    ([[0.0, 0.5, 1.0, 1.0]], TypeError, ("torch.float32", "integers or torch.bool")),
    ("1111", TypeError, ("attention_mask=str",)),
    (torch.ones(1, 4, device="meta").long(), ValueError, ("attention_mask is on meta",)),
]


@pytest.mark.parametrize(("mask", "kind", "said"), WRONG_MASKS)
def test_attention_masks(model, mask, kind, said):
    ids = PROMPT.repeat(2 if len(mask) == 2 else 1, 1)
    mask = torch.tensor(mask) if isinstance(mask, list) else mask
    refused(model, kind, "attention_mask", *said, ids=ids, attention_mask=mask, **SHAPE)


def test_padding_may_hold_the_mask_id_and_the_mask_may_be_bool(model):
    padded = torch.tensor([[511, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 1, 1, 1, 1]]).bool()
    out = dsb.generate(model, padded, attention_mask=mask, **SHAPE)
    alone = dsb.generate(model, PROMPT, **SHAPE)
    assert out.sequences[0, 5:].tolist() == alone.sequences[0, 4:].tolist()


# --- the rest ---------------------------------------------------------------------------------


def test_models_and_generators(model):
    with pytest.raises(TypeError, match="model=Linear: expected a model from"):
        dsb.generate(torch.nn.Linear(2, 2), PROMPT)
    refused(model, TypeError, "generator=int: expected a torch.Generator", generator=3, **SHAPE)


@contextlib.contextmanager
def broken(weight: torch.Tensor, place: Any, value: float = NAN) -> Iterator[None]:
    """A weight is `value` at one place."""
    before = weight.data[place].clone()
    weight.data[place] = value
    try:
        yield
    finally:
        weight.data[place] = before


HEAD = (7, 3)  # every row's logits are NaN where the LM head is so at this place
BREAKABLE = [
    *itertools.product(golden.FAMILIES, ("none", "dual", "dsb"), ({}, {"temperature": 0.7})),
    *(("dream", "dsb", cuts) for cuts in
      ({"top_p": 0.9}, {"top_k": 5}, {"top_k": 5, "temperature": 1.0})),
]  # fmt: skip


@pytest.mark.parametrize(("family", "cache", "sampling"), BREAKABLE)
def test_nan_logits_are_an_error_that_names_the_step(family, cache, sampling):
    model, said = golden.model(family), r"^step 0: .* NaN \(row 0\)$"
    with broken(model.lm_head.weight, HEAD), pytest.raises(FloatingPointError, match=said):
        dsb.generate(model, PROMPT, cache=cache, **SHAPE, **sampling)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}])
def test_nan_logits_of_one_row_name_it(model, sampling):
    """Token 9 in the second prompt alone has no embedding."""
    ids, embedding = torch.tensor([[5, 6, 7], [5, 9, 7], [5, 6, 8]]), model.get_input_embeddings()
    said = r"step 0: .*\(row 1\)"
    with broken(embedding.weight, 9), pytest.raises(FloatingPointError, match=said):
        dsb.generate(model, ids, **SHAPE, **sampling)


def test_nan_logits_later_name_the_later_step(model):
    """The model breaks after its second forward."""
    weight = model.lm_head.weight

    def spoil(event: dsb.StepEvent) -> None:
        if event.index == 1:
            weight.data[HEAD] = NAN

    with pytest.raises(FloatingPointError, match=r"^step 2: "), broken(weight, HEAD, 0.0):
        dsb.generate(model, PROMPT, on_step=spoil, steps=8, **SHAPE)
