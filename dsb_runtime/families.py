"""What distinguishes LLaDA and Dream: config fields, weight names, logits shift, defaults.

LLaDA is `LlamaForCausalLM` and Dream is `Qwen2ForCausalLM`, both with bidirectional attention.
A new family is one entry of FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from dsb_runtime.elsewhere import check_runs_here
from dsb_runtime.fields import (
    RawConfig,
    check_shared,
    flag,
    head_sizes,
    layers,
    real,
    shown,
    size,
    wrong,
)


@dataclass(frozen=True)
class Family:
    """One family of diffusion language models.

    `key_mapping` renames published weights to transformers' names, if a checkpoint has the
    published ones. `defaults` returns the values that the published code gives to fields that a
    config lacks. `allowed` lists config fields that change the result, and the only values that
    this package reproduces; None stands for a field that is absent. `shift` says that the logits of
    position i - 1 predict the token of position i. `turn_ends` maps the config's EOS to further ids
    that end a turn.
    """

    name: str
    model_types: tuple[str, ...]
    model_class: str
    build_config: Callable[[RawConfig], PretrainedConfig]
    defaults: Callable[[RawConfig], RawConfig]
    key_mapping: Mapping[str, str]
    allowed: Mapping[str, tuple[Any, ...]]
    shift: bool
    prefix_window: int
    refresh_commit: str
    nucleus: bool  # whether sampling accepts top_p and top_k
    turn_ends: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class DiffusionInfo:
    """What decoding needs to know of a model; `load_model` attaches it as `model.dsb`."""

    family: Family
    mask_id: int
    eos_ids: tuple[int, ...]


# Classes that hold a model and compute what it computes, and the attribute that has the model.
HOLDERS = {
    "OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module",
}  # fmt: skip


def unwrap(model: Any) -> Any:
    """The transformers model inside torch.compile's, DDP's or PEFT's object, or `model` itself.

    Raises:
        TypeError: decoding with the model alone would differ from what the object around it does.
    """
    while True:
        names = [c.__name__ for c in type(model).__mro__]
        holder = next((name for name in names if name in HOLDERS), None)
        if "FullyShardedDataParallel" in names:
            raise TypeError(
                "model=FullyShardedDataParallel: its weights are flat shards; expected a model of "
                "torch.distributed.fsdp.fully_shard"
            )
        if holder is not None:
            model = getattr(model, HOLDERS[holder])
        elif "PeftModel" in names:
            if model.active_peft_config.is_prompt_learning:
                raise TypeError(
                    f"model={names[0]}: its adapter ({model.active_peft_config.peft_type.value}) "
                    "adds prompt tokens; expected one that changes layers, as LoRA"
                )
            model = model.get_base_model()
        else:
            return model


def device_of(model: Any) -> torch.device:
    """The device on which the model's embedding runs, and so where its inputs belong. accelerate's
    hooks may keep the weight itself elsewhere (on the CPU, on the disk) between two calls."""
    embedding = model.get_input_embeddings()
    placed = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if placed is None else torch.device(placed)


def check_model(model: Any) -> DiffusionInfo:
    """Return the model's family, mask id and EOS ids.

    Raises:
        TypeError: `model` does not come from `load_model` or `patch`.
    """
    info = getattr(model, "dsb", None)
    if not isinstance(info, DiffusionInfo):
        raise TypeError(
            f"model={type(model).__name__}: expected a model from dsb_runtime.load_model or patch"
        )
    return info


def rope_parameters(raw: RawConfig) -> dict[str, Any]:
    """Return plain RoPE as transformers 5 writes it, from `rope_parameters` or `rope_theta`.

    Scaled and partial RoPE are refused: neither family was published with either.
    """
    rope = raw.get("rope_parameters", {})
    plain = isinstance(rope, dict) and rope.get("rope_type", "default") == "default"
    if not plain or set(rope) - {"rope_type", "rope_theta"}:
        raise ValueError(
            f"config.json has rope_parameters={shown(rope)}, not supported: "
            "expected rope_type='default' and rope_theta only"
        )
    theta = real("rope_theta", rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    if raw.get("rope_theta", theta) != theta:
        raise wrong("rope_theta", raw["rope_theta"], f"{theta!r}, as in rope_parameters")
    return {"rope_type": "default", "rope_theta": theta}


# `DiffusionInfo` has the special ids. Without these, transformers would fill in its own.
NO_IDS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}

LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6}
# LLaDA's configuration class gives absent fields these values, which come from GPT-2.
LLADA_DEFAULTS = {
    "activation_type": "swiglu", "block_type": "sequential", "layer_norm_type": "default",
    "rope": False, "rms_norm_eps": 1e-5, "weight_tying": True,
}  # fmt: skip


def shared_fields(raw: RawConfig) -> dict[str, Any]:
    """Build the fields that have the same names in the configs of both families."""
    return {
        "rms_norm_eps": real("rms_norm_eps", raw["rms_norm_eps"]),
        "rope_parameters": rope_parameters(raw),
        "tie_word_embeddings": flag(raw, "tie_word_embeddings"),
        **NO_IDS,
    }


def build_llada(raw: RawConfig) -> LlamaConfig:
    """Build the config from LLaDA's own field names (`d_model`, ...) or Llama's (`hidden_size`,
    ...)."""
    hidden = size(raw, "hidden_size", "d_model")
    mlp = [name for name in ("intermediate_size", "mlp_hidden_size") if name in raw]
    tied = {"tie_word_embeddings": flag(raw, "weight_tying")} if "weight_tying" in raw else {}
    return LlamaConfig(
        vocab_size=size(raw, "embedding_size", "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(raw, *mlp) if mlp else size(raw, "mlp_ratio") * hidden,
        num_hidden_layers=layers(raw, "num_hidden_layers", "n_layers"),
        max_position_embeddings=size(raw, "max_position_embeddings", "max_sequence_length"),
        attention_bias=False,
        mlp_bias=False,
        **head_sizes(raw, hidden),
        **shared_fields({**raw, **tied}),
    )


def build_dream(raw: RawConfig) -> Qwen2Config:
    """Build the config from Dream's, which is Qwen2's with a mask id."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads",
        "max_position_embeddings",
    )  # fmt: skip
    sizes: dict[str, Any] = {name: size(raw, name) for name in names}
    sizes["num_hidden_layers"] = layers(raw, "num_hidden_layers")
    sizes |= head_sizes(raw, sizes["hidden_size"])
    return Qwen2Config(**sizes, **shared_fields(raw), use_sliding_window=False)


# Each module of a layer has a name in LLaDA and another one in Llama.
LAYER_NAMES = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj", "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}  # fmt: skip
SHARED_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "rope_scaling": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
}


def llada_defaults(raw: RawConfig) -> RawConfig:
    """The published code's defaults of a config in LLaDA's names or in Llama's."""
    return LLADA_DEFAULTS if "d_model" in raw else LLAMA_DEFAULTS


def dream_defaults(raw: RawConfig) -> RawConfig:
    return LLAMA_DEFAULTS


LLADA = Family(
    name="llada",
    model_types=("llada",),
    model_class="LlamaForCausalLM",
    build_config=build_llada,
    defaults=llada_defaults,
    key_mapping={
        r"^model\.transformer\.wte\.": "model.embed_tokens.",
        **{
            rf"^model\.transformer\.blocks\.(\d+)\.{theirs}\.": rf"model.layers.\1.{ours}."
            for theirs, ours in LAYER_NAMES.items()
        },
        r"^model\.transformer\.ln_f\.": "model.norm.",
        r"^model\.transformer\.ff_out\.": "lm_head.",
    },
    allowed={
        **dict.fromkeys(
            ("alibi", "scale_logits", "bias_for_layer_norm", "attention_layer_norm",
             "input_emb_norm", "include_bias", "include_qkv_bias", "attention_bias", "mlp_bias",
             "multi_query_attention"), (False, None),
        ),
        "rope": (True, None),
        "layer_norm_with_affine": (True, None),
        "block_type": ("llama", None),
        "block_group_size": (1, None),
        "activation_type": ("silu", None),
        "layer_norm_type": ("rms", None),
        "clip_qkv": (None,),
        "rope_scaling_factor": (None, 1, 1.0),
        **SHARED_ALLOWED,
    },
    shift=False,
    prefix_window=24,
    refresh_commit="select",
    nucleus=False,
    turn_ends={126081: (126348,)},
)  # fmt: skip

DREAM = Family(
    name="dream",
    model_types=("Dream", "dream"),
    model_class="Qwen2ForCausalLM",
    build_config=build_dream,
    defaults=dream_defaults,
    key_mapping={},
    allowed={"use_sliding_window": (False, None), **SHARED_ALLOWED},
    shift=True,
    prefix_window=4,
    refresh_commit="first",
    nucleus=True,
    turn_ends={151643: (151645,)},
)

FAMILIES: dict[str, Family] = {family.name: family for family in (LLADA, DREAM)}


DSB_FAMILY = "config.json has dsb_family"


def find_family(raw: RawConfig, name: str | None = None) -> Family:
    """The family of a checkpoint's config: by `name`, by the `dsb_family` that `dsb convert`
    writes, or by its `model_type`.

    Raises:
        ValueError: `name` is not a family, or the config's `model_type` belongs to none.
    """
    check_runs_here(raw)
    what, name = ("family", name) if name is not None else (DSB_FAMILY, raw.get("dsb_family"))
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    if name is not None:
        raise ValueError(f"{what}={shown(name)}: expected one of {', '.join(FAMILIES)}")
    model_type = raw.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ", ".join(t for f in FAMILIES.values() for t in f.model_types)
    raise ValueError(
        f"config.json has model_type={shown(model_type)}: expected one of {known}, or name the "
        f"family (family={' | '.join(map(repr, FAMILIES))}) for a checkpoint tuned from one of them"
    )


def supported_config(raw: RawConfig, family: Family) -> PretrainedConfig:
    """Return the transformers config whose model computes what the published one does.

    Raises:
        ValueError: a field is missing or malformed, or would change the result. The message names
            the field, its value and what is supported.
    """
    check_runs_here(raw)
    present = {name: value for name, value in raw.items() if value is not None}
    full = {**family.defaults(present), **present}
    for name, accepted in family.allowed.items():
        value = full.get(name)
        if not any(value is a or (type(value) is type(a) and value == a) for a in accepted):
            absent = f"no {name}, which means {value!r}"
            what = f"{name}={shown(value)}" if name in present else absent
            raise ValueError(
                f"config.json has {what}, not supported for {family.name}: expected {accepted[0]!r}"
            )
    config = family.build_config(full)
    check_shared(present, config.vocab_size)
    return config
