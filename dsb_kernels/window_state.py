"""What `unmask_and_slide` reads and writes: the constants of a call, the state of its rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class UnmaskSpec:
    """What stays fixed during a call of `generate`; every field is a launch constant."""

    prompt_length: int  # P, first response position (rows are left-padded to it)
    block_length: int  # S_init
    max_block_length: int | None  # S_max; None is unbounded ("greedy")
    schedule: str  # "dsb" | "naive"
    cache: str  # "dsb" | "dual" | "none"
    prefix_window: int  # l_pm, rows recomputed before the window (cache="dsb")
    min_prefix: int  # 1 where logits are shifted and a refresh selects, else 0
    rule: str  # a key of RULES
    rule_value: float  # threshold, factor, delta; unused by "quota"
    steps: int  # quota: steps for the response (dsb) or for one block (naive); else 0
    refresh_commit: str  # "select" | "first": what a refresh step commits
    mask_id: int
    eos_ids: tuple[int, ...]
    stop_at_eos: bool


@dataclass
class WindowState:
    """Per-row decoding state, device tensors of fixed shape, updated in place by each step.

    `start`, `end`, `prefix`, `committed`, `since_refresh`, `step`: (B,) int32. Window steps
    recompute `[start - prefix, end)`. `refresh`, `done`, `failed`: (B,) bool; `failed` is set (and
    nothing committed) when a candidate's confidence is NaN. `position`: (B, K) int32, the canvas
    indices that may be unmasked in the coming step, ascending, -1 beyond the last.
    """

    start: Tensor
    end: Tensor
    prefix: Tensor
    committed: Tensor
    since_refresh: Tensor
    step: Tensor
    refresh: Tensor
    done: Tensor
    failed: Tensor
    position: Tensor
