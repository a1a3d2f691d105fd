"""DecodeState: everything that a decoding step reads and writes, as device tensors of fixed shape.

B = batch rows, L = canvas length, K = candidates of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsb_kernels.commit import initial_rows
from dsb_kernels.rows import UnmaskSpec


class DecodeState(NamedTuple):
    """The state of a batch; a step is a function of it alone and updates it in place.

    Rows advance independently. A step moves the rows that need a step of its kind and leaves the
    others as they are, so that no step can be wrong, only useless.
    """

    canvas: Tensor  # (B, L) int64
    table: Tensor  # (B, NUM_COLUMNS) int32, the row table
    position: Tensor  # (B, K) int32, candidates of the coming step, -1 beyond the last
    commit: Tensor  # (B, K) bool, which of its candidates the last step committed
    confidence: Tensor  # (B, K) float32, their confidence
    seed: Tensor  # () int64, of the noise


def new_state(canvas: Tensor, leftpad: Tensor, spec: UnmaskSpec) -> DecodeState:
    """The state before the first step: everything masked, a refresh due. Takes `canvas` over."""
    table, position = initial_rows(canvas, leftpad, spec)
    return DecodeState(
        canvas=canvas,
        table=table,
        position=position,
        commit=torch.zeros_like(position, dtype=torch.bool),
        confidence=torch.zeros_like(position, dtype=torch.float32),
        seed=torch.zeros((), dtype=torch.int64, device=canvas.device),
    )
