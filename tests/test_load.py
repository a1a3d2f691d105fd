"""load_model: every accepted form of a checkpoint gives the same logits as the original."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

import dsb_runtime as dsb
from tests import golden
from tests.checkpoints import error_of, logits, parts, write, write_changed

# The published files of LLaDA-8B-Instruct and Dream-v0-Instruct-7B, which the tests shrink.
LLADA_8B, DREAM_7B, DREAM_GENERATION = (
    json.loads((golden.DATA / "published" / f"{name}.json").read_text())
    for name in ("llada_8b", "dream_7b", "dream_7b_generation")
)
PUBLISHED = {
    "llada": (LLADA_8B, {}),
    "llada-tuned": (LLADA_8B, {"_name_or_path": "GSAI-ML/LLaDA-8B-Instruct", "dtype": "bfloat16"}),
    "dream": (DREAM_7B, {}),
    "dream-coder": (DREAM_7B, {"bos_token_id": 151665, "max_position_embeddings": 32768}),
    "dream-windows-named": (DREAM_7B, {"torch_dtype": "float32", "sliding_window": 131072}),
}
IDS = ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id")
PROMPT = torch.tensor([[5, 6, 7]])
HEAD = "model.transformer.ff_out.weight"


def load(folder: Path, **arguments) -> torch.nn.Module:
    return dsb.load_model(folder, **{"dtype": "float32", "device": "cpu", **arguments})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_accepted(tmp_path, name):
    """Every field as published, sizes and ids apart, which are the golden checkpoint's."""
    published, changes = PUBLISHED[name]
    family = "llada" if name.startswith("llada") else "dream"
    small, weights = parts(family)
    shrunk = {k: v for k, v in small.items() if isinstance(v, int) and not isinstance(v, bool)}
    config = {**published, **changes, **shrunk}
    if family == "dream":
        generation = {k: small["eos_token_id"] if k in IDS and v else v
                      for k, v in DREAM_GENERATION.items()}  # fmt: skip
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model = load(write(tmp_path, config, weights))
    assert error_of(model, family) < 1e-4 and model.dsb == golden.model(family).dsb


@pytest.mark.parametrize(
    ("family", "model_class", "prefix"),
    [("llada", LlamaForCausalLM, 24), ("dream", Qwen2ForCausalLM, 4)],
)
def test_what_is_returned(family, model_class, prefix):
    model = golden.model(family)
    assert type(model) is model_class and not model.training
    assert model.config.is_causal is False and model.config._attn_implementation == "dsb"
    assert (model.dsb.family.name, model.dsb.mask_id, model.dsb.eos_ids) == (family, 511, (1,))
    assert model.dsb.family.prefix_window == prefix


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("fields", [{}, {"model_type": "something-tuned"}])
def test_sharded_and_single_files(tmp_path, family, shards, fields):
    model = load(write_changed(tmp_path, family, shards=shards, **fields), family=family)
    assert torch.equal(logits(model), logits(golden.model(family)))


@pytest.mark.parametrize(
    ("asked", "stored", "expected"),
    [
        ("auto", torch.float32, torch.float32),  # whatever the config says
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.float16),
        ("bfloat16", torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        ("float32", torch.bfloat16, torch.float32),
    ],
)
def test_dtypes(tmp_path, asked, stored, expected):
    weights = {name: weight.to(stored) for name, weight in parts("llada")[1].items()}
    said = "bfloat16" if stored == torch.float32 else "float32"
    model = load(write_changed(tmp_path, weights=weights, torch_dtype=said), dtype=asked)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert torch.equal(model.lm_head.weight, weights[HEAD].to(expected))
    dsb.generate(model, PROMPT, gen_length=8, block_length=4)


def grouped(weights: dict[str, torch.Tensor], repeat: bool) -> dict[str, torch.Tensor]:
    """The golden K and V of heads 0 and 1 alone, or each twice: the same function."""
    out = dict(weights)
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            heads = weight[:32].unflatten(0, (2, 16))
            out[name] = (heads.repeat_interleave(2, 0) if repeat else heads).flatten(0, 1)
    return out


def test_grouped_heads_equal_the_same_heads_written_out(tmp_path):
    weights = parts("llada")[1]
    narrow = load(write_changed(tmp_path / "a", weights=grouped(weights, False), n_kv_heads=2))
    wide = load(write_changed(tmp_path / "b", weights=grouped(weights, True)))
    assert narrow.model.layers[0].self_attn.k_proj.weight.shape == (32, 64)
    assert (logits(narrow) - logits(wide)).abs().max() < 1e-5


@pytest.mark.parametrize("head", ["absent", "a copy of the embeddings"])
def test_tied_embeddings_equal_a_head_written_out(tmp_path, head):
    weights = parts("llada")[1]
    weights[HEAD] = weights["model.transformer.wte.weight"].clone()
    written = load(write_changed(tmp_path / "a", weights=weights))
    if head == "absent":
        del weights[HEAD]
    tied = load(write_changed(tmp_path / "b", weights=weights, weight_tying=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert torch.equal(logits(tied), logits(written))


ILLADA = {  # Llama's field names; no mask id
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "head_dim": 16,
    "eos_token_id": [1, 2], "bos_token_id": 0, "rope_scaling": None, "pretraining_tp": 1,
}  # fmt: skip


@pytest.mark.parametrize("names", ["llama", "llada"])
def test_llama_fields_grouped_heads_tied_embeddings_and_a_named_mask(tmp_path, names):
    """The form of iLLaDA, under either set of weight names."""
    weights = grouped(parts("llada")[1], False)
    del weights[HEAD]
    expected = load(write_changed(tmp_path / "a", weights=weights, n_kv_heads=2, weight_tying=True))
    if names == "llama":
        weights = {k: w for k, w in expected.state_dict().items() if k != "lm_head.weight"}
        assert "model.layers.2.mlp.down_proj.weight" in weights
    folder = write(tmp_path / "b", ILLADA, weights, shards=2)
    with pytest.raises(ValueError, match=r"mask_id=None.*no mask_token_id"):
        load(folder, family="llada")
    model = load(folder, family="llada", mask_id=5)
    assert (model.dsb.mask_id, model.dsb.eos_ids) == (5, (1, 2))
    assert torch.equal(logits(model), logits(expected))
    out = dsb.generate(model, torch.tensor([[6, 7, 8]]), gen_length=8, block_length=4)
    assert not (out.sequences == 5).any()


def test_the_embeddings_size_counts_not_the_vocabulary(tmp_path):
    """LLaDA's `embedding_size` is padded beyond `vocab_size`; null means the vocabulary."""
    padded = load(write_changed(tmp_path / "a", vocab_size=500))
    plain = load(write_changed(tmp_path / "b", embedding_size=None))
    assert padded.config.vocab_size == plain.config.vocab_size == 512
    assert torch.equal(logits(padded), logits(plain))


def test_mlp_ratio_stands_in_for_the_mlp_size(tmp_path):
    weights = parts("llada")[1]
    for name in weights:
        if "ff_proj" in name or "up_proj" in name:
            weights[name] = weights[name][:128]
        elif "blocks" in name and "ff_out" in name:
            weights[name] = weights[name][:, :128]
    folder = write_changed(tmp_path, weights=weights, mlp_hidden_size=..., mlp_ratio=2)
    assert load(folder).config.intermediate_size == 128


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_rope_theta_and_norm_epsilon_are_the_checkpoints(tmp_path, family):
    """The base of the rotary embedding comes from either field."""
    expected, theta = logits(golden.model(family)), parts(family)[0]["rope_theta"]
    rope = {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    assert torch.equal(logits(load(write_changed(tmp_path / "a", family, **rope))), expected)
    other = load(write_changed(tmp_path / "b", family, rope_theta=100.0))
    assert (logits(other) - expected).abs().max() > 1e-3
    absent = load(write_changed(tmp_path / "c", family, rope_theta=...))
    assert absent.config.rope_parameters["rope_theta"] == 10000.0, "as in both families' classes"
    model = load(write_changed(tmp_path / "d", family, rms_norm_eps=0.1))
    assert model.model.norm.variance_epsilon == 0.1
    assert (logits(model) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [(1, None, (1,)), ([1, 3], None, (1, 3)), (1, [3, 1], (1, 3)), (None, None, ())],
)
def test_eos_ids_from_both_files(tmp_path, config_eos, generation_eos, expected):
    write_changed(tmp_path, eos_token_id=config_eos)
    if generation_eos is not None:
        (tmp_path / "generation_config.json").write_text(
            json.dumps({"eos_token_id": generation_eos, "max_new_tokens": 48})
        )
    assert load(tmp_path).dsb.eos_ids == expected
    named = load(tmp_path, eos_ids=[7], mask_id=9)
    assert (named.dsb.eos_ids, named.dsb.mask_id) == ((7,), 9)
