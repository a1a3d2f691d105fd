"""The "dsb" attention implementation in transformers' registries.

It serves any transformers decoder. The mask function makes a tensor of every mask (causal, sliding,
padded), and a mask of None means that every query attends to every key. A model's own eager
attention serves what nothing else computes (soft-capping, sinks, position biases); the first such
call warns.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.utils import is_flash_attn_2_available, logging

logger = logging.get_logger(__name__)

# Arguments that change the result in a way that SDPA has no argument for.
EAGER_ONLY = frozenset(
    ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices", "output_attentions")
)


def dsb_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return SDPA's boolean mask. A causal mask is always a tensor, never None."""
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


def causal_by_default(module: torch.nn.Module) -> bool:
    """Whether a layer that is called without a mask is causal."""
    config = getattr(module, "config", None)
    return getattr(config, "is_causal", True) and getattr(module, "is_causal", True)


def causal_mask(module: torch.nn.Module, query: Tensor, key: Tensor) -> Tensor:
    """The causal mask (1, 1, W, W), for a model that does not ask the mask registry for one."""
    queries, keys = query.shape[2], key.shape[2]
    if queries != keys:
        raise ValueError(
            f"attn_implementation='dsb': {type(module).__name__} is causal and gave no mask for "
            f"{queries} queries of {keys} keys; expected a mask"
        )
    return torch.ones(1, 1, keys, keys, dtype=torch.bool, device=query.device).tril()


def eager_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    named: list[str],
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Call the eager attention of the model's own file, which computes what SDPA cannot.

    `named` lists the arguments that need it.

    Raises:
        NotImplementedError: the model's file has no eager attention.
    """
    kind = type(module).__name__
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise NotImplementedError(
            f"attn_implementation='dsb': {kind} uses {', '.join(named)}, which it does not serve; "
            "expected attn_implementation='eager'"
        )
    logger.warning_once(
        f"attn_implementation='dsb': {kind} uses {', '.join(named)}; its eager attention runs"
    )
    if mask is not None and mask.dtype == torch.bool:  # eager attention adds its mask
        low = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, low)
    return own(module, query, key, value, mask, **kwargs)


def takes_flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> bool:
    """Whether flash-attn, where it is installed, serves this call. It serves full attention without
    a mask.

    Shapes, dtypes and the device decide, never values. SDPA serves a call with a padding mask:
    flash-attn wants rows without their padding, and to remove it the host must read the mask.
    """
    return (
        mask is None
        and dropout == 0
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[2] == key.shape[2]
        and query.shape[3] == value.shape[3] <= 256
    )


def flash_installed(device: torch.device) -> bool:
    """Whether flash-attn is installed (`pip install .[flash]`) and serves this GPU (sm_80 and
    up)."""
    return is_flash_attn_2_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Attention of every query to every key by flash-attn 2, through transformers' integration.

    It is untested on a GPU: the tests run it with a stand-in for flash-attn's function alone.

    Args:
        query: (B, H, L, D). key, value: (B, H_kv, L, D).

    Returns:
        (B, L, H, D).
    """
    # `flash_attention_forward` would not do: it reads the implementation's name from the config,
    # and would find "dsb" there.
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return _flash_attention_forward(
        q, k, v, attention_mask=None, query_length=query.shape[2], is_causal=False,
        softmax_scale=scaling, attn_implementation="flash_attention_2",
    )  # fmt: skip


def repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    """Repeat each head of x (B, H_kv, L, D) for the H / H_kv heads of `query` (B, H, W, D) that
    share it."""
    groups = query.shape[1] // x.shape[1]
    return x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)


def dsb_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of queries over all positions, as transformers calls it.

    Args:
        query: (B, H, W, D). key, value: (B, H_kv, L, D), H a multiple of H_kv.
        attention_mask: broadcastable to (B, H, W, L). A boolean mask is True where a query attends
            to a key; a float mask is added to the scores. With None every query attends to every
            key, unless the layer is causal.

    Returns:
        (B, W, H, D), and None in place of attention weights. A model's eager attention may return
        its weights.

    Raises:
        ValueError, NotImplementedError: no attention serves this layer.
    """
    used = EAGER_ONLY & kwargs.keys()
    named = sorted(n for n in used if kwargs[n] is not None and kwargs[n] is not False)
    unmasked = attention_mask is None and is_causal is not False and query.shape[2] > 1
    if unmasked and (is_causal or causal_by_default(module)):
        attention_mask = causal_mask(module, query, key)
    if named:
        kwargs.update(scaling=scaling, dropout=dropout)
        return eager_attention(module, query, key, value, attention_mask, named, **kwargs)
    flash = takes_flash(query, key, value, attention_mask, dropout)
    if flash and flash_installed(query.device):
        return flash_attention(query, key, value, scaling), None
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and attention_mask is not None:
        # On a GPU, torch 2.11 has no kernel for grouped heads with a mask, except for cuDNN's on
        # sm_90 and sm_100. Without one it would write every score to memory.
        key, value, grouped = repeat_heads(key, query), repeat_heads(value, query), False
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling,
        enable_gqa=grouped,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("dsb", dsb_attention)
AttentionMaskInterface.register("dsb", dsb_mask)
