"""The forward of a step by calling the model's own modules, for models that are wrapped.

`engine.forward` takes a decoder apart: it runs the parts of a layer as fused ops, and the last of
them for some tokens only. What is wrapped around a module (a hook, another `forward`, a subclass)
could be lost there, or be given too few tokens. A model that has such a module runs here instead:
the model itself is called with the window's tokens and a cache in transformers' format, so that
every module of it is called as transformers calls it. That is slower: it runs no kernel of ours but
the one that writes K and V.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from dsb_kernels.place import Layout
from dsb_kernels.rope_kv import rope_write_kv
from dsb_runtime.engine.cache import KVCache
from dsb_runtime.engine.draft_windows import DraftWindows, beside, no_rotation
from dsb_runtime.engine.forward import Phase, no_phase
from dsb_runtime.engine.layers import KNOWN, fingerprint, wrapping
from dsb_runtime.engine.parallel import (
    any_process_decodes,
    is_fully_sharded,
    is_tensor_parallel,
)
from dsb_runtime.engine.sparse import Context

# Packages whose modules compute each token by itself, as a linear layer does.
TOKEN_BY_TOKEN = ("peft.", "bitsandbytes.")


def wrapped_module(model: Any) -> str | None:
    """The name of the first module whose wrapping `engine.forward` might lose, and what is wrapped
    around it; None if there is none.

    `engine.forward` runs a layer's parts by themselves, and the last layer and the LM head for some
    tokens only. So it keeps the hooks of tensor parallelism, and the classes of `TOKEN_BY_TOKEN`.
    """
    inner = r"layers\.\d+|layers\.\d+\.self_attn|rotary_emb"
    containers = re.compile(rf"(model(\.({inner}))?)?")
    for name, module in model.named_modules():
        what = wrapping(module, KNOWN + TOKEN_BY_TOKEN)
        if what is None:
            continue
        if not is_tensor_parallel(model) or containers.fullmatch(name):
            return f"{name or 'model'} {what}"
    return None


class WindowCache(Cache):
    """The K/V cache of a step as transformers' modules see it.

    `update` writes the window's keys and values, and returns those of every position.
    """

    def __init__(
        self,
        cache: KVCache,
        layout: Layout,
        rows: Tensor | None,
        position: Tensor | None,
        drafts: DraftWindows | None,
    ) -> None:
        super().__init__(layers=[])
        self.cache, self.layout, self.rows = cache, layout, rows
        self.position, self.drafts = position, drafts
        self.no_rotation = no_rotation(cache.keys[0])  # transformers has rotated the keys already

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write K and V (b, H_kv, W, D) of one layer; return those of all its L positions, in the
        dtype and on the device of the layer. Rows of drafts follow the b rows."""
        b = len(self.layout.start)
        key_states, own_keys = key_states[:b], key_states[b:]
        value_states, own_values = value_states[:b], value_states[b:]
        keys, values, layout = self.cache.keys[layer_idx], self.cache.values[layer_idx], self.layout
        if self.rows is None:
            keys, values = keys[: len(layout.start)], values[: len(layout.start)]
        k, v = key_states.to(keys), value_states.to(values)
        rope_write_kv(
            k, k, v, self.no_rotation, keys, values, window_start=layout.start,
            window_length=layout.length, cache_batch_idx=self.rows, position=self.position,
        )  # fmt: skip
        if self.rows is not None:
            keys, values = keys.index_select(0, self.rows), values.index_select(0, self.rows)
        if self.drafts is not None:
            seen = self.drafts.positions(layer_idx, own_keys, own_values)
            keys, values = (torch.cat(pair) for pair in zip((keys, values), seen, strict=True))
        return keys.to(key_states), values.to(value_states)


class CalledModel:
    """A model that is called as a whole. It takes the place of a `Backbone`; its results are
    logits."""

    lm_head = None
    max_length = sys.maxsize
    replayable = False  # a replay of a captured step would call no hook

    def __init__(self, model: PreTrainedModel, phase: Phase = no_phase) -> None:
        self.model, self.phase, self.fingerprint = model, phase, fingerprint(model)
        self.fully_sharded = is_fully_sharded(model)
        # transformers 5.24 renames this argument. A subclass may have hidden its name.
        forwards = [vars(c)["forward"] for c in type(model.model).__mro__ if "forward" in vars(c)]
        named = any("cache" in inspect.signature(forward).parameters for forward in forwards)
        self.cache_argument = "cache" if named else "past_key_values"

    def __call__(
        self,
        layout: Layout,
        cache: KVCache,
        *,
        full: bool,
        padded: bool,
        context: Context | None = None,
        drafts: DraftWindows | None = None,
    ) -> Tensor:
        """The logits (b * k + d * k, V) of the tokens that predict the candidates. The arguments
        are those of a `Backbone`."""
        b, width = layout.input_ids.shape
        rows = layout.rows if b < cache.batch and not cache.scratch else None
        packed = None if context is None else context.position
        window_cache = WindowCache(cache, layout, rows, packed, drafts)
        if drafts is not None:
            layout = beside(layout, drafts.layout)
            b = len(layout.start)
        length = cache.keys[0].shape[2]
        column = torch.arange(width, device=layout.start.device)
        index = layout.start[:, None] + column
        stored = torch.arange(length, device=layout.start.device) >= layout.leftpad[:, None]
        if context is not None:
            stored = context.visible
            index = index if packed is None else packed
        position = index - layout.leftpad[:, None]
        inputs = {
            "input_ids": layout.input_ids,
            "position_ids": position.clamp(0, length - 1).long(),
            "attention_mask": stored[:, None, None],  # (b, 1, 1, L)
            self.cache_argument: window_cache,
            "use_cache": True,
        }
        if self.fully_sharded:
            any_process_decodes(True, layout.start.device)
        with self.phase("model"):
            # With one row, a plain head computes no other logits than these.
            if b == 1 and wrapping(self.model.lm_head) is None:
                return self.model(**inputs, logits_to_keep=layout.source_index)[0][0]
            return self.model(**inputs)[0].flatten(0, 1).index_select(0, layout.source_index)

    def join_others(self) -> None:
        """Take part in the forwards of the processes that still decode, which gather the weights
        from every process. Does nothing where FSDP2 does not shard the model."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        while self.fully_sharded and any_process_decodes(False, token.device):
            self.model(token, use_cache=False)
