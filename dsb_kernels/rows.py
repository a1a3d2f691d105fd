"""What `place_rows` and `unmask_and_slide` read and write: the constants of a call, the state of
its rows.

B = batch rows, K = candidates of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# What a row needs next: the values of `WindowState.needs`. A refresh computes every position, a
# response step all but the prompt.
WINDOW, REFRESH, RESPONSE, NOTHING = 0, 1, 2, 3

# The columns of `WindowState.flags`.
FLAGS = (
    "needs",
    "failed",
    "start",
    "end",
    "prefix",
    "held",  # candidates of the coming step
    "since",  # commits since the last refresh
    "left",  # masks left in the response
    "took_part",  # in the last step
    "new",  # commits of the last step
)


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
    full_every: int = 1  # of so many refreshes the first computes the prompt as well


@dataclass
class WindowState:
    """Per-row decoding state, device tensors of fixed shape, updated in place by each step.

    `start`, `end`, `prefix`, `committed`, `since_refresh`, `step`, `refreshes`, `forwards`: (B,)
    int32. Window steps recompute `[start - prefix, end)`; `refreshes` and `forwards` count the
    steps of either kind that the row took part in. `refresh`, `done`, `failed`: (B,) bool;
    `failed` is set (and nothing committed) when a candidate's confidence is NaN. `needs`: (B,)
    int32, WINDOW, REFRESH, RESPONSE or NOTHING. `position`: (B, K) int32, the canvas indices that
    may be unmasked in the coming step, ascending, -1 beyond the last.

    What the last step did: `commit` (B, K) bool, which of the candidates that it began with it
    committed; `scored` (B, K) float32, their confidence, 0 for what was not scored; `flags`
    (B, len(FLAGS)) int32, what a host wants to know of each row, side by side.
    """

    start: Tensor
    end: Tensor
    prefix: Tensor
    committed: Tensor
    since_refresh: Tensor
    step: Tensor
    refreshes: Tensor
    forwards: Tensor
    needs: Tensor
    refresh: Tensor
    done: Tensor
    failed: Tensor
    position: Tensor
    commit: Tensor
    scored: Tensor
    flags: Tensor


# The fields by dtype and shape.
INT_FIELDS = (
    "start", "end", "prefix", "committed", "since_refresh", "step", "refreshes", "forwards",
    "needs",
)  # fmt: skip
BOOL_FIELDS = ("refresh", "done", "failed")
