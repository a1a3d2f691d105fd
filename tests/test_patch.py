"""patch and unpatch: the same tokens as `generate`, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import dsb_runtime as dsb
from dsb_runtime.families import FAMILIES, supported_config
from dsb_runtime.models.convert import convert
from dsb_runtime.models.load import read_config
from tests import golden
from tests.checkpoints import write_adapted
from tests.random_models import KINDS, SMALL, random_model

IDS = torch.randint(2, 500, (1, 12), generator=torch.Generator().manual_seed(1))


def in_memory(family: str) -> transformers.PreTrainedModel:
    """The golden weights in a plain causal model of transformers."""
    config = supported_config(read_config(golden.DATA / family), FAMILIES[family])
    config.eos_token_id = 1
    model = getattr(transformers, FAMILIES[family].model_class)(config).eval()
    model.load_state_dict(golden.model(family).state_dict())
    return model


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_patched_model_decodes_the_golden_trajectories(family):
    model = dsb.patch(in_memory(family), mask_id=511)
    for index in range(8):
        golden.check_trajectory(model.dsb_generate, family, index)


def identities(model: transformers.PreTrainedModel) -> list[dict[str, object]]:
    """Which objects a model consists of, and its config."""
    return [
        {name: id(value) for name, value in vars(model).items()},
        {name: (id(m), m.forward.__func__) for name, m in model.named_modules()},
        {name: id(value) for name, value in model.named_parameters()},
        model.config.to_dict(),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_unpatch_restores_outputs_and_identities(kind):
    model = random_model(kind)
    before, logits = identities(model), model(IDS).logits
    dsb.patch(model, family="llada", mask_id=511)
    assert identities(model)[2] == before[2]
    patched = model(IDS).logits
    assert not torch.allclose(patched[:, 0], logits[:, 0]), "attention is bidirectional now"
    model.dsb_generate(IDS, gen_length=8, block_length=4)

    dsb.unpatch(model)
    assert torch.equal(model(IDS).logits, logits) and identities(model) == before
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
    assert dsb.patch(dsb.patch(model, mask_id=511), mask_id=511) is model is dsb.patch(model)
    dsb.unpatch(dsb.unpatch(model))
    assert torch.equal(model(IDS).logits, logits)


def test_patching_with_other_arguments_is_refused():
    model = dsb.patch(random_model("Llama", eos_token_id=1), mask_id=511)
    for other, said in (
        ({"family": "dream"}, "family='dream': model.dsb says 'llada'; expected that, or unpatch"),
        ({"mask_id": 510}, "mask_id=510, eos_ids=(1,): the model is patched with mask_id=511"),
        ({"eos_ids": (3,)}, "eos_ids=(3,): the model is patched with mask_id=511, eos_ids=(1,)"),
        ({"mask_id": -5}, "mask_id=-5"),
    ):
        with golden.refusal(said):
            dsb.patch(model, **other)
    other = dsb.patch(dsb.unpatch(model), family="dream", mask_id=510, eos_ids=[3])
    assert (other.dsb.family.name, other.dsb.mask_id, other.dsb.eos_ids) == ("dream", 510, (3,))


@pytest.mark.parametrize(
    ("kind", "arguments", "named"),
    [
        ("Llama", {"mask_id": 512}, "mask_id=512"),
        ("Llama", {}, "mask_id=None"),
        ("Llama", {"mask_id": 511, "family": "gpt"}, "family='gpt'"),
        ("Llama", {"mask_id": 511, "eos_ids": [-1]}, "eos_ids=-1"),
        ("Llama", {"mask_id": 511, "eos_ids": 1}, "eos_ids=1: expected a tuple"),
        ("Llama", {"mask_id": 1, "eos_ids": [1]}, "mask_id=1: it is also an EOS id"),
        ("Qwen3", {"mask_id": 511}, "family=None"),
    ],
)
def test_bad_arguments(kind, arguments, named):
    model = random_model(kind)
    before = vars(model.config).copy()
    with pytest.raises((TypeError, ValueError), match=named):
        dsb.patch(model, **arguments)
    assert vars(model.config) == before and not hasattr(model, "dsb")


def test_an_unknown_model_is_refused_with_the_reason():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    with pytest.raises(TypeError, match=r"GPT2LMHeadModel.*LlamaForCausalLM"):
        dsb.patch(transformers.GPT2LMHeadModel(config))
    sliding = transformers.MistralConfig(**SMALL, sliding_window=8)
    with pytest.raises(TypeError, match="sliding"):
        dsb.patch(transformers.MistralForCausalLM(sliding), family="llada", mask_id=511)


def test_a_model_says_its_own_family_and_ids(tmp_path):
    """A shifted family is the default of its class."""
    write_adapted(tmp_path / "a", "a2d-qwen2")
    convert(tmp_path / "a", tmp_path / "b", say=lambda _: None)
    loaded = dsb.load_model(tmp_path / "a", device="cpu")
    auto, plain = map(AutoModelForCausalLM.from_pretrained, (tmp_path / "a", tmp_path / "b"))
    said = copy.deepcopy(loaded.dsb)
    assert said.family.name == "a2d-qwen2" and said.eos_ids == (1,)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "a"))
    assert not hasattr(fresh, "dsb") and not hasattr(plain, "dsb")
    for model in (loaded, auto, plain, fresh):
        with golden.refusal("family='dream': model.", "says 'a2d-qwen2'"):
            dsb.patch(model, family="dream", mask_id=511)
        assert dsb.patch(model, mask_id=511).dsb == said


def test_a_model_that_was_trained_otherwise_is_refused():
    """Its class derives from Llama's, or it was loaded as a Llama."""
    model, other = random_model("Llama"), random_model("Llama")
    model.__class__ = type("StableDiffcoderForCausalLM", (type(model),), {})
    other.config.architectures = ["StableDiffcoderForCausalLM"]
    said = "patch: the model is", "block-causal", "Diffulex runs it"
    for each in (model, other):
        with golden.refusal(*said, kind=TypeError):
            dsb.patch(each, mask_id=511)


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 8,
    "long_factor": [3.0] * 8, "original_max_position_embeddings": 100,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"num_attention_heads": 64, "num_key_value_heads": 64}, "its heads have 1 dimensions"),
        ({"rope_parameters": LONGROPE}, "its rotary angles (rope_type='longrope') depend on"),
    ],
)
def test_what_nothing_serves_is_refused(fields, said):
    model = random_model("Llama", **fields)
    with golden.refusal("patch: ", said, kind=TypeError):
        dsb.patch(model, mask_id=511)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_patched_model_can_be_copied(duplicate):
    model = dsb.patch(in_memory("llada"), mask_id=511)
    other = duplicate(model)
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    assert not torch.equal(model(ids).logits, other(ids).logits)
    golden.check_trajectory(other.dsb_generate, "llada", 0)


def test_a_patched_model_is_freed_with_its_last_reference():
    """Without the garbage collector, which would come too late for the next model on a GPU."""
    gc.collect()
    gc.disable()
    try:
        model = dsb.patch(random_model("Llama"), mask_id=511)
        model.dsb_generate(IDS, gen_length=4)
        ours, alive = model.dsb_generate, weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()
    assert next(iter(inspect.signature(ours).parameters)) == "input_ids"
    with golden.refusal("dsb_generate: its model is gone", kind=ReferenceError):
        ours(IDS)
