"""The defaults that depend on the model and the length: one answer for every door.

`dsb_runtime.generate`, `Engine.generate`, `model.dsb_generate`, the `dsb` command,
`custom_generate` and the harness's model take their settings from `defaults_for`, so that the same
prompt has the same schedule and the same stop by each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from dsb_runtime.config import DecodingConfig, check_int, check_names, settings
from dsb_runtime.families import check_model

LARGEST_BLOCK = 32  # published for responses of 128 positions and more


def defaults_for(
    model: PreTrainedModel | None, gen_length: int | None = None, **named: Any
) -> DecodingConfig:
    """The settings of a call: those that the caller names, and defaults for the others.

    Args:
        model: from `load_model` or `patch`. With None, settings can be checked before a model is
            loaded.
        gen_length: how many response positions. None means `generation_config.max_new_tokens` of
            the model, or 256.
        named: other settings by name. By default `block_length` is a quarter of the response, at
            most 32, and `stop_at_eos` is whether the model has an EOS.

    Raises:
        TypeError, ValueError: no setting has this name, or the value is not accepted.
    """
    check_names(named)
    if gen_length is None:
        own = getattr(model, "generation_config", None)
        gen_length = getattr(own, "max_new_tokens", None) or settings()["gen_length"].default
    check_int("gen_length", gen_length, 1)
    block_length = max(1, min(LARGEST_BLOCK, gen_length // 4))
    defaults: dict[str, Any] = {"block_length": block_length}
    if model is not None:
        defaults["stop_at_eos"] = bool(check_model(model).eos_ids)
    elif named.get("eos_bound"):  # the model will say whether it has an EOS
        defaults["stop_at_eos"] = True
    return DecodingConfig(**{**defaults, **named, "gen_length": gen_length})


def fitted(named: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """Those of some settings, which are for a response of `before` positions, that depend on the
    length, for one of `after`: `steps` commits as many tokens a step, `block_length` and
    `min_new_tokens` are cut to the response."""
    fits = {
        name: min(named[name], after)
        for name in ("block_length", "min_new_tokens")
        if named.get(name) is not None
    }
    if named.get("steps") is not None:
        fits["steps"] = max(1, round(named["steps"] * after / before))
    return fits


def infill_defaults(
    model: PreTrainedModel, longest: int, config: DecodingConfig | None, **named: Any
) -> DecodingConfig:
    """The settings of a call of `infill`, whose longest response has `longest` positions: `config`,
    or the settings that the caller names, and the defaults of `defaults_for` but for `stop_at_eos`,
    which is False.

    A block that is longer than the longest response is cut to it, which changes nothing: the
    response is then one block.

    Raises:
        TypeError, ValueError: `gen_length` is named, which the masks decide; or as `defaults_for`.
    """
    if config is not None:
        block = min(config.block_length, longest)
        return replace(config, gen_length=longest, block_length=block)
    if "gen_length" in named:
        raise TypeError(
            f"gen_length={named['gen_length']!r}: infill fills the masks of input_ids; "
            "expected no gen_length"
        )
    if "block_length" in named:
        check_int("block_length", named["block_length"], 1)
        named["block_length"] = min(named["block_length"], longest)
    return defaults_for(model, longest, **{"stop_at_eos": False, **named})
