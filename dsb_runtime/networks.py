"""The transformers config of the network that a published config.json describes.

Each `build_...` reads one form of config. A field that is missing or wrong is a ValueError.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from dsb_runtime.fields import RawConfig, flag, head_sizes, layers, real, shown, size, wrong


def rope_parameters(raw: RawConfig) -> dict[str, Any]:
    """Return plain RoPE as transformers 5 writes it, from `rope_parameters` or `rope_theta`.

    Scaled and partial RoPE are refused, since no checkpoint was published with either; for Llama 3
    see `llama3_rope`.
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


LLAMA3_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")


def llama3_rope(raw: RawConfig) -> dict[str, Any]:
    """Return Llama 3's scaled RoPE as transformers 5 writes it, or plain RoPE."""
    rope = raw.get("rope_scaling", raw.get("rope_parameters"))
    if not isinstance(rope, dict) or rope.get("rope_type") != "llama3":
        if "rope_scaling" in raw:
            raise wrong("rope_scaling", rope, "none, or that of Llama 3 (rope_type='llama3')")
        return rope_parameters(raw)
    numbers = {name: real(name, rope.get(name)) for name in LLAMA3_FACTORS}
    trained = size(rope, "original_max_position_embeddings")
    known = {"rope_type", "rope_theta", "original_max_position_embeddings", *numbers}
    if unknown := sorted(set(rope) - known):
        raise wrong(f"rope_scaling.{unknown[0]}", rope[unknown[0]], "none")
    theta = real("rope_theta", rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    return {
        "rope_type": "llama3", "rope_theta": theta, **numbers,
        "original_max_position_embeddings": trained,
    }  # fmt: skip


# `DiffusionInfo` has the special ids. Without these, transformers would fill in its own.
NO_IDS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}

LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6}
# LLaDA's configuration class gives absent fields these values, which come from GPT-2.
LLADA_DEFAULTS = {
    "activation_type": "swiglu", "block_type": "sequential", "layer_norm_type": "default",
    "rope": False, "rms_norm_eps": 1e-5, "weight_tying": True,
}  # fmt: skip


def shared_fields(raw: RawConfig, rope: dict[str, Any] | None = None) -> dict[str, Any]:
    """Build the fields that have the same names in all configs."""
    return {
        "rms_norm_eps": real("rms_norm_eps", raw["rms_norm_eps"]),
        "rope_parameters": rope_parameters(raw) if rope is None else rope,
        "tie_word_embeddings": flag(raw, "tie_word_embeddings"),
        **NO_IDS,
    }


def build_llama(raw: RawConfig, rope: dict[str, Any] | None = None) -> LlamaConfig:
    """Build the config from LLaDA's field names (`d_model`, ...) or Llama's (`hidden_size`, ...).
    `rope` is None for plain RoPE."""
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
        **shared_fields({**raw, **tied}, rope),
    )


def qwen_fields(raw: RawConfig) -> dict[str, Any]:
    """Build the fields of Qwen2's and Qwen3's configs."""
    kinds = raw.get("layer_types", [])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise wrong("layer_types", kinds, "'full_attention' for every layer")
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads",
        "max_position_embeddings",
    )  # fmt: skip
    sizes: dict[str, Any] = {name: size(raw, name) for name in names}
    sizes["num_hidden_layers"] = layers(raw, "num_hidden_layers")
    sizes |= head_sizes(raw, sizes["hidden_size"])
    return {**sizes, **shared_fields(raw), "use_sliding_window": False}


def build_qwen2(raw: RawConfig) -> Qwen2Config:
    """Build the config from Dream's, which is Qwen2's with a mask id, or from Qwen2's."""
    return Qwen2Config(**qwen_fields(raw))


def build_qwen3(raw: RawConfig) -> Qwen3Config:
    return Qwen3Config(**qwen_fields(raw), attention_bias=False)


def build_llama3(raw: RawConfig) -> LlamaConfig:
    """Build the config from Llama's, whose RoPE may be scaled as that of Llama 3."""
    return build_llama(raw, llama3_rope(raw))


def llada_defaults(raw: RawConfig) -> RawConfig:
    """The published code's defaults of a config in LLaDA's names or in Llama's."""
    return LLADA_DEFAULTS if "d_model" in raw else LLAMA_DEFAULTS


def llama_defaults(raw: RawConfig) -> RawConfig:
    return LLAMA_DEFAULTS


def diffencoder_defaults(raw: RawConfig) -> RawConfig:
    """As `llama_defaults`. A copy that this package saved is bidirectional, and need not say so."""
    return {**LLAMA_DEFAULTS, **({"dlm_paradigm": "bidirectional"} if "dsb_family" in raw else {})}
