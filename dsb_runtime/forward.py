"""The forward under the loop: transformers' own modules, the last layer only where it is read.

Every row's keys and values are needed in every layer, but what follows them in the last layer
(queries, attention, MLP, final norm) is needed for the rows to be scored alone: at a refresh that
is `block_length` rows out of the whole canvas.

Where the kernels run, a layer's rotary embedding and cache write are one launch and its attention
reads the cache as it is; elsewhere the layers run as transformers wrote them, through the cache's
`update` and the "dsb" attention.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsb_kernels import rope_kv
from dsb_kernels.dispatch import use_triton
from dsb_runtime.attention import Window, dsb_attention
from dsb_runtime.cache import WindowCache


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by transformers' tables, which hold each angle twice.

    x: (b, H, W, D); cos, sin: (b, W, D).
    """
    half = x.shape[-1] // 2
    return rope_kv.rotate(x, cos[:, None, :, :half], sin[:, None, :, :half], is_neox=True)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (b, K) of x (b, W, E): (b, K, E)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))


def heads(x: Tensor, dim: int, norm: torch.nn.Module | None) -> Tensor:
    """(b, W, H * D) -> (b, H, W, D), normed where the family norms heads (Qwen3)."""
    x = x.unflatten(-1, (-1, dim))
    return (x if norm is None else norm(x)).transpose(1, 2)


def project(attn: torch.nn.Module, x: Tensor, names: str) -> list[Tensor]:
    """The projections "q", "k", "v" named, as heads: (b, H or H_kv, W, D) each."""
    made = []
    for name in names:
        norm = getattr(attn, f"{name}_norm", None)
        made.append(heads(getattr(attn, f"{name}_proj")(x), attn.head_dim, norm))
    return made


def kept_attention(
    attn: torch.nn.Module,
    x: Tensor,
    keep: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: WindowCache | None,
    layer_idx: int,
) -> Tensor:
    """Attention with the K/V of all rows and the queries of rows `keep`: (b, K, H * D)."""
    cos, sin = rotary
    key, value = project(attn, x, "kv")
    key = rotate(key, cos, sin)
    if cache is not None:
        key, value = cache.update(key, value, layer_idx)
    (query,) = project(attn, take_rows(x, keep), "q")
    query = rotate(query, take_rows(cos, keep), take_rows(sin, keep))
    out, _ = dsb_attention(attn, query, key, value, mask, scaling=attn.scaling, is_causal=False)
    return out.flatten(-2)


def fused_attention(
    attn: torch.nn.Module,
    x: Tensor,
    keep: Tensor | None,
    cos_sin: Tensor,
    mask: Tensor | None,
    cache: WindowCache,
    layer_idx: int,
) -> Tensor:
    """The same for all rows (or rows `keep`) with one launch for rotary and cache write.

    cos_sin: (L, D), cosines and sines of half a head each. Returns (b, W or K, H * D).
    """
    target = cache.target
    query, key, value = project(attn, x, "qkv")
    layer = cache.layers[layer_idx]
    if not layer.is_initialized:
        layer.lazy_initialization(key, value)
    query = rope_kv.rope_write_kv(
        query, key, value, cos_sin, layer.keys, layer.values,
        window_start=target.start, window_length=target.length, position_offset=target.leftpad,
    )  # fmt: skip
    start, length = target.start, target.length
    if keep is not None:
        index = keep[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
        query = query.gather(2, index)
        # Scattered rows: any K stored positions may stand for their window, which is written.
        start, length = target.leftpad, torch.full_like(length, keep.shape[1])
    stored = slice(0, target.capacity)
    seqlens = torch.full_like(start, target.capacity)
    window = None
    if target.positions is not None:  # a refresh is dense: SDPA has the best kernels for it
        window = Window(start, length, seqlens, target.leftpad)
    out, _ = dsb_attention(
        attn, query, layer.keys[:, :, stored], layer.values[:, :, stored], mask,
        scaling=attn.scaling, is_causal=False, window=window,
    )  # fmt: skip
    return out.flatten(-2)


class Backbone:
    """A decoder's layers over a window of rows or the whole canvas of `length` positions."""

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        self.model = model.model
        layer = self.model.layers[0]
        # Newer transformers renamed the layers' cache argument.
        names = inspect.signature(inspect.unwrap(type(layer).forward)).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.length, self.cos_sin = length, None

    def table(self, hidden: Tensor) -> Tensor:
        """(L, D) float32: cosines and sines of every position, half a head each."""
        if self.cos_sin is None:
            index = torch.arange(self.length, device=hidden.device)[None]
            cos, sin = self.model.rotary_emb(hidden.float(), position_ids=index)
            half = cos.shape[-1] // 2
            self.cos_sin = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)
        return self.cos_sin

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        keep: Tensor,
        mask: Tensor | None,
        cache: WindowCache | None,
    ) -> Tensor:
        """Final hidden states of rows `keep`.

        Args:
            input_ids, position_ids: (b, W).
            keep: (b, K) rows of the window to return.
            mask: (b, 1, 1, L) bool, True at keys that exist; None where all do.
            cache: written at the rows it points at; None: keys are those of the window itself.

        Returns:
            (b, K, E), after the final norm.
        """
        hidden = self.model.embed_tokens(input_ids)
        if cache is not None and cache.target.rows is None and use_triton(hidden):
            hidden = self.fused_layers(hidden, keep, mask, cache)
        else:
            hidden = self.layers(hidden, position_ids, keep, mask, cache)
        return self.model.norm(hidden)

    def layers(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        keep: Tensor,
        mask: Tensor | None,
        cache: WindowCache | None,
    ) -> Tensor:
        """The layers as transformers wrote them, the last for rows `keep`: (b, K, E)."""
        rotary = self.model.rotary_emb(hidden, position_ids=position_ids)
        arguments: dict[str, Any] = {self.cache_name: cache, "use_cache": cache is not None}
        *layers, last = self.model.layers
        for layer in layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=rotary,
                is_causal=False,
                **arguments,
            )
        cos, sin = (t.expand(hidden.shape[0], -1, -1) for t in rotary)
        x = last.input_layernorm(hidden)
        out = kept_attention(last.self_attn, x, keep, (cos, sin), mask, cache, len(layers))
        return finish_layer(last, take_rows(hidden, keep), out)

    def fused_layers(
        self, hidden: Tensor, keep: Tensor, mask: Tensor | None, cache: WindowCache
    ) -> Tensor:
        """The layers over the kernels, the last for rows `keep`: (b, K, E)."""
        cos_sin, last = self.table(hidden), len(self.model.layers) - 1
        for i, layer in enumerate(self.model.layers):
            kept = keep if i == last else None
            x = layer.input_layernorm(hidden)
            out = fused_attention(layer.self_attn, x, kept, cos_sin, mask, cache, i)
            hidden = finish_layer(layer, hidden if kept is None else take_rows(hidden, keep), out)
        return hidden


def finish_layer(layer: torch.nn.Module, residual: Tensor, out: Tensor) -> Tensor:
    """What follows attention: output projection, MLP and both residual additions."""
    hidden = residual + layer.self_attn.o_proj(out)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
