"""The forward of a step: a decoder's layers over the windows of some rows.

Every layer needs the keys and values of every token. But in the last layer, attention, MLP and
final norm run only for the tokens that predict a candidate: for a row at a refresh, these are at
most K of the whole canvas.

Each layer is six ops, on every device: norm, window_linear (q, k, v), rope_write_kv,
window_attention, and linear_add_norm and window_linear around the MLP (`engine.layers`).

Shapes: b rows of a step, W tokens of each row, N = b * W, k candidates of each row, E hidden size,
H query heads, D head dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsb_kernels import attention, rope_kv
from dsb_kernels._op import unchecked
from dsb_kernels.place import Layout
from dsb_runtime.engine.attention import dsb_attention
from dsb_runtime.engine.cache import KVCache
from dsb_runtime.engine.draft_windows import DraftWindows, beside
from dsb_runtime.engine.layers import (
    PackedLayer,
    fingerprint,
    is_plain_linear,
    layers_of,
    norm_of,
    wrapping,
)
from dsb_runtime.engine.parallel import is_tensor_parallel
from dsb_runtime.engine.sparse import Context, blocks_seen

rope_write_kv = unchecked(rope_kv.rope_write_kv)
window_attention = unchecked(attention.window_attention)
Phase = Callable[[str], AbstractContextManager[None]]


def no_phase(name: str) -> AbstractContextManager[None]:
    """The phase function for a forward that no profiler follows. It does nothing."""
    return contextlib.nullcontext()


class Backbone:
    """The layers of one model for canvases of up to `length` positions. `engine.called` serves
    models whose modules cannot be taken apart.

    Args:
        model: a decoder whose modules are Llama's.
        length: how many positions the rotary table covers.
        phase: each phase of a forward runs inside the context manager `phase(name)`.
    """

    def __init__(self, model: PreTrainedModel, length: int, phase: Phase = no_phase) -> None:
        self.embed, self.phase, self.max_length = model.model.embed_tokens, phase, length
        self.layers = layers_of(model.model)
        # The norm that follows each layer is the input norm of the next one, or the final norm.
        self.norms = [layer.input_norm for layer in self.layers[1:]] + [norm_of(model.model.norm)]
        self.cos_sin = self.rotary_table(model, length)
        self.lm_head, self.fingerprint = model.lm_head, fingerprint(model)
        # A replay of a captured step calls no module: what a hook or an adapter decides anew in
        # each call would be lost. The modules of tensor parallelism decide nothing.
        called = (model.model.embed_tokens, model.model.norm)
        plain = all(wrapping(m) is None for m in called) and is_plain_linear(model.lm_head)
        packed = all(isinstance(layer, PackedLayer) for layer in self.layers)
        self.replayable = (plain and packed) or is_tensor_parallel(model)

    @staticmethod
    def rotary_table(model: PreTrainedModel, length: int) -> Tensor:
        """The cosines of every position, then its sines, D / 2 of each: (length, D) float32."""
        position = torch.arange(length, device=model.device)[None]
        cos, sin = model.model.rotary_emb(position.float(), position_ids=position)
        half = cos.shape[-1] // 2
        return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)

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
        """The final hidden states of the tokens that predict the candidates.

        Args:
            layout: the rows of the step, their tokens, and where their windows stand.
            cache: the K/V cache of L positions a row. The forward writes the windows' positions.
            full: whether every window is the whole canvas, as at a refresh.
            padded: whether some row has padding before its prompt.
            context: what the rows see, where that is not everything; then there are no drafts.
            drafts: d windows beside those of the step, of the same capacity; the forward does not
                write their K and V into the cache. None means that there are none, d = 0.

        Returns:
            (b * k + d * k, E), after the final norm, those of drafts last.
        """
        b, width = layout.input_ids.shape
        rows = layout.rows if b < cache.batch and not cache.scratch else None
        leftpad = layout.leftpad if padded else None
        with self.phase("embed"):
            both = layout if drafts is None else beside(layout, drafts.layout)
            hidden = self.embed(both.input_ids).flatten(0, 1)
            num_blocks, indices = blocks_seen(context, layout.start, layout.length)
        # On a GPU, torch or flash-attn has faster kernels for full attention, but these support
        # neither padding nor a selection of the cache's rows.
        dense = full and rows is None and leftpad is None and hidden.is_cuda and context is None
        visible, position = (None, None) if context is None else context
        query_start, query_length = layout.start, layout.length
        x: Tensor | None = None  # the norm of `hidden`, or None if it has yet to be computed
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            keys, values = cache.keys[i], cache.values[i]
            if rows is None and b < cache.batch:
                keys, values = keys[:b], values[:b]
            with self.phase(f"layer {i}: norm"):
                x = layer.input_norm(hidden) if x is None else x
            with self.phase(f"layer {i}: qkv"):
                q, k, v = layer.qkv(x, width)
            with self.phase(f"layer {i}: rope+write"):
                if drafts is not None:
                    own_q = drafts.rotate(i, q[b:], k[b:], v[b:], self.cos_sin)
                    q, k, v = q[:b], k[:b], v[:b]
                q = rope_write_kv(
                    q, k, v, self.cos_sin, keys, values, window_start=layout.start,
                    window_length=layout.length, position_offset=leftpad, cache_batch_idx=rows,
                    position=position,
                )  # fmt: skip
            if layer is self.layers[-1]:
                # The queries that predict candidates may stand anywhere in the window, but the
                # queries of window_attention are neighbours. Every query sees the same keys,
                # wherever it stands, so these queries are passed off as a window that begins at the
                # first position after the padding.
                query_start, query_length = layout.leftpad, layout.num_scored
                num_blocks, indices = blocks_seen(context, query_start, query_length)
                q = q.transpose(1, 2).flatten(0, 1).index_select(0, layout.source_index)
                q = q.unflatten(0, (b, -1)).transpose(1, 2)
                hidden = hidden.index_select(0, both.source_index)
            with self.phase(f"layer {i}: attention"):
                if dense:
                    out, _ = dsb_attention(
                        layer.attn, q, keys, values, None, layer.scaling, is_causal=False
                    )
                else:
                    out = window_attention(
                        q, None, None, keys, values, window_start=query_start,
                        window_length=query_length, cache_leftpad=leftpad, cache_batch_idx=rows,
                        kv_num_blocks=num_blocks, kv_indices=indices, kv_visible=visible,
                        softmax_scale=layer.scaling,
                        next_weight=None if full else layer.out,
                    ).transpose(1, 2)  # fmt: skip
                out = out.reshape(-1, out.shape[2] * out.shape[3])
                if drafts is not None:
                    own_out = drafts.attend(i, own_q, leftpad, layer.scaling)
                    if layer is self.layers[-1]:
                        own_out = own_out.index_select(0, drafts.layout.source_index)
                    out = torch.cat([out, own_out])
            with self.phase(f"layer {i}: out"):
                hidden, x = layer.finish(hidden, out)
            with self.phase(f"layer {i}: mlp"):
                hidden, x = layer.mlp(hidden, x, norm)
        with self.phase("final norm"):
            return norm(hidden) if x is None else x
