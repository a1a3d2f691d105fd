"""Checks of the arguments of `generate` and `infill`, which run before the model does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsb_runtime.config import DecodingConfig, check_int
from dsb_runtime.defaults import defaults_for
from dsb_runtime.families import DiffusionInfo, check_model, device_of


def config_of(
    model: PreTrainedModel, config: DecodingConfig | None, settings: dict[str, Any]
) -> DecodingConfig:
    """Return the config, or one made of the named settings and the model's defaults.

    Raises:
        TypeError: both a config and settings are given.
    """
    check_config(config, settings)
    return defaults_for(model, **settings) if config is None else config


def check_config(config: DecodingConfig | None, settings: dict[str, Any]) -> None:
    """Raise TypeError if both a config and settings are given, or something else as a config."""
    if not isinstance(config, DecodingConfig | None):
        raise TypeError(f"config={config!r}: expected a DecodingConfig")
    if config is not None and settings:
        raise TypeError(f"config and {sorted(settings)[0]}: expected settings in one of the two")


def check_inputs(
    model: Any, config: Any, input_ids: Any, attention_mask: Any, generator: Any
) -> Tensor:
    """Check all arguments of `generate`. Returns how many padding positions stand before each row's
    prompt, (B,) int32.

    Raises:
        TypeError, ValueError: the message names the argument, its value and what is accepted.
    """
    info = check_model(model)
    check_family_settings(info, config)
    check_tokens(info, config, model.config.vocab_size)
    check_prompt(model, input_ids, config.gen_length)
    leftpad = check_attention_mask(input_ids, attention_mask)
    check_no_masks(input_ids, leftpad, info)
    check_generator(generator, input_ids.device)
    return leftpad


def check_masks(model: Any, input_ids: Any, attention_mask: Any) -> tuple[Tensor, list[int]]:
    """Check the masks that `infill` is to fill. Returns how many padding positions stand before
    each row, (B,) int32, and how many positions each row's response has, from its first mask to its
    last.

    Raises:
        TypeError, ValueError: the message names the argument, its value and what is accepted.
    """
    check_prompt(model, input_ids, 0)
    leftpad = check_attention_mask(input_ids, attention_mask)
    index = torch.arange(input_ids.shape[1], device=input_ids.device)
    mask_id = check_model(model).mask_id
    masked = (input_ids == mask_id) & (index >= leftpad[:, None])
    missing = masked.any(-1).logical_not().nonzero()
    if len(missing):
        raise ValueError(
            f"input_ids: row {int(missing[0])} has no mask id {mask_id}; expected one at least"
        )
    first = torch.where(masked, index, len(index)).amin(-1)
    return leftpad, (torch.where(masked, index, -1).amax(-1) + 1 - first).tolist()


def check_infill(model: Any, config: DecodingConfig, lengths: list[int], generator: Any) -> None:
    """Check the settings of `infill` for responses of these lengths.

    Raises:
        TypeError, ValueError: the message names the argument, its value and what is accepted.
    """
    check_family_settings(check_model(model), config)
    check_tokens(check_model(model), config, model.config.vocab_size)
    blocks = sorted({-(-length // config.block_length) for length in lengths})
    if config.schedule == "naive" and config.rule == "quota" and len(blocks) > 1:
        raise ValueError(
            f"steps={config.steps}: schedule='naive' spreads steps evenly over a row's blocks, and "
            f"there are rows of {blocks[0]} and of {blocks[-1]}; expected one row at a time"
        )
    check_generator(generator, device_of(model))


def check_prompt(model: Any, input_ids: Any, gen_length: int) -> None:
    """Check that prompts are (B, P) integers of the vocabulary on the model's device, that they are
    not empty, and that the model has enough positions for them and `gen_length` more."""
    if not isinstance(input_ids, Tensor):
        hint = ""
        if isinstance(input_ids, Mapping):
            hint = ", which is inputs['input_ids']; attention_mask is an argument of its own"
        elif isinstance(input_ids, list):
            hint = ", as torch.tensor([ids])"
        raise TypeError(
            f"input_ids={type(input_ids).__name__}: expected an integer tensor (B, P){hint}"
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids has dtype {input_ids.dtype}: expected torch.int64 or int32")
    if input_ids.ndim != 2:
        hint = ", as input_ids[None]" if input_ids.ndim == 1 else ""
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected (B, P){hint}")
    if 0 in input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}: an empty prompt; "
            "expected at least one row and one token"
        )
    device = device_of(model)
    if input_ids.device != device:
        raise ValueError(f"input_ids is on {input_ids.device}: expected the model's {device}")
    check_prompt_ids(model, input_ids, gen_length)


def check_prompt_ids(model: Any, input_ids: Tensor, gen_length: int) -> None:
    """Check that the ids (B, P) are of the vocabulary, and that the model has enough positions for
    them and `gen_length` more."""
    vocab = model.config.vocab_size
    for extreme in (int(input_ids.min()), int(input_ids.max())):
        if not 0 <= extreme < vocab:
            raise ValueError(f"input_ids holds {extreme}: expected ids from 0 to {vocab - 1}")
    check_positions(model, input_ids.shape[1], gen_length)


def check_positions(model: Any, prompt_length: int, gen_length: int) -> None:
    """Check that the model has enough positions for a prompt and `gen_length` more."""
    limit = model.config.max_position_embeddings
    length = prompt_length + gen_length
    if length > limit:
        prompt = f"gen_length={gen_length} after a prompt of {prompt_length} needs"
        raise ValueError(
            f"{prompt if gen_length else 'input_ids has'} {length} positions: expected at most the "
            f"model's {limit}"
        )


def check_attention_mask(input_ids: Tensor, attention_mask: Any) -> Tensor:
    """Check the attention mask. Returns how many padding positions stand before each row's prompt,
    (B,) int32, which are 0 if the attention mask is None."""
    shape = tuple(input_ids.shape)
    if attention_mask is None:
        return torch.zeros(len(input_ids), dtype=torch.int32, device=input_ids.device)
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask={type(attention_mask).__name__}: expected a tensor {shape}"
        )
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(
            f"attention_mask has dtype {attention_mask.dtype}: expected integers or torch.bool"
        )
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: expected that of input_ids, "
            f"{shape}"
        )
    if attention_mask.device != input_ids.device:
        raise ValueError(
            f"attention_mask is on {attention_mask.device}: expected {input_ids.device}"
        )
    mask = attention_mask.long()
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask: expected 0 (padding) and 1 (prompt) only")
    if (mask.diff(dim=1) < 0).any():
        raise ValueError("attention_mask: expected left padding (zeros, then ones) in every row")
    if (mask[:, -1] == 0).any():
        row = int((mask[:, -1] == 0).nonzero()[0])
        raise ValueError(f"attention_mask: row {row} is all padding; expected at least one token")
    return (shape[1] - mask.sum(-1)).int()


def check_no_masks(input_ids: Tensor, leftpad: Tensor, info: DiffusionInfo) -> None:
    """Check that no prompt has a mask token: no step would ever commit a token there."""
    inside = torch.arange(input_ids.shape[1], device=input_ids.device) >= leftpad[:, None]
    hit = (input_ids == info.mask_id) & inside
    if hit.any():
        row, column = (int(i) for i in hit.nonzero()[0])
        raise ValueError(
            f"input_ids[{row}, {column}]={info.mask_id}: the mask id inside a prompt; "
            "expected prompt tokens only (dsb_runtime.infill fills masks anywhere)"
        )


def check_side_by_side(config: DecodingConfig) -> None:
    """Check the settings of a request that is decoded beside others."""
    if config.drafts:
        raise ValueError(
            f"drafts={config.drafts}: a draft costs as much as the row of another request; "
            "expected 0 where requests are decoded side by side"
        )


def check_family_settings(info: DiffusionInfo, config: DecodingConfig) -> None:
    """Check that the model's family accepts these settings."""
    family = info.family
    if family.shift and config.cache == "dsb" and config.prefix_window == 0:
        raise ValueError(
            f"prefix_window=0: {family.name} predicts a token from the position before it, "
            "so window steps need that position; expected at least 1"
        )
    if not family.nucleus:
        for name, value in (("top_p", config.top_p), ("top_k", config.top_k)):
            if value is not None:
                raise ValueError(
                    f"{name}={value!r}: {family.name} samples by Gumbel noise at "
                    "a temperature; expected None"
                )
    if config.stop_at_eos and not info.eos_ids:
        raise ValueError("stop_at_eos=True: the model names no EOS id; load it with eos_ids=(...)")


def check_tokens(info: DiffusionInfo, config: DecodingConfig, vocab: int) -> None:
    """Check the settings that forbid tokens, which must leave one at every position."""
    for token in config.banned_tokens:
        if token >= vocab:
            raise ValueError(f"banned_tokens has {token}: expected ids from 0 to {vocab - 1}")
        if token == info.mask_id:
            raise ValueError(
                f"banned_tokens has the mask id {token}, which is never proposed; expected other "
                "ids"
            )
    if config.min_new_tokens and not info.eos_ids:
        raise ValueError(
            f"min_new_tokens={config.min_new_tokens}: the model names no EOS id; load it with "
            "eos_ids=(...)"
        )
    ends = info.eos_ids if config.min_new_tokens else ()
    if len({*config.banned_tokens, *ends, info.mask_id}) == vocab:
        raise ValueError(
            f"banned_tokens has {len(config.banned_tokens)} ids of {vocab}: no token is left to "
            "propose; expected fewer"
        )


def check_samples(num_return_sequences: Any, config: DecodingConfig) -> None:
    """Check how many samples of each row are wanted."""
    check_int("num_return_sequences", num_return_sequences, 1)
    if num_return_sequences > 1 and not config.draws:
        raise ValueError(
            f"num_return_sequences={num_return_sequences}: all of them are the same at "
            "temperature=0; expected a temperature above 0, or an order that is drawn"
        )


def check_generator(generator: Any, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator={type(generator).__name__}: expected a torch.Generator")
    if generator.device.type != device.type:
        raise ValueError(f"generator is on {generator.device}: expected the model's {device}")
