"""Classifier-free guidance: every row runs twice, once without its prompt.

As in LLaDA's published code, the second run of a row has a mask wherever the call was given a
token, and the candidates' logits are `un + (cfg_scale + 1) * (cond - un)`. Both runs share the
canvas, the windows and every decision. They are two rows of one forward, and of the K/V cache.

Shapes: B batch rows, L canvas positions; a step has b rows of W tokens and k candidates each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsb_kernels.place import Layout
from dsb_runtime.engine.sparse import Context


def with_unconditional(
    layout: Layout, context: Context | None, given: Tensor, mask_id: int
) -> tuple[Layout, Context | None]:
    """The layout (and the sparse context) of 2 * b rows: those of the step, then the same without
    what was given, whose batch rows (in the cache) follow those of the batch.

    Args:
        given: (B, L) bool, whether the call began with a token (no mask) at each position.
    """
    batch, length = given.shape
    b, width = layout.input_ids.shape
    column = torch.arange(width, device=given.device)
    index = (layout.start[:, None] + column).clamp(max=length - 1).long()
    if context is not None:
        position = context.position
        if position is not None:
            index, position = position.long(), torch.cat([position, position])
        context = Context(torch.cat([context.visible, context.visible]), position)
    masked = given[layout.rows.long()[:, None], index]
    unconditional = layout._replace(
        rows=layout.rows + batch,
        input_ids=layout.input_ids.masked_fill(masked, mask_id),
        source_index=layout.source_index + b * width,
    )
    both = Layout(*(torch.cat(pair) for pair in zip(layout, unconditional, strict=True)))
    return both, context


def guided(scored: Tensor, lm_head: nn.Module | None, cfg_scale: float) -> Tensor:
    """The guided logits of the candidates, (b * k, V) float32.

    Args:
        scored: (2 * b * k, E), the hidden states of both runs.
        lm_head: the model's output layer, which is called. None means that `scored` has logits.
    """
    logits = scored if lm_head is None else lm_head(scored)
    conditional, unconditional = logits.float().chunk(2)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)
