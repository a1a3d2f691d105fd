"""The forward under the step: a decoder's layers over windows of rows, the last only where it is
read.

Every row's keys and values are needed in every layer, but what follows them in the last layer
(attention, MLP, final norm) is needed for the rows to be scored alone: at a refresh that is
`block_length` rows out of the whole canvas.

Where the kernels run, a layer's rotary embedding and cache write are one launch and a window's
attention reads the cache as it is. b = sequences, W = rows of each, N = b * W, E = hidden size,
H = query heads, D = head dim, L = canvas length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsb_kernels import rope_kv
from dsb_kernels.dispatch import use_triton
from dsb_kernels.window_attention import window_attention
from dsb_runtime.attention import dsb_attention
from dsb_runtime.cache import Place, WindowCache, WindowLayer
from dsb_runtime.layers import fingerprint, layers_of, norm_of, project

Phase = Callable[[str], AbstractContextManager[None]]


def no_phase(name: str) -> AbstractContextManager[None]:
    """Phases are named where a profiler listens, and cost nothing elsewhere."""
    return contextlib.nullcontext()


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (b, K) of x (b, W, E): (b, K, E)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))


class Backbone:
    """The layers of one model for canvases of up to `length` positions.

    Args:
        model: a decoder of Llama's modules.
        length: positions that the rotary table covers.
        phase: `phase(name)` is entered around each phase of a forward.
    """

    def __init__(self, model: PreTrainedModel, length: int, phase: Phase = no_phase) -> None:
        self.embed, self.phase = model.model.embed_tokens, phase
        self.layers = layers_of(model.model)
        self.norm = norm_of(model.model.norm)
        self.cos_sin = self.rotary_table(model, length)
        self.fingerprint = fingerprint(model)

    @staticmethod
    def rotary_table(model: PreTrainedModel, length: int) -> Tensor:
        """(length, D) float32: cosines and sines of every position, half a head each."""
        device = model.get_input_embeddings().weight.device
        index = torch.arange(length, device=device)[None]
        cos, sin = model.model.rotary_emb(index.float(), position_ids=index)
        half = cos.shape[-1] // 2
        return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)

    def __call__(
        self,
        input_ids: Tensor,
        place: Place,
        keep: Tensor,
        mask: Tensor | None,
        cache: WindowCache | None,
    ) -> Tensor:
        """Final hidden states of rows `keep`.

        Args:
            input_ids: (b, W) tokens.
            place: where they stand in the canvas.
            keep: (b, K) int64, rows of the window to return.
            mask: (b, 1, 1, L) bool, True at keys that exist; None where all do.
            cache: written at the place; None: keys are those of the window itself.

        Returns:
            (b, K, E), after the final norm.
        """
        with self.phase("embed"):
            hidden = self.embed(input_ids).flatten(0, 1)
            rotary = None if use_triton(hidden) and cache is not None else self.angles(place)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            with self.phase(f"layer {i}: norm"):
                x = layer.input_norm(hidden)
            with self.phase(f"layer {i}: qkv"):
                q, k, v = layer.qkv(x, place.width)
            stored = None if cache is None else cache.layers[i]
            with self.phase(f"layer {i}: rope+write"):
                if rotary is None:
                    q, k, v = rope_write(q, k, v, place, stored, self.cos_sin, place.leftpad)
                else:
                    q, k = (rope_kv.rotate(x, *rotary, is_neox=True) for x in (q, k))
                    k, v = (k, v) if stored is None else stored.update(k, v)
            if i == last:
                q = q.gather(2, keep[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
                hidden = take_rows(hidden.unflatten(0, input_ids.shape), keep).flatten(0, 1)
            with self.phase(f"layer {i}: attention"):
                out = attend(layer.attn, q, k, v, place, mask, kept=i == last)
                out = out.reshape(len(hidden), -1)
            with self.phase(f"layer {i}: out"):
                hidden = layer.finish(hidden, out)
            with self.phase(f"layer {i}: mlp"):
                hidden = layer.mlp(hidden)
        with self.phase("final norm"):
            return self.norm(hidden).unflatten(0, keep.shape)

    def angles(self, place: Place) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the place's rows, (b, 1, W, D / 2) each."""
        position = place.index()
        if place.leftpad is not None:
            position = (position - place.leftpad[:, None]).clamp(min=0)
        return self.cos_sin[position][:, None].chunk(2, -1)


def rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Place,
    stored: WindowLayer,
    cos_sin: Tensor,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding and cache write in one launch.

    Args:
        q, k, v: (b, H or H_kv, W, D).
        cos_sin: (positions, D), cosines, then sines; row j of sequence i is rotated by row
            `place.start[i] + j - offset[i]` of it.

    Returns:
        Rotated queries, and the keys and values to attend to: the cache's buffers, which
        `window_attention` reads in place, or at a refresh what they hold, (b, H_kv, L, D).
    """
    if not stored.is_initialized:
        stored.lazy_initialization(k, v)
    keys, values = stored.keys, stored.values
    if place.rows is None and len(keys) > len(q):
        keys, values = keys[: len(q)], values[: len(q)]
    q = rope_kv.rope_write_kv(
        q, k, v, cos_sin, keys, values, window_start=place.start, window_length=place.length,
        position_offset=offset, cache_batch_idx=place.rows,
    )  # fmt: skip
    if place.full:  # dense: SDPA and flash-attn have the best kernels for it
        return q, stored.stored(stored.keys), stored.stored(stored.values)
    return q, keys, values


def attend(
    attn: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Place,
    mask: Tensor | None,
    kept: bool = False,
) -> Tensor:
    """q (b, H, W, D) over what `rope_write` returned: (b, W, H, D). `kept`: q are only some rows
    of the window."""
    if place.full or not use_triton(q, k, v):
        return dsb_attention(attn, q, k, v, mask, scaling=attn.scaling, is_causal=False)[0]
    start, length = place.start, place.length
    if kept:
        # Scattered rows: the window, which is written, may stand anywhere among what is stored.
        start = torch.zeros_like(start) if place.leftpad is None else place.leftpad
        length = (length > 0).int() * q.shape[2]
    out = window_attention(
        q, None, None, k, v, window_start=start, window_length=length,
        cache_seqlens=place.seqlens, cache_leftpad=place.leftpad, cache_batch_idx=place.rows,
        softmax_scale=attn.scaling,
    )  # fmt: skip
    return out.transpose(1, 2)


def patched_attention(
    attn: nn.Module,
    original: Callable[..., tuple[Tensor, Tensor | None]],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention module's forward that takes a window forward through the kernels.

    For a `WindowCache` on a GPU, with rows at the same positions in every sequence: rotary
    embedding and cache write in one launch, attention over the cache in place. Anything else is
    `original`'s.

    Args:
        hidden_states: (b, W, E).
        position_embeddings: cosines and sines, (1 or b, W, D) each.
        attention_mask: None where every stored position is attended to.
    """
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    cos, sin = position_embeddings
    fused = isinstance(cache, WindowCache) and attention_mask is None and len(cos) == 1
    if not fused or hidden_states.requires_grad or not use_triton(hidden_states):
        return original(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
    place, half = cache.target.place, cos.shape[-1] // 2
    table = torch.cat([cos[0, :, :half], sin[0, :, :half]], -1)  # row j is the window's row j
    q, k, v = project(attn, hidden_states.flatten(0, 1), place.width)
    stored = cache.layers[attn.layer_idx]
    out = attend(attn, *rope_write(q, k, v, place, stored, table, place.start), place, None)
    return attn.o_proj(out.flatten(2)), None
