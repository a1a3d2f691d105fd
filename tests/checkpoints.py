"""Tiny checkpoints written into a folder, derived from the golden ones in `tests/data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests import golden
from tests.random_models import SMALL, random_model

CHAT_TEMPLATE = "{% for m in messages %}w2 {{ m['content'] }} w3{% endfor %}"
FORWARDS = {f: load_file(golden.DATA / f / "forward.safetensors") for f in golden.FAMILIES}


def parts(family: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A golden checkpoint's config and weights, to be changed and written elsewhere."""
    folder = golden.DATA / family
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors")


def write(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], shards: int = 1
) -> Path:
    """A checkpoint folder: one safetensors file, or `shards` of them and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, where = sorted(weights), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_changed(
    folder: Path, family: str = "llada", weights: dict[str, Tensor] | None = None, shards: int = 1,
    **fields: Any,
) -> Path:  # fmt: skip
    """A golden checkpoint with other config fields, where `...` removes one, or other weights."""
    config, own = parts(family)
    config = {name: value for name, value in {**config, **fields}.items() if value is not ...}
    return write(folder, config, own if weights is None else weights, shards)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """(L, V) logits of the golden forward's ids."""
    return model(FORWARDS["llada"]["input_ids"][None]).logits[0]


@torch.no_grad()
def error_of(model: PreTrainedModel, family: str) -> float:
    """The largest difference of a model's logits from the published ones."""
    logits = model(FORWARDS[family]["input_ids"][None]).logits[0]
    return float((logits - FORWARDS[family]["logits"]).abs().max())


def write_tokenizer(folder: Path) -> Path:
    """A word-level tokenizer (`w0` ... `w510`) with a mask token, an EOS and a chat template."""
    words = {f"w{i}": i for i in range(511)} | {"<mask>": 511}
    words["<end>"] = words.pop("w1")  # id 1 is the EOS
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", mask_token="<mask>", unk_token="w0",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_chat_model(folder: Path) -> Path:
    """The golden LLaDA model with a tokenizer."""
    return write_tokenizer(write_changed(folder))


LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# A family, and what its config names besides the fields of transformers' model.
ADAPTED: dict[str, dict[str, Any]] = {
    "a2d-llama": {"model_type": "a2d-llama", "rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
    "a2d-qwen2": {"model_type": "a2d-qwen2"},
    "a2d-qwen3": {"model_type": "a2d-qwen3", "rope_theta": 1e6},
    "diffencoder": {
        "architectures": ["DiffEncoderModel"], "dlm_paradigm": "bidirectional", "model_type": "x",
        "mask_token_id": 511, "block_size": 32,
    },
    "diffullama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
}  # fmt: skip


def write_adapted(folder: Path, family: str, **fields: Any) -> PreTrainedModel:
    """A random model in the format of a family that was made from a causal one, with a tokenizer.
    Returns the causal model of transformers that has the same weights."""
    kind = {"diffencoder": "Qwen3", "diffullama": "Llama"}.get(family, family[4:].capitalize())
    ours = {**ADAPTED[family], **fields}
    rope = {"rope_type": "default", **ours.get("rope_scaling", {})}
    rope["rope_theta"] = ours.get("rope_theta", 10000.0)
    sizes = {name: value for name, value in fields.items() if name in SMALL}
    causal = random_model(kind, eos_token_id=1, rope_parameters=rope, **sizes)
    for name, weight in causal.named_parameters():
        weight.data = torch.rand_like(weight) + 0.5 if "norm" in name else weight.data * 8
    config = {**causal.config.to_dict(), "rope_parameters": None, **ours}
    weights = dict(causal.state_dict())
    if family == "diffencoder":
        weights = {
            name.replace("lm_head", "diffusion_head").replace("model.", "encoder."): weight
            for name, weight in weights.items()
        }
    write_tokenizer(write(folder, config, weights))
    return causal


REMOTE = {  # as the published repositories have it
    "llada": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "dream": {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": "modeling_dream.DreamModel",
    },
}


def published(folder: Path, family: str, **changes: Any) -> Path:
    """A golden checkpoint whose config names code in the repository, as the published ones do."""
    return write_changed(folder, family, **{"auto_map": REMOTE[family], **changes})


def write_dream_tokenizer(folder: Path) -> None:
    """As Dream publishes it: a vocabulary, merges and a class in the repository."""
    vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    settings = {
        "tokenizer_class": "DreamTokenizer", "chat_template": CHAT_TEMPLATE,
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {"4": {"content": "<|mask|>", "special": True}},
        "mask_token": "<|mask|>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
