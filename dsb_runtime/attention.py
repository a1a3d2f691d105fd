"""The "dsb" attention implementation in transformers' registries.

A mask of None means that every query attends to every key: the mask function leaves it out only
for bidirectional attention without padding, so the attention function needs no other sign.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def dsb_mask(*args: Any, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
    """SDPA's boolean mask; a causal one is always written out."""
    return sdpa_mask(*args, allow_is_causal_skip=False, **kwargs)


def dsb_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of window or full queries over all cached positions.

    Args:
        query: (B, H, W, D). key, value: (B, H_kv, L, D), H a multiple of H_kv.
        attention_mask: broadcastable to (B, H, W, L), True where attended; None is everywhere.

    Returns:
        (B, W, H, D), and None in place of attention weights.
    """
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2), None


AttentionInterface.register("dsb", dsb_attention)
AttentionMaskInterface.register("dsb", dsb_mask)
