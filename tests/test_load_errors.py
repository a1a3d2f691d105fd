"""load_model refuses what it cannot reproduce, in one line that names the culprit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dsb_runtime as dsb
from tests import golden
from tests.checkpoints import parts, write

HEAD = "model.transformer.ff_out.weight"
QUERY = "model.transformer.blocks.1.q_proj.weight"


def refused(
    folder: object, *said: str, kind: type[Exception] = ValueError, **arguments: Any
) -> None:
    """Loading raises `kind` with a message of one line that holds every string of `said`."""
    with pytest.raises(kind) as caught:
        dsb.load_model(folder, **{"device": "cpu", **arguments})
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


# --- config.json ------------------------------------------------------------------------------

CHANGING = [
    ("llada", "alibi", True), ("llada", "scale_logits", True), ("llada", "rope", False),
    ("llada", "block_type", "sequential"), ("llada", "block_type", "parallel"),
    ("llada", "activation_type", "swiglu"), ("llada", "activation_type", "gelu"),
    ("llada", "hidden_act", "gelu"), ("llada", "layer_norm_type", "default"),
    ("llada", "layer_norm_type", "gemma_rms"), ("llada", "layer_norm_with_affine", False),
    ("llada", "bias_for_layer_norm", True), ("llada", "attention_layer_norm", True),
    ("llada", "input_emb_norm", True), ("llada", "include_bias", True),
    ("llada", "include_qkv_bias", True), ("llada", "attention_bias", True),
    ("llada", "mlp_bias", True), ("llada", "multi_query_attention", True),
    ("llada", "clip_qkv", 8.0), ("llada", "block_group_size", 4),
    ("llada", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ("llada", "rope_scaling_factor", 4.0), ("llada", "partial_rotary_factor", 0.5),
    ("llada", "quantization_config", {"quant_method": "fp8"}),
    ("dream", "hidden_act", "gelu"), ("dream", "use_sliding_window", True),
    ("dream", "rope_scaling", {"type": "yarn", "factor": 4.0}),
    ("dream", "partial_rotary_factor", 0.5),
    ("dream", "quantization_config", {"quant_method": "awq"}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name", "value"), CHANGING)
def test_fields_that_change_the_result(tmp_path, family, name, value):
    config, weights = parts(family)
    refused(write(tmp_path, {**config, name: value}, weights), f"{name}={value!r}", "expected")


@pytest.mark.parametrize(
    ("name", "means"),
    [("activation_type", "swiglu"), ("block_type", "sequential"), ("rope", False),
     ("layer_norm_type", "default")],
)  # fmt: skip
@pytest.mark.parametrize("how", ["absent", "null"])
def test_absent_fields_mean_what_they_mean_to_the_published_class(tmp_path, name, means, how):
    config, weights = parts("llada")
    del config[name]
    if how == "null":
        config[name] = None
    refused(write(tmp_path, config, weights), f"no {name}, which means {means!r}")


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope"},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"full_attention": {"rope_type": "default", "rope_theta": 5e5}},
        "default",
    ],
)
def test_other_rotary_embeddings(tmp_path, family, rope):
    config, weights = parts(family)
    refused(write(tmp_path, {**config, "rope_parameters": rope}, weights), f"{rope!r}", "default")


def test_two_rotary_bases(tmp_path):
    config, weights = parts("llada")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    refused(write(tmp_path, config, weights), "rope_theta=500000.0", "10000.0")


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("value", ["many", 0, -1, 2.5, True, None])
def test_sizes(tmp_path, family, value):
    config, weights = parts(family)
    name = "n_layers" if family == "llada" else "num_hidden_layers"
    write(tmp_path, {**config, name: value}, weights)
    refused(tmp_path, name, "expected an int above 0", "" if value is None else f"={value!r}")


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", ["1e-5", 0, -1.0, True, float("nan")])
def test_real_numbers(tmp_path, name, value):
    config, weights = parts("llada")
    refused(write(tmp_path, {**config, name: value}, weights), f"{name}={value!r}", "above 0")


def test_families(tmp_path):
    config, weights = parts("llada")
    write(tmp_path, {**config, "model_type": "gpt2"}, weights)
    refused(tmp_path, "model_type='gpt2'", "llada, Dream", "family=")
    refused(tmp_path, "family='gpt2'", "llada, dream", family="gpt2")
    refused(tmp_path, "hidden_size", family="dream")


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not valid JSON"), ("[]", "found list"), ("3", "found int"), (b"\xff\xfe", "not valid")],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_json(tmp_path, text, said, name):
    write(tmp_path, *parts("llada"))
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(tmp_path, name, said)


# --- weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda w: w.pop(HEAD), ("missing weight lm_head.weight",)),
        (lambda w: w.pop(QUERY), ("missing weight model.layers.1.self_attn.q_proj.weight",)),
        (lambda w: w.update(extra=torch.ones(1)), ("unexpected weight extra",)),
        (
            lambda w: w.update({QUERY.replace("weight", "bias"): torch.ones(64)}),
            (f"unexpected weight {QUERY.replace('weight', 'bias')}",),
        ),
        (
            lambda w: w.update({QUERY: torch.ones(64, 32)}),
            (QUERY, "shape [64, 32], expected [64, 64]"),
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(64)}),
            ("model.norm.weight and model.transformer.ln_f.weight are the same weight",),
        ),
    ],
    ids=["no head", "no query", "extra", "bias", "shape", "both names"],
)
def test_weights_that_do_not_fit(tmp_path, edit, said, shards):
    config, weights = parts("llada")
    edit(weights)
    refused(write(tmp_path, config, weights, shards), str(tmp_path), *said)


@pytest.mark.parametrize("field", ["n_layers", "d_model", "mlp_hidden_size", "n_kv_heads"])
def test_a_config_of_another_size(tmp_path, field):
    config, weights = parts("llada")
    refused(write(tmp_path, {**config, field: config[field] // 2}, weights), "weight model.")


def test_dream_without_its_biases(tmp_path):
    config, weights = parts("dream")
    weights = {name: w for name, w in weights.items() if not name.endswith("bias")}
    refused(write(tmp_path, config, weights), "missing weight", "k_proj.bias", "9 missing in all")


def test_tied_embeddings_with_another_head(tmp_path):
    """transformers would leave them untied with a warning; other loaders drop the head."""
    config, weights = parts("llada")
    refused(write(tmp_path, {**config, "weight_tying": True}, weights), "ties the embeddings")


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path):
    config, weights = parts("dream")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    model = dsb.load_model(write(tmp_path, config, weights), device="cpu")
    assert model.dsb.family.name == "dream"


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
@pytest.mark.parametrize("shards", [1, 2])
def test_files_cut_off(tmp_path, keep, shards):
    write(tmp_path, *parts("llada"), shards)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(tmp_path, path.name, "not a whole safetensors file")


def test_a_missing_shard(tmp_path):
    write(tmp_path, *parts("llada"), 2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors", "absent", kind=FileNotFoundError)


def test_a_weight_in_two_shards(tmp_path):
    write(tmp_path, *parts("llada"), 2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    refused(tmp_path, second.name, "in an earlier shard as well")


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index(tmp_path, index):
    write(tmp_path, *parts("llada"), 2)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refused(tmp_path, "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "a.ckpt"])
def test_pickled_weights_are_never_opened(tmp_path, name):
    config, _ = parts("llada")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(tmp_path, f"pickled ({name})", "expected model.safetensors")


# --- where from, and arguments ----------------------------------------------------------------


def test_folders_that_are_no_model(tmp_path):
    refused(tmp_path, "no config.json", kind=FileNotFoundError)
    config, _ = parts("llada")
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "no model.safetensors", kind=FileNotFoundError)
    refused(tmp_path / "config.json", "expected a checkpoint folder", kind=FileNotFoundError)
    for absent in ("/no/such/folder", "./absent", "nowhere", "a/b/c"):
        refused(absent, absent, "expected a checkpoint folder or a hub id", kind=FileNotFoundError)
    for wrong in (None, 3, ""):
        refused(wrong, f"model={wrong!r}", kind=TypeError)


def test_an_unreachable_hub_id():
    code = (
        "import dsb_runtime as dsb\n"
        "try: dsb.load_model('nobody/nothing')\n"
        "except OSError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"model='nobody/nothing': neither a folder nor .*\n", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"mask_id": 512}, ValueError, "mask_id=512: outside the vocabulary, expected 0 to 511"),
        ({"mask_id": -1}, ValueError, "mask_id=-1"),
        ({"mask_id": True}, ValueError, "mask_id=True: expected a token id"),
        ({"mask_id": 1}, ValueError, "mask_id=1: it is also an EOS id"),
        ({"mask_id": "5"}, ValueError, "mask_id='5'"),
        ({"eos_ids": [512]}, ValueError, "eos_ids=512"),
        ({"eos_ids": ["</s>"]}, ValueError, "eos_ids='</s>'"),
        ({"eos_ids": 1}, TypeError, "eos_ids=1: expected a tuple"),
        ({"dtype": "int8"}, ValueError, "dtype='int8': expected 'auto', 'float32'"),
        ({"dtype": torch.float64}, ValueError, "dtype=torch.float64"),
        ({"dtype": "half-ish"}, ValueError, "dtype='half-ish'"),
        ({"dtype": None}, ValueError, "dtype=None"),
        ({"device": "gpu9"}, ValueError, "device='gpu9'"),
        ({"device": "meta"}, ValueError, "device='meta': it holds no weights"),
        ({"device": "vulkan"}, ValueError, "device='vulkan': no such device here; expected 'auto'"),
        ({"device": None}, ValueError, "device=None: expected 'auto' or a torch device"),
    ],
)
def test_arguments(arguments, kind, said):
    refused(golden.DATA / "llada", said, kind=kind, **arguments)


def test_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(golden.DATA / "llada", "device='cuda'", "no CUDA device here", device="cuda")


@pytest.mark.parametrize("eos", [512, "</s>", [1, -1], 1.5, {"a": 1}])
def test_eos_ids_of_the_config(tmp_path, eos):
    config, weights = parts("llada")
    refused(write(tmp_path, {**config, "eos_token_id": eos}, weights), "eos_token_id=")


def test_mask_ids_of_the_config(tmp_path):
    config, weights = parts("llada")
    refused(write(tmp_path, {**config, "mask_token_id": 600}, weights), "mask_id=600")
    refused(write(tmp_path, {**config, "mask_token_id": None}, weights), "no mask_token_id")


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{"), ("tokenizer.json", "{}"), (None, None)]
)
def test_tokenizers_that_cannot_be_read(tmp_path: Path, name, text):
    if name is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="no tokenizer that can be read"):
        dsb.load_tokenizer(tmp_path)
