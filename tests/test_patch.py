"""patch and unpatch: the same tokens as `generate`, and nothing left behind."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from safetensors.torch import load_file

import dsb_runtime as dsb
from dsb_runtime.families import FAMILIES, supported_config
from dsb_runtime.models.load import read_config, rename
from tests import golden
from tests.random_models import KINDS, SMALL, random_model

IDS = torch.randint(2, 500, (1, 12), generator=torch.Generator().manual_seed(1))


def in_memory(family: str) -> transformers.PreTrainedModel:
    """The golden weights in a plain causal model of transformers."""
    folder = golden.DATA / family
    config = supported_config(read_config(folder), FAMILIES[family])
    config.eos_token_id = 1
    model = getattr(transformers, FAMILIES[family].model_class)(config).eval()
    mapping = dict(FAMILIES[family].key_mapping)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({rename(k, mapping): v for k, v in weights.items()})
    return model


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_patched_model_decodes_the_golden_trajectories(family):
    model = dsb.patch(in_memory(family), mask_id=511)
    for index in range(8):
        golden.check_trajectory(model.dsb_generate, family, index)


@pytest.mark.parametrize("kind", KINDS)
def test_unpatch_restores_outputs_and_identities(kind):
    model = random_model(kind)
    parameters = {k: id(v) for k, v in model.named_parameters()}
    values = {k: v.detach().clone() for k, v in model.named_parameters()}
    attributes = {k: id(v) for k, v in vars(model).items()}
    modules = {k: (id(m), m.forward.__func__) for k, m in model.named_modules()}
    config, logits = model.config.to_dict(), model(IDS).logits

    dsb.patch(model, family="llada", mask_id=511)
    assert {k: id(v) for k, v in model.named_parameters()} == parameters
    patched = model(IDS).logits
    assert not torch.allclose(patched[:, 0], logits[:, 0]), "attention is bidirectional now"
    model.dsb_generate(IDS, gen_length=8, block_length=4)

    dsb.unpatch(model)
    assert torch.equal(model(IDS).logits, logits)
    assert {k: id(v) for k, v in vars(model).items()} == attributes
    assert {k: (id(m), m.forward.__func__) for k, m in model.named_modules()} == modules
    assert {k: id(v) for k, v in model.named_parameters()} == parameters
    assert all(torch.equal(v, values[k]) for k, v in model.named_parameters())
    assert model.config.to_dict() == config
    assert not hasattr(model, "dsb_generate")


@pytest.mark.parametrize("kind", KINDS)
def test_window_cache_equals_no_cache_where_everything_is_recomputed(kind):
    model = dsb.patch(random_model(kind), family="llada", mask_id=511, eos_ids=())
    shape = {"gen_length": 16, "block_length": 16, "threshold": 0.004}
    cached = model.dsb_generate(IDS, cache="dsb", prefix_window=1000, **shape)
    plain = model.dsb_generate(IDS, cache="none", **shape)
    assert torch.equal(cached.sequences, plain.sequences)


def test_patching_twice_is_harmless():
    model = random_model("Llama")
    logits = model(IDS).logits
    assert dsb.patch(dsb.patch(model, mask_id=511), mask_id=511) is model
    dsb.unpatch(dsb.unpatch(model))
    assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mask_id": 512}, "mask_id=512"),
        ({}, "mask_id=None"),
        ({"mask_id": 511, "family": "gpt"}, "family='gpt'"),
        ({"mask_id": 511, "eos_ids": [-1]}, "eos_ids=-1"),
        ({"mask_id": 511, "kind": "Qwen3"}, "family=None"),
    ],
)
def test_bad_arguments(arguments, named):
    arguments = dict(arguments)
    model = random_model(arguments.pop("kind", "Llama"))
    before = vars(model.config).copy()
    with pytest.raises(ValueError, match=named):
        dsb.patch(model, **arguments)
    assert vars(model.config) == before and not hasattr(model, "dsb")


def test_an_unknown_model_is_refused_with_the_reason():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    with pytest.raises(TypeError, match=r"GPT2LMHeadModel.*LlamaForCausalLM"):
        dsb.patch(transformers.GPT2LMHeadModel(config))
    sliding = transformers.MistralConfig(**SMALL, sliding_window=8)
    with pytest.raises(TypeError, match="sliding"):
        dsb.patch(transformers.MistralForCausalLM(sliding), family="llada", mask_id=511)


def test_a_patched_models_own_forward_is_bidirectional_and_takes_masks():
    model = dsb.patch(random_model("Llama"), family="llada", mask_id=511)
    ids = torch.randint(2, 500, (2, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ours = model(ids, attention_mask=mask).logits
    plain = dsb.unpatch(model)
    plain.config.is_causal = False
    expected = plain(ids, attention_mask=mask).logits
    assert (ours - expected)[mask.bool()].abs().max() < 1e-5


def test_a_patched_model_can_be_copied():
    model = dsb.patch(in_memory("llada"), mask_id=511)
    other = copy.deepcopy(model)
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    assert not torch.equal(model(ids).logits, other(ids).logits)
    golden.check_trajectory(functools.partial(dsb.generate, other), "llada", 0)
