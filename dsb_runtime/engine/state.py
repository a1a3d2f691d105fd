"""DecodeState: everything that a decoding step reads and writes, as device tensors of fixed shape.

B = batch rows, L = canvas length.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dsb_kernels.commit import initial_state
from dsb_kernels.rows import REFRESH, RESPONSE, WINDOW, UnmaskSpec, WindowState

KINDS = {"window": WINDOW, "refresh": REFRESH, "response": RESPONSE}


@dataclass
class RowFlags:
    """What the host knows of one batch row after a step: `window_state.FLAGS`."""

    needs: int
    failed: bool
    start: int
    end: int
    prefix: int
    held: int
    since: int
    left: int
    took_part: bool
    new: int


@dataclass
class DecodeState:
    """The state of a batch; a step is a function of it alone and updates it in place.

    Batch rows advance independently. A step of one kind moves the rows that `window.needs` names
    for it and leaves the others as they are, so that no step can be wrong, only useless.
    """

    canvas: Tensor  # (B, L) int64
    leftpad: Tensor  # (B,) int32, positions before each prompt
    window: WindowState  # what `unmask_and_slide` updates
    seed: Tensor  # () int64


def new_state(canvas: Tensor, leftpad: Tensor, spec: UnmaskSpec) -> DecodeState:
    """The state before the first step: everything masked, a refresh due. Takes `canvas` over."""
    window = initial_state(canvas, leftpad, spec)
    seed = torch.zeros((), dtype=torch.int64, device=canvas.device)
    return DecodeState(canvas, leftpad, window, seed)


def copy_state(target: DecodeState | WindowState, source: DecodeState | WindowState) -> None:
    """Write one state into the tensors of another of the same shape."""
    for field in fields(target):
        to, value = getattr(target, field.name), getattr(source, field.name)
        if isinstance(to, Tensor):
            to.copy_(value)
        else:
            copy_state(to, value)


def read_flags(flags: Tensor) -> list[RowFlags]:
    """(B, len(FLAGS)) on the host -> a record for each row."""
    return [
        RowFlags(n, bool(failed), s, e, p, held, since, left, bool(took), new)
        for n, failed, s, e, p, held, since, left, took, new in flags.tolist()
    ]
