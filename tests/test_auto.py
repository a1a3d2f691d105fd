"""AutoConfig, AutoModelForCausalLM and AutoTokenizer on LLaDA and Dream folders, natively."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

import dsb_runtime as dsb
from tests import golden
from tests.checkpoints import (
    CHAT_TEMPLATE,
    error_of,
    parts,
    published,
    write_changed,
    write_chat_model,
    write_dream_tokenizer,
)

KINDS = {"llada": LlamaForCausalLM, "dream": Qwen2ForCausalLM}


@pytest.fixture(autouse=True)
def no_prompt(monkeypatch):
    """transformers asks on the terminal where it would run a repository's code."""

    def asked(*args: Any) -> str:
        raise AssertionError("transformers asked whether to trust remote code")

    monkeypatch.setattr("builtins.input", asked)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["default", "trust"])
@pytest.mark.parametrize("family", golden.FAMILIES)
def test_published_folders_load_natively(tmp_path, family, trust, auto):
    model = auto.from_pretrained(published(tmp_path, family), **trust)
    assert isinstance(model, KINDS[family]) and not model.training
    assert model.config._attn_implementation == "dsb"
    assert model.dsb == golden.model(family).dsb
    assert error_of(model, family) < 1e-4


def test_config_tells_the_network(tmp_path):
    config = AutoConfig.from_pretrained(published(tmp_path, "llada"))
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llada", 64, 3)
    assert config.is_causal is False and config.mask_token_id == 511
    assert not hasattr(config, "auto_map"), "a saved copy must not name a repository's code"
    lower = published(tmp_path / "b", "dream", model_type="dream")  # the other spelling
    assert error_of(AutoModelForCausalLM.from_pretrained(lower), "dream") < 1e-4


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_saved_models_load_again(tmp_path, family):
    model = AutoModelForCausalLM.from_pretrained(published(tmp_path / "a", family))
    golden.check_trajectory(functools.partial(dsb.generate, model), family, 0)
    model.save_pretrained(tmp_path / "b", max_shard_size="100KB")
    assert (tmp_path / "b" / "model.safetensors.index.json").is_file()
    again = dsb.load_model(tmp_path / "b", device="cpu")
    # What load_model loaded has a Llama's or Qwen2's config and names, and says what it is.
    again.save_pretrained(tmp_path / "c")
    for other in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "b"), again,
        dsb.load_model(tmp_path / "c", device="cpu"),
    ):  # fmt: skip
        assert error_of(other, family) < 1e-4 and other.dsb == model.dsb
    assert error_of(KINDS[family].from_pretrained(tmp_path / "c"), family) < 1e-4


def test_arguments_reach_transformers(tmp_path):
    folder = published(tmp_path, "llada")
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype="bfloat16", attn_implementation="sdpa", output_loading_info=True
    )
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa"
    assert not any(report.values())
    config = AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = 77
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, eos_ids=(3, 4))
    assert model.config.max_position_embeddings == 77
    assert model.dsb.eos_ids == (3, 4)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(golden.DATA / "dream"))
    assert model.dsb == golden.model("dream").dsb


def test_transformers_own_arguments_are_read_or_refused(tmp_path):
    folder, auto = published(tmp_path, "llada"), AutoModelForCausalLM.from_pretrained
    for neutral in ({"use_safetensors": True}, {"use_safetensors": None}, {"key_mapping": {}}):
        assert auto(folder, **neutral).dsb == golden.model("llada").dsb
    for name, value in {"use_safetensors": False, "key_mapping": {"a": "b"}}.items():
        with golden.refusal(f"{name}={value}: only safetensors are read"):
            auto(folder, **{name: value})
    with golden.refusal("is_causal=True: it attends both ways"):
        auto(folder, is_causal=True)
    for load in (auto, dsb.auto.LladaForCausalLM.from_pretrained):
        model = load(folder, eos_token_id=9, mask_token_id=8, dtype="bfloat16")
        assert model.dsb.eos_ids == (9,) and model.dsb.mask_id == 8
        assert model.generation_config.eos_token_id == 9 and model.dtype == torch.bfloat16
    named = dsb.auto.LladaForCausalLM.from_pretrained(pretrained_model_name_or_path=folder)
    assert named.dsb == golden.model("llada").dsb
    with golden.refusal("config=Qwen2Config: expected LladaConfig", kind=TypeError):
        type(named).from_pretrained(folder, config=Qwen2Config())


def test_load_models_checks_hold(tmp_path):
    weights = parts("llada")[1]
    del weights[next(name for name in weights if "attn_out" in name)]
    with golden.refusal("missing weight"):
        AutoModelForCausalLM.from_pretrained(write_changed(tmp_path / "a", weights=weights))
    with golden.refusal("alibi=True, not supported"):
        AutoConfig.from_pretrained(write_changed(tmp_path / "b", alibi=True))
    folder = write_changed(tmp_path / "c", mask_token_id=...)
    with golden.refusal("no mask_token_id: name it"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder, mask_id=511).dsb.mask_id == 511


def test_a_mask_that_is_also_an_eos_is_refused(tmp_path):
    folder = published(tmp_path, "llada", mask_token_id=1)
    with golden.refusal("mask_id=1: it is also an EOS id"):
        AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, mask_id=511)
    with golden.refusal("mask_id=511: it is also an EOS id"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, eos_token_id=511)
    assert not hasattr(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)), "dsb")


def test_tokenizers(tmp_path):
    folder = write_chat_model(tmp_path / "llada")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w5 w6").input_ids == dsb.load_tokenizer(folder)("w5 w6").input_ids == [5, 6]
    folder = published(tmp_path / "dream", "dream")
    write_dream_tokenizer(folder)
    for tokenizer in (dsb.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)):
        assert isinstance(tokenizer, Qwen2Tokenizer)
        ids = tokenizer("abb<|mask|>").input_ids
        assert ids == [3, 2, 4] and tokenizer.decode(ids) == "abb<|mask|>"
        assert tokenizer.chat_template == CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "again")
    write_changed(tmp_path / "again", "dream")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("abb").input_ids == [3, 2]
