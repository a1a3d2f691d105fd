"""The forward under the step: a decoder's layers over windows of rows, the last only where it is
read.

Every row's keys and values are needed in every layer, but what follows them in the last layer
(attention, MLP, final norm) is needed for the rows to be scored alone: at a refresh that is
`block_length` rows out of the whole canvas.

Where the kernels run, a layer's rotary embedding and cache write are one launch and attention reads
the cache as it is: a window's, and a refresh's of prompts that are padded, which need no mask that
way, or of some of the batch's rows, which need no copy. b = sequences, W = rows of each, N = b * W,
k = scored rows of each, E = hidden size, H = query heads, D = head dim, L = canvas length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsb_kernels import rope_kv
from dsb_kernels._op import use_triton
from dsb_kernels.attention import window_attention
from dsb_runtime.engine.attention import dsb_attention
from dsb_runtime.engine.cache import Place, WindowCache, WindowLayer
from dsb_runtime.engine.layers import fingerprint, layers_of, norm_of, project

Phase = Callable[[str], AbstractContextManager[None]]


def no_phase(name: str) -> AbstractContextManager[None]:
    """Phases are named where a profiler listens, and cost nothing elsewhere."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Scored:
    """The rows of a forward to be scored: k of each sequence, anywhere in its window.

    What attends for them are as many stored positions: `window_attention` knows queries that stand
    side by side only, but wherever they stand, they see all that is stored.
    """

    index: Tensor  # (b * k,) int64, of all b * W rows
    start: Tensor  # (b,) int32, the first stored position
    length: Tensor  # (b,) int32, k, or 0 where the sequence takes no part


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
        # What follows each layer: the next one's norm, or the final one.
        self.norms = [layer.input_norm for layer in self.layers[1:]] + [norm_of(model.model.norm)]
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
        scored: Scored,
        cache: WindowCache | None,
    ) -> Tensor:
        """Final hidden states of the rows to be scored.

        Args:
            input_ids: (b, W) tokens.
            place: where they stand in the canvas.
            scored: the rows to return.
            cache: written at the place; None: keys are those of the window itself.

        Returns:
            (b * k, E), after the final norm.
        """
        with self.phase("embed"):
            hidden = self.embed(input_ids).flatten(0, 1)
            kernels = use_triton(hidden)
            rotary = None if kernels and cache is not None else self.angles(place)
            mask = None if kernels or place.leftpad is None else place.mask()
            if cache is None:  # keys are the sequences' own, whatever rows these are
                place = replace(place, rows=None)
        last = len(self.layers) - 1
        x = None  # the norm of hidden, where the layer before has computed it
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            with self.phase(f"layer {i}: norm"):
                x = layer.input_norm(hidden) if x is None else x
            with self.phase(f"layer {i}: qkv"):
                q, k, v = layer.qkv(x, place.width)
            stored = None if cache is None else cache.layers[i]
            with self.phase(f"layer {i}: rope+write"):
                if rotary is None:
                    q, k, v = rope_write(q, k, v, place, stored, self.cos_sin, place.leftpad)
                else:
                    q, k = (rope_kv.rotate(x, *rotary, is_neox=True) for x in (q, k))
                    k, v = (k, v) if stored is None else stored.update(k, v)
            start, length = place.start, place.length
            if i == last:
                start, length = scored.start, scored.length
                q = q.transpose(1, 2).flatten(0, 1).index_select(0, scored.index)
                q = q.unflatten(0, (len(start), -1)).transpose(1, 2)
                hidden = hidden.index_select(0, scored.index)
            with self.phase(f"layer {i}: attention"):
                out = attend(layer.attn, q, k, v, place, mask, start, length)
                out = out.reshape(len(hidden), -1)
            with self.phase(f"layer {i}: out"):
                hidden, x = layer.finish(hidden, out)
            with self.phase(f"layer {i}: mlp"):
                hidden, x = layer.mlp(hidden, x, norm)
        with self.phase("final norm"):
            return norm(hidden) if x is None else x

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
        Rotated queries, and the cache's buffers, which attention reads in place.
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
    return q, keys, values


def attend(
    attn: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Place,
    mask: Tensor | None,
    start: Tensor,
    length: Tensor,
) -> Tensor:
    """Attention of a layer to everything that is stored, padding left out.

    Args:
        q: (b, H, n, D), the window's rows or those to be scored.
        k, v: (b, H_kv, W or L, D), or the cache's buffers.
        mask: (b, 1, 1, L), `place.mask()` where the kernels do not run and there is padding.
        start, length: (b,) int32, where q stands, as `window_attention` wants it.

    Returns:
        (b, n, H, D).
    """
    # Dense attention has better kernels elsewhere, which know neither padding nor rows of a cache.
    dense = place.full and place.leftpad is None and place.rows is None
    if dense or not use_triton(q, k, v):
        if dense:  # a cache's buffers may be longer
            k, v = k[:, :, : place.canvas_length], v[:, :, : place.canvas_length]
        return dsb_attention(attn, q, k, v, mask, scaling=attn.scaling, is_causal=False)[0]
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
    q, k, v = rope_write(q, k, v, place, stored, table, place.start)
    out = attend(attn, q, k, v, place, None, place.start, place.length)
    return attn.o_proj(out.flatten(2)), None
