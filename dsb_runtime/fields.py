"""Fields of a published config.json, each read with its type and its range.

A value that is none of these ends in a ValueError of one line that names the field, its value and
what is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from dsb_runtime.config import MAX_INT

RawConfig = Mapping[str, Any]
MAX_LAYERS = 10_000
LONGEST = 120  # how many characters of a value a message shows


def shown(value: Any) -> str:
    """`repr` of a value that a stranger wrote, cut to one line of readable length."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} of more levels than Python can print"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def wrong(name: str, value: Any, accepted: str) -> ValueError:
    """The error for a field whose value is not accepted."""
    return ValueError(f"config.json has {name}={shown(value)}: expected {accepted}")


def real(name: str, value: Any) -> float:
    """Return `value` as a float. Raise ValueError unless it is a finite positive number."""
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not 0 < number < math.inf:
        raise wrong(name, value, "a finite number above 0")
    return number


def flag(raw: RawConfig, name: str) -> bool:
    """Return a bool field, which is false where it is absent."""
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def field_name(raw: RawConfig, *names: str) -> str:
    """Return the first of `names` that the config has. Raise ValueError if it has none."""
    name = next((name for name in names if name in raw), None)
    if name is None:
        raise ValueError(f"config.json has no {' or '.join(names)}: expected an int above 0")
    return name


def size(raw: RawConfig, *names: str, most: int = MAX_INT) -> int:
    """Return the value of the first of `names` that the config has. Raise ValueError unless it is
    an int from 1 to `most`."""
    name = field_name(raw, *names)
    value = raw[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise wrong(name, value, "an int above 0")
    if value > most:
        raise wrong(name, value, f"an int up to {most}")
    return value


def layers(raw: RawConfig, *names: str) -> int:
    """Return the number of layers. It is bounded before the weights are seen, since transformers'
    configs list the kind of every layer."""
    return size(raw, *names, most=MAX_LAYERS)


def head_sizes(raw: RawConfig, hidden: int) -> dict[str, Any]:
    """Return the numbers of query heads and KV heads, and the dimension of a head.

    Raises:
        ValueError: the heads don't divide the hidden size, the KV heads don't divide the heads, or
            RoPE cannot rotate a head.
    """
    name = field_name(raw, "num_attention_heads", "n_heads")
    heads = size(raw, name)
    if hidden % heads:
        raise wrong(name, heads, f"a divisor of the hidden size, {hidden}")
    dim = size(raw, "head_dim") if "head_dim" in raw else hidden // heads
    if dim % 2:
        what = f"head_dim={dim}" if "head_dim" in raw else f"{name}={heads}, heads of {dim}"
        raise ValueError(f"config.json has {what}: RoPE rotates pairs; expected an even head_dim")
    groups = next((n for n in ("num_key_value_heads", "n_kv_heads") if n in raw), None)
    kv_heads = size(raw, groups) if groups else heads
    if heads % kv_heads:
        raise wrong(str(groups), kv_heads, f"a divisor of {name}={heads}")
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}


def special_id(name: str, value: Any, vocab_size: int, hint: str = "") -> int:
    """`value` where it is a token id; ValueError names the argument or field otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={shown(value)}: expected a token id, 0 to {vocab_size - 1}{hint}")
    if not 0 <= value < vocab_size:
        raise ValueError(
            f"{name}={shown(value)}: outside the vocabulary, expected 0 to {vocab_size - 1}"
        )
    return value


def listed_ids(name: str, value: Any, vocab_size: int) -> list[int]:
    """The token ids of a field that has one, a list of them, or null."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < vocab_size:
            raise ValueError(
                f"{name}={shown(value)}: expected a token id, 0 to {vocab_size - 1}, or a list of "
                "them"
            )
    return ids


def check_shared(raw: RawConfig, vocab_size: int) -> None:
    """Check the fields that say nothing of the network: special ids, and the stored dtype."""
    if (mask := raw.get("mask_token_id")) is not None:
        special_id("config.json has mask_token_id", mask, vocab_size)
    listed_ids("config.json has eos_token_id", raw.get("eos_token_id"), vocab_size)
    for name in ("bos_token_id", "pad_token_id"):  # published ones stand outside the vocabulary
        value = raw.get(name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and -MAX_INT <= value <= MAX_INT):
            raise wrong(name, value, "a token id")
    for name in ("dtype", "torch_dtype"):
        value = raw.get(name)
        dtype = getattr(torch, value, None) if isinstance(value, str) else None
        floats = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if value is not None and not floats:
            raise wrong(name, value, "the name of a torch dtype, such as 'bfloat16'")
