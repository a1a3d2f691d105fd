"""What distinguishes the families: config fields, weight names, logits shift, defaults.

Each is a decoder of transformers with bidirectional attention: LLaDA is `LlamaForCausalLM`, Dream
is `Qwen2ForCausalLM`. A new family is one entry of FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from dsb_runtime.elsewhere import check_runs_here
from dsb_runtime.fields import RawConfig, check_shared, shown, special_id
from dsb_runtime.networks import (
    build_llama,
    build_llama3,
    build_qwen2,
    build_qwen3,
    diffencoder_defaults,
    llada_defaults,
    llama_defaults,
)


@dataclass(frozen=True)
class Family:
    """One family of diffusion language models.

    `model_types` are values of a config's `model_type`, or classes that its `architectures` name.
    `key_mapping` renames published weights to transformers' names, if a checkpoint has the
    published ones. `defaults` returns the values that the published code gives to fields that a
    config lacks. `allowed` lists config fields that change the result, and the only values that
    this package reproduces; None stands for a field that is absent. `shift` says that the logits of
    position i - 1 predict the token of position i. `turn_ends` maps the config's EOS to further ids
    that end a turn. `mask_of_tokenizer` says that the mask id is that of the tokenizer's mask
    token, if the config names none.
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
    mask_of_tokenizer: bool = False


@dataclass(frozen=True)
class DiffusionInfo:
    """What decoding needs to know of a model; `load_model` attaches it as `model.dsb`."""

    family: Family
    mask_id: int
    eos_ids: tuple[int, ...]


def checked_info(
    family: Family, mask_id: Any, eos_ids: Any, vocab_size: int, hint: str = ""
) -> DiffusionInfo:
    """What a caller or a checkpoint says of a model; `hint` ends the error for a wrong mask id.

    Raises:
        TypeError: `eos_ids` is neither a tuple nor a list.
        ValueError: an id is no token id, or the mask is also an EOS id.
    """
    mask = special_id("mask_id", mask_id, vocab_size, hint)
    if not isinstance(eos_ids, (tuple, list)):
        raise TypeError(f"eos_ids={eos_ids!r}: expected a tuple of token ids")
    ends = tuple(special_id("eos_ids", end, vocab_size, " each") for end in eos_ids)
    if mask in ends:
        raise ValueError(f"mask_id={mask}: it is also an EOS id; expected different ids")
    return DiffusionInfo(family, mask, ends)


# Classes that hold a model and compute what it computes, and the attribute that has the model.
HOLDERS = {
    "OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module",
}  # fmt: skip


def adapter_refusal(config: Any) -> str | None:
    """Why a PEFT config's adapter acts through PEFT's own forward, and not through the layers that
    it adapts alone. None where it does not."""
    kind = config.peft_type.value
    if config.is_prompt_learning or config.is_adaption_prompt:
        return f"peft_type={kind!r} adds prompt tokens; expected one that changes layers, as 'LORA'"
    if kind in ("XLORA", "POLY"):
        return f"peft_type={kind!r} mixes adapters in each forward; expected one of fixed weights"
    if tokens := getattr(config, "alora_invocation_tokens", None):
        return (
            f"alora_invocation_tokens={tokens!r}: only tokens after these are adapted, as in a "
            "causal model; expected an adapter of all tokens"
        )
    return None


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
        elif "PeftModel" in names or "PeftMixedModel" in names:
            # X-LoRA's `active_adapters` are those that it mixes, and `active_adapter` is its own.
            one = model.active_adapter
            for adapter in (*model.active_adapters, *([one] if isinstance(one, str) else one)):
                if (why := adapter_refusal(model.peft_config[adapter])) is not None:
                    raise TypeError(f"model={names[0]}: {why}")
            model = model.base_model.model
        else:
            return model


def device_of(model: Any) -> torch.device:
    """The device on which the model's embedding runs, and so where its inputs belong. accelerate's
    hooks may keep the weight itself elsewhere (on the CPU, on the disk) between two calls."""
    embedding = model.get_input_embeddings()
    execution_device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if execution_device is None else torch.device(execution_device)


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


LLADA = Family(
    name="llada",
    model_types=("llada",),
    model_class="LlamaForCausalLM",
    build_config=build_llama,
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
    build_config=build_qwen2,
    defaults=llama_defaults,
    key_mapping={},
    allowed={"use_sliding_window": (False, None), **SHARED_ALLOWED},
    shift=True,
    prefix_window=4,
    refresh_commit="first",
    nucleus=True,
    turn_ends={151643: (151645,)},
)

# The A2D recipe of dllm makes a Llama, Qwen2 or Qwen3 bidirectional and trains it to fill masks,
# each by the logits of its own position. It decodes as LLaDA does. Sources: docs/checkpoints.md.
NO_BIAS = dict.fromkeys(("attention_bias", "mlp_bias"), (False, None))
A2D_LLAMA = replace(
    LLADA,
    name="a2d-llama",
    model_types=("a2d-llama",),
    build_config=build_llama3,
    defaults=llama_defaults,
    key_mapping={},
    allowed={**NO_BIAS, **{k: v for k, v in SHARED_ALLOWED.items() if k != "rope_scaling"}},
    turn_ends={128001: (128009,)},
    mask_of_tokenizer=True,
)
A2D_QWEN2 = replace(
    A2D_LLAMA,
    name="a2d-qwen2",
    model_types=("a2d-qwen2",),
    model_class="Qwen2ForCausalLM",
    build_config=build_qwen2,
    allowed=DREAM.allowed,
    turn_ends=DREAM.turn_ends,
)
A2D_QWEN3 = replace(
    A2D_QWEN2,
    name="a2d-qwen3",
    model_types=("a2d-qwen3",),
    model_class="Qwen3ForCausalLM",
    build_config=build_qwen3,
    allowed={**NO_BIAS, **DREAM.allowed},
)
# A bidirectional Qwen3 under other names; with another `dlm_paradigm` it is block-causal.
DIFFENCODER = replace(
    A2D_QWEN3,
    name="diffencoder",
    model_types=("DiffEncoderModel",),
    defaults=diffencoder_defaults,
    key_mapping={r"^encoder\.": "model.", r"^diffusion_head\.": "lm_head."},
    allowed={
        **A2D_QWEN3.allowed, "dlm_paradigm": ("bidirectional",), "disable_qk_norm": (False, None),
    },
    mask_of_tokenizer=False,
)  # fmt: skip
# A bidirectional Llama 2 whose logits are shifted. As its model_type is Llama's, it must be named.
DIFFULLAMA = replace(
    DREAM,
    name="diffullama",
    model_types=(),
    model_class="LlamaForCausalLM",
    build_config=build_llama,
    allowed={**NO_BIAS, **SHARED_ALLOWED},
    turn_ends={},
    mask_of_tokenizer=True,
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (LLADA, DREAM, A2D_LLAMA, A2D_QWEN2, A2D_QWEN3, DIFFENCODER, DIFFULLAMA)
}


DSB_FAMILY = "config.json has dsb_family"


def config_family(raw: RawConfig, name: str | None = None) -> Family | None:
    """The family that `name` or a config names: by the `dsb_family` that `dsb convert` writes, by
    its `model_type`, or by a class of its `architectures`. None if the config names none.

    Raises:
        ValueError: `name` or `dsb_family` is not a family, or the model is none that runs here.
    """
    check_runs_here(raw)
    what, name = ("family", name) if name is not None else (DSB_FAMILY, raw.get("dsb_family"))
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    if name is not None:
        raise ValueError(f"{what}={shown(name)}: expected one of {', '.join(FAMILIES)}")
    classes = raw.get("architectures")
    for each in (raw.get("model_type"), *(classes if isinstance(classes, list) else [])):
        for family in FAMILIES.values():
            if each in family.model_types:
                return family
    return None


def find_family(raw: RawConfig, name: str | None = None) -> Family:
    """The family of a checkpoint's config, as `config_family` finds it.

    Raises:
        ValueError: `name` is not a family, or the config names none.
    """
    family = config_family(raw, name)
    if family is not None:
        return family
    known = ", ".join(t for f in FAMILIES.values() for t in f.model_types)
    raise ValueError(
        f"config.json has model_type={shown(raw.get('model_type'))}: expected one of {known}, or "
        f"name the family (family={' | '.join(map(repr, FAMILIES))}) for a checkpoint tuned from "
        "one of them"
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
            hint = ", or a model that transformers has loaded, given to dsb_runtime.patch"
            raise ValueError(
                f"config.json has {what}, not supported for {family.name}: expected {accepted[0]!r}"
                f"{hint if name == 'quantization_config' else ''}"
            )
    try:
        config = family.build_config(full)
    except ValueError as error:
        raise ValueError(f"{error}; it is read as a checkpoint of {family.name}") from error
    check_shared(present, config.vocab_size)
    return config
