"""Families that were made from a causal model: they load with its weights, attending both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import dsb_runtime as dsb
from dsb_runtime.models.convert import convert
from tests import golden
from tests.checkpoints import ADAPTED, LLAMA3_ROPE, write_adapted
from tests.test_wrapped import whole_canvas

IDS = torch.tensor([[5, 6, 7, 511, 9, 511, 511, 12]])
PROMPT = IDS[:, :3]
A2D = [family for family in ADAPTED if family.startswith("a2d")]


def load(folder: Path, family: str, **arguments: Any) -> PreTrainedModel:
    named = {"family": "diffullama"} if family == "diffullama" else {}
    return dsb.load_model(folder, device="cpu", **named, **arguments)


@torch.no_grad()
def both_ways(causal: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits of the published code: a causal model that is given a mask which hides nothing."""
    return causal(ids, attention_mask=torch.zeros(1, 1, ids.shape[1], ids.shape[1])).logits


class Published:
    """What `whole_canvas` asks of a model."""

    def __init__(self, causal: PreTrainedModel, info: Any) -> None:
        self.causal, self.dsb = causal, info

    def __call__(self, ids: Tensor) -> Any:
        logits = both_ways(self.causal, ids)
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("family", ADAPTED)
def test_logits_are_the_published_codes(tmp_path, family):
    causal = write_adapted(tmp_path, family)
    model = load(tmp_path, family)
    assert type(model) is type(causal) and not model.training
    assert (model.dsb.family.name, model.dsb.mask_id, model.dsb.eos_ids) == (family, 511, (1,))
    assert model.dsb.family.shift == (family == "diffullama")
    expected = both_ways(causal, IDS)
    with torch.no_grad():
        assert (model(IDS).logits - expected).abs().max() < 1e-4
    assert (causal(IDS).logits - expected).abs().max() > 1e-2, "attention must matter here"


@pytest.mark.parametrize("family", ADAPTED)
def test_tokens_are_those_of_a_loop_over_the_published_code(tmp_path, family):
    """Also where the model is called as a whole."""
    causal = write_adapted(tmp_path, family)
    model = load(tmp_path, family)
    published = Published(causal, model.dsb)
    expected = whole_canvas(published, PROMPT, 4, 12)
    settings = {"gen_length": 12, "block_length": 4, "steps": 12, "stop_at_eos": False}
    assert dsb.generate(model, PROMPT, cache="none", **settings).sequences[0].tolist() == expected
    plain = dsb.generate(model, PROMPT, cache="dsb", **settings)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    called = dsb.generate(model, PROMPT, cache="dsb", **settings)
    assert torch.equal(called.sequences, plain.sequences)


def test_the_mask_id_is_that_of_the_tokenizers_mask_token(tmp_path):
    """Where the config names none; nothing is guessed."""
    write_adapted(tmp_path / "a", "a2d-qwen3", mask_token_id=510)
    assert load(tmp_path / "a", "a2d-qwen3").dsb.mask_id == 510
    write_adapted(tmp_path / "b", "a2d-qwen3")
    settings = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (tmp_path / "b" / "tokenizer_config.json").write_text(json.dumps(settings))
    said = "mask_id=None", "neither config.json nor the tokenizer has a mask token: name it"
    for _ in range(2):
        with golden.refusal(*said):
            load(tmp_path / "b", "a2d-qwen3")
        with golden.refusal(*said):
            AutoModelForCausalLM.from_pretrained(tmp_path / "b")
        for path in (tmp_path / "b").glob("*token*"):  # then without a tokenizer
            path.unlink()
    assert load(tmp_path / "b", "a2d-qwen3", mask_id=7).dsb.mask_id == 7


@pytest.mark.parametrize("family", A2D)
def test_auto_classes(tmp_path, family):
    causal = write_adapted(tmp_path / "a", family)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    ours = load(tmp_path / "a", family)
    assert isinstance(auto, type(causal)) and auto.dsb == ours.dsb
    expected = dsb.generate(ours, PROMPT, gen_length=8, block_length=4).sequences
    assert torch.equal(auto.generate(PROMPT, max_new_tokens=8, block_length=4), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "a")("w5 w6").input_ids == [5, 6]
    auto.save_pretrained(tmp_path / "b")
    assert dsb.load_model(tmp_path / "b", device="cpu").dsb == ours.dsb


@pytest.mark.parametrize("family", ADAPTED)
def test_a_converted_copy_is_for_plain_transformers(tmp_path, family):
    causal = write_adapted(tmp_path / "a", family)
    named = "diffullama" if family == "diffullama" else None
    convert(tmp_path / "a", tmp_path / "b", family=named, say=lambda _: None)
    copy = type(causal).from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        assert (copy(IDS).logits - both_ways(causal, IDS)).abs().max() < 1e-4
    again = dsb.load_model(tmp_path / "b", device="cpu")
    assert again.dsb == load(tmp_path / "a", family).dsb


SLIDING = ["full_attention", "sliding_attention"]
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("a2d-qwen3", {"layer_types": SLIDING}, "expected 'full_attention' for every layer"),
    ("a2d-qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("a2d-qwen3", {"attention_bias": True}, "attention_bias=True"),
    ("a2d-qwen3", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling={'rope_type': 'yarn'}"),
    ("a2d-llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling={'type': 'linear'}"),
    ("a2d-llama", {"rope_scaling": {**LLAMA3_ROPE, "factor": "8"}}, "factor='8': expected a"),
    ("a2d-llama", {"rope_scaling": {**LLAMA3_ROPE, "beta": 1}}, "rope_scaling.beta=1"),
    ("a2d-llama", {"dsb_family": "llada"}, "'a2d-llama'"),
    ("diffencoder", {"dlm_paradigm": "block_diff"}, "dlm_paradigm='block_diff'"),
    ("diffencoder", {"dlm_paradigm": None}, "no dlm_paradigm"),
    ("diffencoder", {"disable_qk_norm": True}, "disable_qk_norm=True"),
]


@pytest.mark.parametrize(("family", "fields", "said"), WRONG)
def test_what_would_change_the_result_is_refused(tmp_path, family, fields, said):
    write_adapted(tmp_path, family)
    config = {**json.loads((tmp_path / "config.json").read_text()), **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if "dsb_family" not in fields:
        with golden.refusal(said):
            load(tmp_path, family)
    if family in A2D:
        with golden.refusal(said):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_plain_llama_is_no_diffullama_unless_it_is_named(tmp_path):
    write_adapted(tmp_path, "diffullama")
    with golden.refusal("model_type='llama'", "'diffullama'"):
        dsb.load_model(tmp_path, device="cpu")


def test_a_name_that_says_block_diffusion_is_refused_unless_the_family_is_named(tmp_path):
    folder = tmp_path / "Qwen3-0.6B-diffusion-bd3lm-v0.1"
    write_adapted(folder, "a2d-qwen3")
    trained = tmp_path / "bd3lm" / "checkpoint-final"  # where dllm's trainer writes a model
    write_adapted(trained, "a2d-qwen3")
    with golden.refusal("BD3LM", "family='a2d-qwen3'"):
        dsb.load_model(trained)
    for load_it in (dsb.load_model, AutoModelForCausalLM.from_pretrained):
        with golden.refusal("BD3LM", "family='a2d-qwen3'"):
            load_it(folder)
    assert dsb.load_model(folder, device="cpu", family="a2d-qwen3").dsb.mask_id == 511
