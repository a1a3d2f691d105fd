"""The forward under the loop: transformers' own modules, the last layer only where it is read.

Every row's keys and values are needed in every layer, but what follows them in the last layer
(queries, attention, MLP, final norm) is needed for the rows to be scored alone: at a refresh that
is `block_length` rows out of the whole canvas.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsb_runtime.attention import dsb_attention
from dsb_runtime.cache import WindowCache


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding as Llama applies it. x: (b, H, W, D); cos, sin: (b, W, D)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (b, K) of x (b, W, E): (b, K, E)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))


def last_layer(
    layer: torch.nn.Module,
    hidden: Tensor,
    keep: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: WindowCache | None,
    layer_idx: int,
) -> Tensor:
    """The layer's K/V for all rows, its output for rows `keep`: (b, W, E) -> (b, K, E)."""
    attn = layer.self_attn
    cos, sin = rotary
    x = layer.input_layernorm(hidden)

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)

    key = rotate(heads(attn.k_proj(x)), cos, sin)
    value = heads(attn.v_proj(x))
    if cache is not None:
        key, value = cache.update(key, value, layer_idx)
    query = heads(attn.q_proj(take_rows(x, keep)))
    query = rotate(query, take_rows(cos, keep), take_rows(sin, keep))
    out, _ = dsb_attention(attn, query, key, value, mask, scaling=attn.scaling)
    hidden = take_rows(hidden, keep) + attn.o_proj(out.flatten(-2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


class Backbone:
    """A Llama's or Qwen2's layers over a window of rows or the whole canvas."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.model
        layer = self.model.layers[0]
        # Newer transformers renamed the layers' cache argument.
        names = inspect.signature(inspect.unwrap(type(layer).forward)).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"

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
        rotary = self.model.rotary_emb(hidden, position_ids=position_ids)
        arguments: dict[str, Any] = {self.cache_name: cache, "use_cache": cache is not None}
        *layers, last = self.model.layers
        for layer in layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=rotary,
                **arguments,
            )
        cos, sin = (t.expand(input_ids.shape[0], -1, -1) for t in rotary)
        hidden = last_layer(last, hidden, keep, (cos, sin), mask, cache, len(layers))
        return self.model.norm(hidden)
