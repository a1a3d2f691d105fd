"""Models to measure: real shapes, random weights.

A step's time depends on shapes alone. A random model is never sure of a token, so what depends on
confidence is set from outside: see `decode.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from dsb_runtime.families import DREAM, LLADA, DiffusionInfo, Family

POSITIONS = 32768  # that a model has


@dataclass(frozen=True)
class Preset:
    """Shape of a model. `family` decides the rest: Dream's network is Qwen2, with biases on Q, K
    and V."""

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    mask_id: int
    rope_theta: float
    tied: bool = False  # the LM head is the embedding


PRESETS = {
    "llada-8b": Preset(LLADA, 32, 4096, 32, 32, 128, 12288, 126464, 126336, 5e5),
    # The architecture table of the iLLaDA-8B-Base model card (arXiv 2606.25331): 7.62 B parameters.
    # It gives no rotary base; LLaDA's stands in, which changes no cost.
    "illada-8b": Preset(LLADA, 32, 4096, 32, 8, 128, 14336, 155136, 5, 5e5, tied=True),
    "dream-7b": Preset(DREAM, 28, 3584, 28, 4, 128, 18944, 152064, 151666, 1e6),
    "120m": Preset(LLADA, 12, 768, 12, 12, 64, 2048, 32000, 31999, 5e5),
    "60m": Preset(LLADA, 8, 512, 8, 8, 64, 1536, 32000, 31999, 5e5),
    "tiny": Preset(LLADA, 2, 64, 4, 4, 16, 160, 512, 511, 5e5),
    "tiny-dream": Preset(DREAM, 2, 112, 7, 1, 16, 160, 512, 500, 1e6),
}


def config_of(preset: Preset) -> PretrainedConfig:
    """The transformers config of a preset; attention is bidirectional and "dsb"."""
    kind = Qwen2Config if preset.family is DREAM else LlamaConfig
    config = kind(
        vocab_size=preset.vocab,
        hidden_size=preset.hidden,
        intermediate_size=preset.mlp,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        head_dim=preset.head_dim,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": preset.rope_theta},
        tie_word_embeddings=preset.tied,
        attn_implementation="dsb",
    )
    config.is_causal = False
    return config


@torch.no_grad()
def random_model(
    preset: Preset, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> PreTrainedModel:
    """A bidirectional model with random weights, built on the device in `dtype`: an 8B model in
    bfloat16 never takes more than its 16 GB."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(preset), dtype=dtype).eval()
    # Weights of unit gain: with the usual small ones every mask looks alike and all of a window
    # commits at once, or nothing does.
    for name, weight in model.model.named_parameters():
        if weight.ndim == 2:
            weight.normal_(0, weight.shape[1] ** -0.5)
        elif name.endswith(".bias"):
            weight.normal_(0, 0.1)
    model.dsb = DiffusionInfo(preset.family, preset.mask_id, ())
    return model


def random_prompt(preset: Preset, batch: int, length: int, seed: int = 0) -> Tensor:
    """(B, P) int64 on the CPU, without the mask token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, preset.vocab - 1, (batch, length), generator=generator)
    return ids + (ids >= preset.mask_id)


def check_device(device: str) -> None:
    """ValueError where `--device` names what is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here; expected cpu")


def check_tokens(tokens_per_forward: float, block: int) -> None:
    """ValueError where a step would have to commit more than a block."""
    if tokens_per_forward > block:
        raise ValueError(
            f"--tokens-per-forward {tokens_per_forward:g}: expected at most --block, {block}"
        )


def check_prompt_length(prompt: int, gen: int) -> None:
    """ValueError where a model has no room for prompt and response."""
    if prompt + gen > POSITIONS:
        raise ValueError(
            f"--prompt {prompt}: expected at most {POSITIONS - gen} before {gen} response positions"
        )
