"""DecodeState: everything that a decoding step reads and writes, as device tensors of fixed shape.

B = batch rows, L = canvas length, K = candidates of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dsb_kernels.unmask import initial_state
from dsb_kernels.window_state import UnmaskSpec, WindowState

# What a row needs next; the values of `DecodeState.needs`.
WINDOW, REFRESH, RESPONSE, NOTHING = 0, 1, 2, 3
KINDS = {"window": WINDOW, "refresh": REFRESH, "response": RESPONSE}


@dataclass
class RowFlags:
    """What the host knows of one batch row after a step, by the step's flags."""

    needs: int
    failed: bool
    start: int
    end: int
    prefix: int
    held: int  # candidates of the coming step
    since: int  # commits since the last refresh
    left: int  # masks left in the response
    took_part: bool
    new: int  # commits of the step


FLAGS = len(fields(RowFlags))


@dataclass
class DecodeState:
    """The state of a batch; a step is a function of it alone and updates it in place.

    Batch rows advance independently. A step of one kind moves the rows that `needs` names for it
    and leaves the others as they are, so that no step can be wrong, only useless.
    """

    canvas: Tensor  # (B, L) int64
    leftpad: Tensor  # (B,) int32, positions before each prompt
    window: WindowState  # what `unmask_and_slide` updates
    needs: Tensor  # (B,) int32, WINDOW, REFRESH, RESPONSE or NOTHING
    refreshes: Tensor  # (B,) int32, refresh and response steps so far
    forwards: Tensor  # (B,) int64, steps that the row took part in: the random counter
    seed: Tensor  # () int64
    candidates: Tensor  # (B, K) int32, of the last step, -1 beyond
    commit: Tensor  # (B, K) bool, which of them it committed
    confidence: Tensor  # (B, K) float32
    flags: Tensor  # (B, FLAGS) int32, the fields of RowFlags


def new_state(canvas: Tensor, leftpad: Tensor, spec: UnmaskSpec) -> DecodeState:
    """The state before the first step: everything masked, a refresh due. Takes `canvas` over."""
    window = initial_state(canvas, leftpad, spec)
    rows, device = len(canvas), canvas.device
    state = DecodeState(
        canvas=canvas,
        leftpad=leftpad,
        window=window,
        needs=torch.full((rows,), REFRESH, dtype=torch.int32, device=device),
        refreshes=torch.zeros(rows, dtype=torch.int32, device=device),
        forwards=torch.zeros(rows, dtype=torch.int64, device=device),
        seed=torch.zeros((), dtype=torch.int64, device=device),
        candidates=torch.full_like(window.position, -1),
        commit=torch.zeros_like(window.position, dtype=torch.bool),
        confidence=torch.zeros_like(window.position, dtype=torch.float32),
        flags=torch.zeros(rows, FLAGS, dtype=torch.int32, device=device),
    )
    write_flags(state, torch.zeros_like(window.done), spec)
    return state


def copy_state(target: DecodeState | WindowState, source: DecodeState | WindowState) -> None:
    """Write one state into the tensors of another of the same shape."""
    for field in fields(target):
        to, value = getattr(target, field.name), getattr(source, field.name)
        if isinstance(to, Tensor):
            to.copy_(value)
        else:
            copy_state(to, value)


def write_flags(state: DecodeState, active: Tensor, spec: UnmaskSpec) -> None:
    """Put what the host wants to know of each row side by side. active: (B,) bool."""
    w = state.window
    left = state.canvas.shape[1] - spec.prompt_length - w.committed
    held = (w.position >= 0).sum(-1)
    new = state.commit.sum(-1)
    columns = (
        state.needs, w.failed, w.start, w.end, w.prefix, held, w.since_refresh, left, active, new
    )  # fmt: skip
    torch.stack([c.int() for c in columns], dim=1, out=state.flags)


def read_flags(flags: Tensor) -> list[RowFlags]:
    """(B, FLAGS) on the host -> a record for each row."""
    return [
        RowFlags(n, bool(failed), s, e, p, held, since, left, bool(took), new)
        for n, failed, s, e, p, held, since, left, took, new in flags.tolist()
    ]
