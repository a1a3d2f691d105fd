"""load_model refuses what it cannot reproduce, in one line that names the culprit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dsb_runtime as dsb
from tests import golden
from tests.checkpoints import parts, write, write_changed

HEAD = "model.transformer.ff_out.weight"
QUERY = "model.transformer.blocks.1.q_proj.weight"


def refused(
    folder: object, *said: str, kind: type[Exception] = ValueError, **arguments: Any
) -> None:
    """Loading raises `kind` with a message of one line that holds every string of `said`."""
    with golden.refusal(*said, kind=kind):
        dsb.load_model(folder, **{"device": "cpu", **arguments})


# --- config.json ------------------------------------------------------------------------------

CHANGING = {
    "llada": [
        ("alibi", True), ("scale_logits", True), ("rope", False), ("block_type", "sequential"),
        ("block_type", "parallel"), ("activation_type", "swiglu"), ("activation_type", "gelu"),
        ("hidden_act", "gelu"), ("layer_norm_type", "default"), ("layer_norm_type", "gemma_rms"),
        ("layer_norm_with_affine", False), ("bias_for_layer_norm", True),
        ("attention_layer_norm", True), ("input_emb_norm", True), ("include_bias", True),
        ("include_qkv_bias", True), ("attention_bias", True), ("mlp_bias", True),
        ("multi_query_attention", True), ("clip_qkv", 8.0), ("block_group_size", 4),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}), ("rope_scaling_factor", 4.0),
        ("partial_rotary_factor", 0.5), ("quantization_config", {"quant_method": "fp8"}),
    ],
    "dream": [
        ("hidden_act", "gelu"), ("use_sliding_window", True), ("partial_rotary_factor", 0.5),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("quantization_config", {"quant_method": "awq"}),
    ],
}  # fmt: skip
ROPES = [
    {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "longrope"},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "default", "rope_theta": 5e5}},
    "default",
]
MEANINGS = {  # what an absent field means to the published class
    "activation_type": "swiglu", "block_type": "sequential", "rope": False,
    "layer_norm_type": "default",
}  # fmt: skip
LAYERS = {"llada": "n_layers", "dream": "num_hidden_layers"}
HEADS = {"llada": "n_heads", "dream": "num_attention_heads"}
SIZES = {
    "llada": ("d_model", "embedding_size", "mlp_hidden_size", "n_heads", "max_sequence_length"),
    "dream": ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads"),
}
ABOVE_0 = "expected an int above 0"
# (family, fields of the config, what the message says)
WRONG_CONFIGS = [
    *((f, {k: v}, (f"{k}={v!r}", "expected")) for f, rows in CHANGING.items() for k, v in rows),
    *(("llada", {k: gone}, (f"no {k}, which means {means!r}",))
      for k, means in MEANINGS.items() for gone in (..., None)),
    *((f, {"rope_parameters": r}, (f"{r!r}", "default")) for f in golden.FAMILIES for r in ROPES),
    ("llada", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
     ("rope_theta=500000.0", "10000.0")),
    *((f, {name: value}, (f"{name}={value!r}", ABOVE_0))
      for f, name in LAYERS.items() for value in ("many", 0, -1, 2.5, True)),
    *((f, {name: None}, (name, ABOVE_0)) for f, name in LAYERS.items()),
    *((f, {name: value}, (f"{name}={str(value)[:50]}", "expected an int up to"))
      for f, names in SIZES.items() for name in names for value in (2**62, 10**400)),
    *((f, {name: 10_001}, (f"{name}=10001", "expected an int up to 10000"))
      for f, name in LAYERS.items()),
    *((f, {name: 9_999}, ("9999 layers, and the files have 3",)) for f, name in LAYERS.items()),
    *((f, {name: 2**30}, ("weight model.", str(2**30)))
      for f, names in SIZES.items() for name in names[:3]),
    *((f, dict.fromkeys(names[:3], 2**31 - 8), ("weight model.", str(2**31 - 8)))
      for f, names in SIZES.items()),
    *((f, {HEADS[f]: heads}, (f"{HEADS[f]}={heads}", said)) for f in HEADS for heads, said in
      ((5, "expected a divisor of the hidden size, 64"), (10**6, "a divisor of the hidden size"),
       (64, "heads of 1: RoPE rotates pairs; expected an even head_dim"))),
    ("llada", {"n_kv_heads": 3}, ("n_kv_heads=3: expected a divisor of n_heads=4",)),
    ("dream", {"num_key_value_heads": 8}, ("num_key_value_heads=8: expected a divisor of",)),
    ("llada", {"head_dim": 3}, ("head_dim=3", "expected an even head_dim")),
    *(("llada", {name: value}, (f"{name}={str(value)[:50]}", "above 0"))
      for name in ("rms_norm_eps", "rope_theta")
      for value in (0, -1.0, True, float("nan"), float("inf"), 10**400)),
    *(("llada", {"eos_token_id": eos}, (f"eos_token_id={eos!r}: expected a token id, 0 to 511",))
      for eos in (512, "</s>", [1, -1], 1.5, {"a": 1}, [[1]], 2**80)),
    *(("llada", {"mask_token_id": mask}, (f"mask_token_id={mask!r}", "expected"))
      for mask in (600, [[1]], "<mask>", 2**80)),
    *(("llada", {name: value}, (f"{name}={value!r}: expected a token id",))
      for name in ("bos_token_id", "pad_token_id") for value in ([[1]], "<s>", 2**80)),
    *((f, {name: value}, (f"{name}={value!r}: expected the name of a torch dtype",))
      for f, name in (("llada", "dtype"), ("dream", "torch_dtype"))
      for value in ("nonsense", "int8", 3, ["float32"], {"a": 1})),
    ("llada", {"weight_tying": [1]}, ("weight_tying=[1]: expected true or false",)),
    ("dream", {"tie_word_embeddings": "no"}, ("tie_word_embeddings='no': expected true",)),
    ("llada", {"mask_token_id": None}, ("no mask_token_id",)),
    *(("llada", {"dsb_family": name}, (f"config.json has dsb_family={name!r}: expected",))
      for name in ("other", ["llada"])),
    # transformers would leave the head untied with a warning; other loaders drop it.
    ("llada", {"weight_tying": True}, ("ties the embeddings",)),
    *(("llada", {name: size}, ("weight model.",)) for name, size in
      {"n_layers": 1, "d_model": 32, "mlp_hidden_size": 80, "n_kv_heads": 2}.items()),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "said"), WRONG_CONFIGS)
def test_configs(tmp_path, family, fields, said):
    """Both doors refuse them with the same line."""
    folder = write_changed(tmp_path, family, **fields)
    refused(folder, *said)
    with golden.refusal(*said):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"eos_token_id": [[1]]}', "generation_config.json has eos_token_id=[[1]]: expected"),
        ('{"max_new_tokens": [1]}', "generation_config.json: no generation config of transformers"),
        ('{"a": ' + "[" * 900 + "]" * 900 + "}", "generation_config.json: "),
    ],
)
def test_generation_configs(tmp_path, text, said):
    (write_changed(tmp_path) / "generation_config.json").write_text(text)
    refused(tmp_path, said)
    with golden.refusal(said):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_families(tmp_path):
    write_changed(tmp_path, model_type="bert")
    refused(tmp_path, "model_type='bert'", "llada, Dream", "family=")
    refused(tmp_path, "family='bert'", "llada, dream", family="bert")
    refused(tmp_path, "hidden_size", family="dream")


OTHER_MODELS = [  # (model_type, class, what the message says)
    ("llada2_moe", "LLaDA2MoeModelLM", "block-causal", "SGLang"),
    ("llada", "LLaDAMoEModelLM", "a mixture of experts", "dInfer"),
    ("lladamoe", "LLaDAMoEModelLM", "a mixture of experts", "dInfer"),
    ("bd3lm", "BD3LM", "block-causal", "its own code"),
    ("sdar", "SDARForCausalLM", "block-causal", "JetEngine"),
    ("sdar_moe", "SDARMoeForCausalLM", "block-causal", "LMDeploy"),
    ("Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM", "block-causal", "Diffulex"),
    ("llama", "StableDiffcoderForCausalLM", "block-causal", "Diffulex"),
    ("nemotron_labs_diffusion", "NemotronLabsDiffusionModel", "block-causal", "its own code"),
    ("diffusion_gemma", "DiffusionGemmaForBlockDiffusion", "uniform noise", "transformers"),
    ("gpt2", "GPT2LMHeadModel", "learned positions", "inf_diffugpt.py"),
]


@pytest.mark.parametrize(("model_type", "architecture", "what", "where"), OTHER_MODELS)
@pytest.mark.parametrize("family", [None, "llada"])
def test_models_that_run_elsewhere(tmp_path, model_type, architecture, what, where, family):
    """Whether or not a family is named, since the tokens would be wrong."""
    config = {**parts("llada")[0], "model_type": model_type, "architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "config.json names", what, "not supported", where, family=family)


def test_a_mixture_of_experts(tmp_path):
    folder = write_changed(tmp_path, num_experts=64, architectures=None)
    refused(folder, "num_experts=64: a mixture of experts")
    with golden.refusal("num_experts=64: a mixture of experts"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "a JSON file"),
        (b"[]", "found list"),
        (b"3", "found int"),
        (b"\xff\xfe", "codec"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "fewer levels"),
        (b'{"a":' + b"9" * 5000 + b"}", "5000 digits"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_json(tmp_path, text, said, name):
    (write_changed(tmp_path) / name).write_bytes(text)
    refused(tmp_path, name, said)


# --- weights ----------------------------------------------------------------------------------

BIAS = QUERY.replace("weight", "bias")
WRONG_WEIGHTS = {
    "no head": ({HEAD: None}, "missing weight lm_head.weight"),
    "no query": ({QUERY: None}, "missing weight model.layers.1.self_attn.q_proj.weight"),
    "extra": ({"extra": torch.ones(1)}, "unexpected weight extra"),
    "bias": ({BIAS: torch.ones(64)}, f"unexpected weight {BIAS}"),
    "shape": ({QUERY: torch.ones(64, 32)}, f"{QUERY} has shape [64, 32], expected [64, 64]"),
    "int8": ({QUERY: torch.ones(64, 64).to(torch.int8)}, f"{QUERY} is stored as I8; expected F64"),
    "fp8": (
        {QUERY: torch.ones(64, 64).to(torch.float8_e4m3fn)},
        f"weight {QUERY} is stored as F8_E4M3; expected F64, F32, BF16, F16",
    ),
    "name": ({"a\nb": torch.ones(1)}, "weight 'a\\nb': expected a name that can be printed"),
    "both names": (
        {"model.norm.weight": torch.ones(64)},
        "model.norm.weight and model.transformer.ln_f.weight are the same weight",
    ),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_weights_that_do_not_fit(tmp_path, case, shards):
    edit, said = WRONG_WEIGHTS[case]
    weights = {name: w for name, w in {**parts("llada")[1], **edit}.items() if w is not None}
    refused(write_changed(tmp_path, weights=weights, shards=shards), str(tmp_path), said)


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("module.", "DistributedDataParallel"), ("_orig_mod.", "torch.compile"),
        ("base_model.model.", "PEFT"), ("module._orig_mod.", "DistributedDataParallel"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", golden.FAMILIES)
def test_weights_saved_from_inside_of_a_wrapper(tmp_path, family, prefix, said):
    weights = {f"{prefix}{name}": weight for name, weight in parts(family)[1].items()}
    folder = write_changed(tmp_path, family, weights)
    refused(folder, f"weight {prefix}", "saved from inside of", said, "save_pretrained")


def test_dream_without_its_biases(tmp_path):
    weights = {name: w for name, w in parts("dream")[1].items() if not name.endswith("bias")}
    folder = write_changed(tmp_path, "dream", weights)
    refused(folder, "missing weight", "k_proj.bias", "9 missing in all")


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path):
    config, weights = parts("dream")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    model = dsb.load_model(write(tmp_path, config, weights), device="cpu")
    assert model.dsb.family.name == "dream"


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
@pytest.mark.parametrize("shards", [1, 2])
def test_files_cut_off(tmp_path, keep, shards):
    path = sorted(write_changed(tmp_path, shards=shards).glob("*.safetensors"))[-1]
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(tmp_path, path.name, "not a whole safetensors file")


def test_shards_that_do_not_fit_together(tmp_path):
    first, second = sorted(write_changed(tmp_path, shards=2).glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    refused(tmp_path, second.name, "in an earlier shard as well")
    second.unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors", "absent", kind=FileNotFoundError)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index(tmp_path, index):
    (write_changed(tmp_path, shards=2) / "model.safetensors.index.json").write_text(index)
    refused(tmp_path, "model.safetensors.index.json")


def test_an_adapter_beside_the_model(tmp_path):
    """transformers would take it with PEFT, and pass over it without."""
    (write_changed(tmp_path) / "adapter_config.json").write_text("{}")
    said = "an adapter of PEFT (adapter_config.json) in the model's folder"
    refused(tmp_path, said, "expected the adapter in a folder of its own")
    with golden.refusal(said):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("metadata", [None, ..., 3, []])
def test_an_index_without_metadata(tmp_path, metadata):
    path = write_changed(tmp_path, shards=2) / "model.safetensors.index.json"
    index = {"weight_map": json.loads(path.read_text())["weight_map"]}
    path.write_text(json.dumps(index if metadata is ... else {**index, "metadata": metadata}))
    shown = None if metadata is ... else metadata
    refused(tmp_path, path.name, f"metadata={shown!r}: expected a JSON object")


PICKLE = b"cos\nsystem\n(S'exit 1'\ntR."


@pytest.mark.parametrize(
    "name", ["a.bin", "a.safetensors.bin", "weights", "../a.safetensors", "/a"]
)
def test_a_shard_that_is_no_safetensors_file_of_the_folder(tmp_path, name):
    """It is refused by its name: nothing opens it."""
    folder = write_changed(tmp_path / "m", shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.transformer.ln_f.weight"] = name
    path.write_text(json.dumps(index))
    if not name.startswith("/"):
        (folder / name).write_bytes(PICKLE)
    refused(folder, f"shard {name!r}: expected a .safetensors file of this folder")


def test_a_pickle_named_safetensors_is_no_safetensors_file(tmp_path):
    (write_changed(tmp_path) / "model.safetensors").write_bytes(PICKLE)
    refused(tmp_path, "not a whole safetensors file")


# --- where from, and arguments ----------------------------------------------------------------


def test_folders_that_are_no_model(tmp_path):
    refused(tmp_path, "no config.json", kind=FileNotFoundError)
    (tmp_path / "config.json").write_text(json.dumps(parts("llada")[0]))
    refused(tmp_path, "no model.safetensors", kind=FileNotFoundError)
    refused(tmp_path / "config.json", "expected a checkpoint folder", kind=FileNotFoundError)
    for absent in ("/no/such/folder", "./absent", "nowhere", "a/b/c"):
        refused(absent, absent, "expected a checkpoint folder or a hub id", kind=FileNotFoundError)
    for wrong in (None, 3, ""):
        refused(wrong, f"model={wrong!r}", kind=TypeError)
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    refused(tmp_path, "an adapter of PEFT", "the model that it adapts", kind=FileNotFoundError)
    (tmp_path / "adapter_config.json").rename(tmp_path / "config.json")
    # Pickled weights are never opened.
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "a.ckpt"):
        (tmp_path / name).write_bytes(PICKLE)
        refused(tmp_path, f"pickled ({name})", "expected model.safetensors")
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mask_id": 512}, "mask_id=512: outside the vocabulary, expected 0 to 511"),
        ({"mask_id": -1}, "mask_id=-1"),
        ({"mask_id": True}, "mask_id=True: expected a token id"),
        ({"mask_id": 1}, "mask_id=1: it is also an EOS id"),
        ({"mask_id": "5"}, "mask_id='5'"),
        ({"eos_ids": [512]}, "eos_ids=512"),
        ({"eos_ids": ["</s>"]}, "eos_ids='</s>'"),
        ({"eos_ids": 1, "kind": TypeError}, "eos_ids=1: expected a tuple"),
        ({"dtype": "int8"}, "dtype='int8': expected 'auto', 'float32'"),
        ({"dtype": torch.float64}, "dtype=torch.float64"),
        ({"dtype": "half-ish"}, "dtype='half-ish'"),
        ({"dtype": None}, "dtype=None"),
        ({"device": "gpu9"}, "device='gpu9'"),
        ({"device": "meta"}, "device='meta': it holds no weights"),
        ({"device": "vulkan"}, "device='vulkan': no such device here; expected 'auto'"),
        ({"device": None}, "device=None: expected 'auto' or a torch device"),
        ({"device": "cuda"}, "device='cuda': no CUDA device here"),
    ],
)
def test_arguments(monkeypatch, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(golden.DATA / "llada", said, **arguments)


@pytest.mark.parametrize("files", [{"tokenizer.json": "{"}, {"tokenizer.json": "{}"}, {}])
def test_tokenizers_that_cannot_be_read(tmp_path: Path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="no tokenizer that can be read"):
        dsb.load_tokenizer(tmp_path)
