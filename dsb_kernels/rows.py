"""What `place_rows` and `unmask_and_slide` share: the row table and the settings of a call."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields
from enum import IntEnum

from torch import Tensor

from dsb_kernels._check import check_choice
from dsb_kernels.rules import RULES

SCHEDULES = ("dsb", "naive")
CACHES = ("dsb", "dual", "none")
REFRESH_COMMITS = ("select", "first")


class StepKind(IntEnum):
    """What a row needs next, and what a step computes."""

    WINDOW = 0  # the window
    REFRESH = 1  # every position
    RESPONSE = 2  # the response: from its first mask as the call began to its last
    NOTHING = 3  # the row is done

    @property
    def label(self) -> str:
        """The kind as users read it: "window", "refresh" or "response"."""
        return self.name.lower()


class Column(IntEnum):
    """The columns of the row table, (B, NUM_COLUMNS) int32, which has all that is known of each
    row.

    A step reads and updates the table on the device, and the host copies the whole table. Only this
    class defines the order of the columns.
    """

    NEXT_KIND = 0  # a StepKind
    START = 1  # the block is [start, end)
    END = 2
    PREFIX = 3  # a window step computes [start - prefix, end)
    NUM_CANDIDATES = 4  # how many candidates the coming step has
    LEFTPAD = 5  # how many padding positions stand before the prompt; fixed during a call
    UNMASKED = 6  # how many response positions have a token: those committed, and those given
    SINCE_REFRESH = 7  # how many tokens were committed since the last refresh, its own included
    STEP = 8  # how many steps the row has had; with schedule="naive", the current block
    REFRESHES = 9  # how many refreshes the row took part in, of either kind
    FORWARDS = 10  # how many steps the row took part in
    TOOK_PART = 11  # 1 if the row took part in the last step, else 0
    NEW = 12  # how many tokens the last step committed
    FAILED = 13  # 1 once a candidate's confidence was NaN: in that step the row commits nothing
    RESPONSE_START = 14  # the response is [start, end); both are fixed during a call
    RESPONSE_END = 15
    PLANNED = 16  # how many masks the plan of a quota covers: all, or with naive the block's
    CONTEXT = 17  # how many positions a refresh computes: all, or those of a sparse context


NUM_COLUMNS = len(Column)


@dataclass(kw_only=True)
class Row:
    """One row of the table on the host, with a field for each `Column`."""

    next_kind: int
    start: int
    end: int
    prefix: int
    num_candidates: int
    leftpad: int
    unmasked: int
    since_refresh: int
    step: int
    refreshes: int
    forwards: int
    took_part: int
    new: int
    failed: int
    response_start: int
    response_end: int
    planned: int
    context: int


_NAMES = [column.name.lower() for column in Column]


def read_rows(table: Tensor) -> list[Row]:
    """Read the rows of a table (B, NUM_COLUMNS) that is on the host."""
    return [Row(**dict(zip(_NAMES, row, strict=True))) for row in table.tolist()]


@dataclass(frozen=True)
class UnmaskSpec:
    """What stays fixed during a call of `generate`.

    Raises:
        ValueError: a value is not accepted; the message names it and what is accepted.
    """

    block_length: int  # S_init in the paper
    max_block_length: int | None  # S_max in the paper; with None the block is unbounded ("greedy")
    schedule: str  # one of SCHEDULES
    cache: str  # one of CACHES
    prefix_window: int  # l_pm in the paper, the least prefix of a window (cache="dsb")
    min_prefix: int  # 1 where logits are shifted and a refresh selects, else 0
    rule: str  # a key of RULES
    rule_value: float  # the value of the rule's setting; 0.0 for "quota"
    steps: int  # quota: how many steps the response (dsb) or each block (naive) is given; else 0
    refresh_commit: str  # one of REFRESH_COMMITS: what a refresh step commits
    mask_id: int
    eos_ids: tuple[int, ...]
    stop_at_eos: bool
    full_every: int = 1  # of so many refreshes, the first computes what is around the response too
    progress: float = 0.0  # threshold: how far it falls as the block fills, as a share of it
    eos_bound: bool = False  # stop_at_eos: no block reaches beyond the first EOS of the response

    def __post_init__(self) -> None:
        check_choice("UnmaskSpec", "schedule", self.schedule, SCHEDULES)
        check_choice("UnmaskSpec", "cache", self.cache, CACHES)
        check_choice("UnmaskSpec", "rule", self.rule, tuple(RULES))
        check_choice("UnmaskSpec", "refresh_commit", self.refresh_commit, REFRESH_COMMITS)
        for name, low in (
            ("block_length", 1), ("full_every", 1),
            ("steps", 1 if RULES[self.rule].kind is int else 0),
        ):  # fmt: skip
            if getattr(self, name) < low:
                raise ValueError(
                    f"UnmaskSpec: {name}={getattr(self, name)}: accepted is at least {low}"
                )
        if self.eos_bound and not self.stop_at_eos:
            raise ValueError("UnmaskSpec: eos_bound=True: accepted with stop_at_eos=True")
        # The string of `encode` is made here, since torch.compile cannot trace json.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        object.__setattr__(self, "_code", json.dumps(values))

    def encode(self) -> str:
        """Return the spec as a string, which torch accepts as an op's argument."""
        return self._code  # type: ignore[attr-defined]

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def decode(code: str) -> UnmaskSpec:
        """Return the spec that `encode` made this string from."""
        values = json.loads(code)
        return UnmaskSpec(**{**values, "eos_ids": tuple(values["eos_ids"])})
