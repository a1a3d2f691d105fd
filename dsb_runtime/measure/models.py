"""Models to measure, which have published shapes and random weights.

A step's time depends on shapes alone. A random model is never sure of a token, so that a fixed
number of steps has to say how many tokens each step commits.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_kernels.rules import RULES
from dsb_runtime.config import DecodingConfig
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.engine.cache import cache_shape_of, free_bytes
from dsb_runtime.families import DREAM, LLADA, DiffusionInfo, Family, check_model
from dsb_runtime.models.load import pick_device

DTYPES = ("float32", "bfloat16", "float16")
POSITIONS = 32768  # how many positions a model has at most
TOKENS_PER_FORWARD = 3.5  # how many a preset commits where no selection rule is named


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


@torch.no_grad()
def random_model(
    preset: Preset, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> PreTrainedModel:
    """A bidirectional model with random weights. It is built on the device in `dtype`, so that an
    8B model in bfloat16 never takes more than its 16 GB."""
    name = "Qwen2Config" if preset.family is DREAM else "LlamaConfig"
    config = getattr(transformers, name)(
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
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    # The weights have unit gain. With the usual small ones every mask would look alike, and all
    # positions of a window would be committed at once, or none.
    for name, weight in model.model.named_parameters():
        if weight.ndim == 2:
            weight.normal_(0, weight.shape[1] ** -0.5)
        elif name.endswith(".bias"):
            weight.normal_(0, 0.1)
    model.dsb = DiffusionInfo(preset.family, preset.mask_id, ())
    return model


def check_room(model: PreTrainedModel, batch: int, prompt: int, config: DecodingConfig) -> None:
    """Raise ValueError if the model has no positions for prompt and response, or if the canvas and
    its K/V alone take more memory than is free: the operating system would end the process then."""
    gen_length = config.gen_length
    length, most = prompt + gen_length, model.config.max_position_embeddings
    if length > most:
        raise ValueError(
            f"gen_length={gen_length} after a prompt of {prompt} needs {length} positions: "
            f"expected at most the model's {most}"
        )
    shape = cache_shape_of(model)
    if config.cache == "none":  # all layers share one buffer
        shape = replace(shape, layers=1)
    row = length * torch.int64.itemsize + shape.nbytes(1, length)
    free = free_bytes(model.device)
    if free is not None and batch * row > free:
        raise ValueError(
            f"--batch={batch}: {length} positions a row and their K/V take {batch * row:,} bytes, "
            f"and {free:,} are free on {model.device}; expected at most {free // row}"
        )


def random_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    batch: int,
    length: int,
    seed: int,
) -> Tensor:
    """(batch, length) ids on the model's device, drawn from the vocabulary without its special and
    added tokens; without a tokenizer, from the vocabulary without the mask token and EOS ids."""
    info = check_model(model)
    known, special = model.config.vocab_size, {info.mask_id, *info.eos_ids}
    if tokenizer is not None:
        known = min(known, len(tokenizer))
        special |= {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = torch.tensor([i for i in range(known) if i not in special])
    if len(ids) == 0:
        raise ValueError(f"vocabulary of {known}: only special tokens; expected others to draw")
    generator = torch.Generator().manual_seed(seed)
    return ids[torch.randint(len(ids), (batch, length), generator=generator)].to(model.device)


def add_preset(parser: Any) -> None:
    """The options for a model without a checkpoint and for random prompts, which no EOS ends."""
    parser.set_defaults(stop_at_eos=False)
    add = parser.add_argument
    add("--prompt-length", type=int, default=128, help="random tokens a prompt (default: 128)")
    add(
        "--preset", choices=PRESETS,
        help="instead of a checkpoint: random weights at published shapes; without a selection "
        f"rule it commits {TOKENS_PER_FORWARD:g} tokens a step",
    )  # fmt: skip


def load_preset(args: argparse.Namespace) -> PreTrainedModel:
    """The random model that `--preset` names, at `--device` and `--dtype`. Where no rule was named,
    `args.steps` is set so that a step commits TOKENS_PER_FORWARD."""
    if args.model != str(MODEL_DIR):
        raise ValueError("--preset and --model: expected one of the two")
    if args.adapter is not None:
        raise ValueError("--preset and --adapter: expected one of the two")
    device = pick_device(args.device)
    default = "float32" if device.type == "cpu" else "bfloat16"
    name = default if args.dtype == "auto" else args.dtype
    if name not in DTYPES:
        raise ValueError(f"--dtype {name}: expected one of auto, {', '.join(DTYPES)}")
    if all(getattr(args, rule.setting) is None for rule in RULES.values()):
        args.steps = max(1, round((args.gen_length or 256) / TOKENS_PER_FORWARD))
    return random_model(PRESETS[args.preset], getattr(torch, name), device, args.seed or 0)
