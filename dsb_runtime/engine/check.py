"""Checks of what is given to `generate`, made before any compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsb_runtime.config import DecodingConfig
from dsb_runtime.families import DiffusionInfo


def check_prompt(model: Any, input_ids: Any, info: DiffusionInfo, config: DecodingConfig) -> None:
    """(B, P) integer ids on the model's device, inside the vocabulary, at least one each."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids={type(input_ids).__name__}: expected an integer tensor (B, P)")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids has dtype {input_ids.dtype}: expected torch.int64 or int32")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected (B, P)")
    if input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}: an empty prompt; "
            "expected at least one row and one token"
        )
    device = model.get_input_embeddings().weight.device
    if input_ids.device != device:
        raise ValueError(f"input_ids is on {input_ids.device}: expected the model's {device}")
    vocab = model.config.vocab_size
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab:
        bad = low if low < 0 else high
        raise ValueError(f"input_ids holds {bad}: expected ids from 0 to {vocab - 1}")
    room = model.config.max_position_embeddings
    length = input_ids.shape[1] + config.gen_length
    if length > room:
        raise ValueError(
            f"gen_length={config.gen_length} after a prompt of {input_ids.shape[1]} needs {length} "
            f"positions: expected at most the model's {room}"
        )


def check_attention_mask(input_ids: Tensor, attention_mask: Any) -> Tensor:
    """(B,) int32, padding before each row's prompt; 0 everywhere without a mask."""
    rows, length = input_ids.shape
    if attention_mask is None:
        return torch.zeros(rows, dtype=torch.int32, device=input_ids.device)
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask={type(attention_mask).__name__}: expected a tensor {(rows, length)}"
        )
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(
            f"attention_mask has dtype {attention_mask.dtype}: expected integers or torch.bool"
        )
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: expected that of input_ids, "
            f"{(rows, length)}"
        )
    if attention_mask.device != input_ids.device:
        raise ValueError(
            f"attention_mask is on {attention_mask.device}: expected {input_ids.device}"
        )
    mask = attention_mask.long()
    if not torch.isin(mask, torch.tensor([0, 1], device=mask.device)).all():
        raise ValueError("attention_mask: expected 0 (padding) and 1 (prompt) only")
    if (mask.diff(dim=1) < 0).any():
        raise ValueError("attention_mask: expected left padding (zeros, then ones) in every row")
    if (mask[:, -1] == 0).any():
        row = int((mask[:, -1] == 0).nonzero()[0])
        raise ValueError(f"attention_mask: row {row} is all padding; expected at least one token")
    return (length - mask.sum(-1)).int()


def check_no_masks(input_ids: Tensor, leftpad: Tensor, info: DiffusionInfo) -> None:
    """A mask token inside a prompt would never be filled."""
    inside = torch.arange(input_ids.shape[1], device=input_ids.device) >= leftpad[:, None]
    hit = (input_ids == info.mask_id) & inside
    if hit.any():
        row, column = (int(i) for i in hit.nonzero()[0])
        raise ValueError(
            f"input_ids[{row}, {column}]={info.mask_id}: the mask id inside a prompt; "
            "expected prompt tokens only"
        )


def check_family_settings(info: DiffusionInfo, config: DecodingConfig) -> None:
    """Settings that one family cannot take."""
    if not isinstance(config, DecodingConfig):
        raise TypeError(f"config={config!r}: expected a DecodingConfig")
    family = info.family
    if family.shift and config.cache == "dsb" and config.prefix_window == 0:
        raise ValueError(
            f"prefix_window=0: {family.name} predicts a token from the row before it, so window "
            "steps need that row; expected at least 1"
        )
    if not family.nucleus:
        for name in ("top_p", "top_k"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name}={getattr(config, name)!r}: {family.name} samples by Gumbel noise at "
                    "a temperature; expected None"
                )
    if config.stop_at_eos and not info.eos_ids:
        raise ValueError("stop_at_eos=True: the model names no EOS id; load it with eos_ids=(...)")


def check_generator(generator: Any, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator={type(generator).__name__}: expected a torch.Generator")
    if generator.device.type != device.type:
        raise ValueError(f"generator is on {generator.device}: expected the model's {device}")
