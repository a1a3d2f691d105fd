"""What LLaDA and Dream are: config fields, weight names, mask id, logits shift.

LLaDA is `LlamaForCausalLM` and Dream is `Qwen2ForCausalLM`, both with bidirectional attention.
A new family is one entry of FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

RawConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One family of diffusion language models.

    `key_mapping` renames published weights to transformers' names (used where the checkpoint has
    them). `allowed` lists, for config fields that change the result, the only values whose result
    is reproduced. `shift`: the logits of row i-1 predict token i. `turn_ends`: ids that end a turn
    beside the config's EOS, known by that EOS.
    """

    name: str
    model_types: tuple[str, ...]
    model_class: str
    build_config: Callable[[RawConfig], PretrainedConfig]
    key_mapping: Mapping[str, str]
    allowed: Mapping[str, tuple[Any, ...]]
    shift: bool
    prefix_window: int
    refresh_commit: str
    nucleus: bool  # sampling takes top_p and top_k
    turn_ends: Mapping[int, tuple[int, ...]]


def rope_parameters(raw: RawConfig, default_theta: float) -> dict[str, Any]:
    """RoPE settings in transformers 5's form, from `rope_parameters` or `rope_theta`."""
    given = dict(raw.get("rope_parameters") or {})
    given.setdefault("rope_type", "default")
    given.setdefault("rope_theta", raw.get("rope_theta", default_theta))
    return given


def field(raw: RawConfig, *names: str) -> Any:
    """The first of `names` in the config; KeyError names the first where none is there."""
    for name in names:
        if raw.get(name) is not None:
            return raw[name]
    raise KeyError(names[0])


def build_llada(raw: RawConfig) -> LlamaConfig:
    """LLaDA's own field names (`d_model`, ...) or Llama's (`hidden_size`, ...)."""
    hidden = field(raw, "hidden_size", "d_model")
    heads = field(raw, "num_attention_heads", "n_heads")
    kv_heads = raw.get("num_key_value_heads") or raw.get("n_kv_heads") or heads
    mlp = raw.get("intermediate_size") or raw.get("mlp_hidden_size")
    return LlamaConfig(
        vocab_size=raw.get("embedding_size") or field(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=mlp or field(raw, "mlp_ratio") * hidden,
        num_hidden_layers=field(raw, "num_hidden_layers", "n_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        max_position_embeddings=field(raw, "max_position_embeddings", "max_sequence_length"),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
        rope_parameters=rope_parameters(raw, 10000.0),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", raw.get("weight_tying", False))),
        pad_token_id=raw.get("pad_token_id"),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw.get("eos_token_id"),
        attention_bias=False,
        mlp_bias=False,
    )


def build_dream(raw: RawConfig) -> Qwen2Config:
    """Dream's config is Qwen2's with a mask id."""
    return Qwen2Config(
        vocab_size=field(raw, "vocab_size"),
        hidden_size=field(raw, "hidden_size"),
        intermediate_size=field(raw, "intermediate_size"),
        num_hidden_layers=field(raw, "num_hidden_layers"),
        num_attention_heads=field(raw, "num_attention_heads"),
        num_key_value_heads=field(raw, "num_key_value_heads"),
        max_position_embeddings=field(raw, "max_position_embeddings"),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_parameters=rope_parameters(raw, 1e6),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        pad_token_id=raw.get("pad_token_id"),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw.get("eos_token_id"),
        use_sliding_window=False,
    )


BLOCK = r"^model\.transformer\.blocks\.(\d+)\."
LAYER = r"model.layers.\1."

LLADA = Family(
    name="llada",
    model_types=("llada",),
    model_class="LlamaForCausalLM",
    build_config=build_llada,
    key_mapping={
        r"^model\.transformer\.wte\.": "model.embed_tokens.",
        BLOCK + r"q_proj\.": LAYER + "self_attn.q_proj.",
        BLOCK + r"k_proj\.": LAYER + "self_attn.k_proj.",
        BLOCK + r"v_proj\.": LAYER + "self_attn.v_proj.",
        BLOCK + r"attn_out\.": LAYER + "self_attn.o_proj.",
        BLOCK + r"ff_proj\.": LAYER + "mlp.gate_proj.",
        BLOCK + r"up_proj\.": LAYER + "mlp.up_proj.",
        BLOCK + r"ff_out\.": LAYER + "mlp.down_proj.",
        BLOCK + r"attn_norm\.": LAYER + "input_layernorm.",
        BLOCK + r"ff_norm\.": LAYER + "post_attention_layernorm.",
        r"^model\.transformer\.ln_f\.": "model.norm.",
        r"^model\.transformer\.ff_out\.": "lm_head.",
    },
    allowed={
        "alibi": (False, None),
        "scale_logits": (False, None),
        "block_type": ("llama", None),
        "block_group_size": (1, None),
        "activation_type": ("silu", None),
        "hidden_act": ("silu", None),
        "layer_norm_type": ("rms", None),
        "layer_norm_with_affine": (True, None),
        "bias_for_layer_norm": (False, None),
        "attention_layer_norm": (False, None),
        "input_emb_norm": (False, None),
        "include_bias": (False, None),
        "include_qkv_bias": (False, None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "multi_query_attention": (False, None),
        "clip_qkv": (None,),
        "rope": (True, None),
        "rope_scaling": (None,),
        "rope_scaling_factor": (None, 1, 1.0),
    },
    shift=False,
    prefix_window=24,
    refresh_commit="select",
    nucleus=False,
    turn_ends={126081: (126348,)},
)

DREAM = Family(
    name="dream",
    model_types=("Dream", "dream"),
    model_class="Qwen2ForCausalLM",
    build_config=build_dream,
    key_mapping={},
    allowed={
        "hidden_act": ("silu", None),
        "use_sliding_window": (False, None),
        "rope_scaling": (None,),
    },
    shift=True,
    prefix_window=4,
    refresh_commit="first",
    nucleus=True,
    turn_ends={151643: (151645,)},
)

FAMILIES: dict[str, Family] = {family.name: family for family in (LLADA, DREAM)}


def find_family(raw: RawConfig, name: str | None = None) -> Family:
    """The family of a checkpoint's config.

    Raises:
        ValueError: `name` is not a family, or the config's `model_type` belongs to none.
    """
    if name is not None:
        if name not in FAMILIES:
            raise ValueError(f"family={name!r}: expected one of {', '.join(FAMILIES)}")
        return FAMILIES[name]
    model_type = raw.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ", ".join(t for f in FAMILIES.values() for t in f.model_types)
    raise ValueError(
        f"config.json has model_type={model_type!r}: expected one of {known}, or name the family "
        f"(family={' | '.join(map(repr, FAMILIES))}) for a checkpoint tuned from one of them"
    )


def check_supported(raw: RawConfig, family: Family) -> None:
    """Refuse a config whose result would differ from what is computed here.

    Raises:
        ValueError: names the field, its value and the supported value.
    """
    for name, accepted in family.allowed.items():
        value = raw.get(name)
        if not any(value is a or (type(value) is type(a) and value == a) for a in accepted):
            raise ValueError(
                f"config.json has {name}={value!r}, not supported for {family.name}: "
                f"expected {accepted[0]!r}"
            )
