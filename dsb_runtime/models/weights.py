"""The weights of a checkpoint by name and shape, which are checked before any of them is read.

A weight that is missing, unexpected or of another shape is an error and never a random layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

Shapes = dict[str, list[int]]

# Checkpoints of some versions store these buffers, which follow from the config.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
STORED = ("F64", "F32", "BF16", "F16")  # the dtypes of weights that no config has to explain
LAYER = re.compile(r"model\.layers\.(\d+)\.")
# What the names begin with in a file that was saved from inside of another object, and how to save
# the model itself.
PREFIXES = {
    "module.": ("DataParallel or DistributedDataParallel", "model.module.save_pretrained(...)"),
    "_orig_mod.": ("torch.compile", "model._orig_mod.save_pretrained(...)"),
    "base_model.model.": ("PEFT", "model.merge_and_unload().save_pretrained(...)"),
}


def read_shapes(files: list[Path]) -> Shapes:
    """The name and shape of every tensor, for which only the files' headers are read.

    Raises:
        ValueError: a file is damaged, or has a weight that is no number of floating point (which
            transformers would convert), or a name that cannot be printed or was seen before.
    """
    shapes: Shapes = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as handle:
                here = {k: handle.get_slice(k) for k in handle.keys()}  # noqa: SIM118 (a handle is no dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
        for name, weight in here.items():
            if not name.isprintable():
                raise ValueError(f"{path}: weight {name!r}: expected a name that can be printed")
            if name in shapes:
                raise ValueError(f"{path}: weight {name} is in an earlier shard as well")
            if weight.get_dtype() not in STORED:
                raise ValueError(
                    f"{path}: weight {name} is stored as {weight.get_dtype()}; expected "
                    f"{', '.join(STORED)}, as a checkpoint has that is not quantised"
                )
            shapes[name] = weight.get_shape()
    return shapes


def rename(name: str, mapping: Mapping[str, str]) -> str:
    """The weight's name in transformers' model."""
    for pattern, replacement in mapping.items():
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def published_names(shapes: Shapes, mapping: Mapping[str, str]) -> dict[str, str]:
    """The names that a model's weights have in transformers, each with its name in the checkpoint.

    Raises:
        ValueError: two names mean the same weight, or the names begin as in a wrapper of the model.
    """
    present: dict[str, str] = {}
    for name in shapes:
        for prefix, (wrapper, way) in PREFIXES.items():
            if name.startswith(prefix):
                raise ValueError(
                    f"weight {name}: it was saved from inside of {wrapper}; expected the model's "
                    f"own names, as {way} writes them"
                )
        target = rename(name, mapping)
        if target in present:
            raise ValueError(f"weights {present[target]} and {name} are the same weight")
        if not IGNORED.search(name):
            present[target] = name
    return present


def check_shapes(shapes: Shapes, present: Mapping[str, str], expected: Shapes) -> None:
    """Raise ValueError if a weight of `expected` is missing or has another shape."""
    missing = sorted(set(expected) - set(present))
    if missing:
        raise ValueError(f"missing weight {missing[0]} ({len(missing)} missing in all)")
    for target, shape in expected.items():
        name = present[target]
        if shapes[name] != shape:
            raise ValueError(f"weight {name} has shape {shapes[name]}, expected {shape}")


def check_sizes(shapes: Shapes, present: Mapping[str, str], config: PretrainedConfig) -> None:
    """Raise ValueError unless the files have weights of every size that the config names.

    This comes before a model is built, since its sizes decide how long that takes.
    """
    layers = len({match[1] for name in present if (match := LAYER.match(name))})
    if config.num_hidden_layers > layers:
        raise ValueError(
            f"config.json has {config.num_hidden_layers} layers, and the files have {layers}"
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = {
        "embed_tokens": config.vocab_size,
        "layers.0.self_attn.q_proj": config.num_attention_heads * head,
        "layers.0.self_attn.k_proj": config.num_key_value_heads * head,
        "layers.0.mlp.gate_proj": config.intermediate_size,
    }
    expected = {f"model.{name}.weight": [n, config.hidden_size] for name, n in rows.items()}
    check_shapes(shapes, present, expected)


def check_weights(shapes: Shapes, present: Mapping[str, str], model: PreTrainedModel) -> None:
    """Raise ValueError unless the checkpoint has exactly the model's weights."""
    expected = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings and "lm_head.weight" not in present:
        del expected["lm_head.weight"]
    check_shapes(shapes, present, expected)
    unexpected = sorted(present[name] for name in set(present) - set(expected))
    if unexpected:
        raise ValueError(f"unexpected weight {unexpected[0]} ({len(unexpected)} unexpected in all)")
