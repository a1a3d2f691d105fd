"""DecodingConfig: every setting of `generate`, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

SCHEDULES = ("dsb", "naive")
CACHES = ("dsb", "dual", "none")
REFRESH_COMMITS = ("select", "first")
REFRESH_POLICIES = ("full", "response")
DEFAULT_FULL_EVERY = 4
DEFAULT_THRESHOLD = 0.9


def check_int(name: str, value: Any, low: int, high: int | None = None, why: str = "") -> None:
    """Raise unless `value` is an int in [low, high]; the message names what is accepted."""
    accepted = f"an int >= {low}" if high is None else f"an int from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected {accepted}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value!r}: expected {accepted}{why}")


def check_real(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise unless `value` is a finite number in [low, high] (or (low, high])."""
    accepted = f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: expected {accepted}")
    below = value <= low if open_low else value < low
    if below or value > high or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: expected {accepted}")


def check_choice(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(accepted)}")


@dataclass(frozen=True)
class DecodingConfig:
    """How to decode. At most one of `threshold`, `factor`, `frechet`, `steps` may be named; with
    none of them the rule is threshold 0.9.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a value outside what is accepted; the message names field, value and range.
    """

    gen_length: int = 256  # G, response positions, >= 1
    block_length: int = 32  # S_init, 1 .. gen_length
    schedule: str = "dsb"  # "dsb" slides with the first mask; "naive" moves block by block
    max_block_length: int | None = None  # S_max >= block_length; None is unbounded (greedy)
    cache: str = "dsb"  # "dsb" (DSB Cache), "dual" (Fast-dLLM), "none"
    prefix_window: int | None = None  # l_pm >= 0, cache="dsb" only; None: the family's value
    threshold: float | None = None  # commit every confidence >= threshold, in [0, 1]
    factor: float | None = None  # Fast-dLLM's factor rule, in (0, 1e6]
    frechet: float | None = None  # arXiv 2606.02955's bound, in [-1, 1]
    steps: int | None = None  # a quota: steps fixed up front, 1 .. gen_length
    confidence: str = "probability"  # ranks candidates: "probability", "margin", "entropy"
    temperature: float = 0.0  # 0 is greedy
    top_p: float | None = None  # Dream only, in (0, 1]
    top_k: int | None = None  # Dream only, >= 1
    stop_at_eos: bool = False  # a row ends at an EOS with no mask to its left
    refresh_commit: str | None = None  # what a refresh commits; None: the family's way
    refresh_policy: str = "full"  # "response": most refreshes leave the prompt's K/V as they are
    full_refresh_every: int | None = None  # >= 2, of "response": refreshes per full one; None: 4

    def __post_init__(self) -> None:
        check_int("gen_length", self.gen_length, 1)
        check_int("block_length", self.block_length, 1, self.gen_length, " (at most gen_length)")
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("cache", self.cache, CACHES)
        if self.max_block_length is not None:
            if self.schedule == "naive":
                raise ValueError(
                    f"max_block_length={self.max_block_length!r}: only schedule='dsb' resizes its "
                    "block; expected None with schedule='naive'"
                )
            check_int(
                "max_block_length", self.max_block_length, self.block_length,
                why=" (at least block_length), or None",
            )  # fmt: skip
        if self.prefix_window is not None:
            if self.cache != "dsb":
                raise ValueError(
                    f"prefix_window={self.prefix_window!r}: only cache='dsb' has a prefix window; "
                    f"expected None with cache={self.cache!r}"
                )
            check_int("prefix_window", self.prefix_window, 0)
        self._check_rule()
        check_real("temperature", self.temperature, 0.0, 1e6)
        if self.top_p is not None:
            check_real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        if self.top_k is not None:
            check_int("top_k", self.top_k, 1)
        if not isinstance(self.stop_at_eos, bool):
            raise TypeError(f"stop_at_eos={self.stop_at_eos!r}: expected True or False")
        if self.refresh_commit is not None:
            check_choice("refresh_commit", self.refresh_commit, REFRESH_COMMITS)
            if self.cache == "none":
                raise ValueError(
                    f"refresh_commit={self.refresh_commit!r}: cache='none' has no refresh steps; "
                    "expected None"
                )

        check_choice("refresh_policy", self.refresh_policy, REFRESH_POLICIES)
        if self.refresh_policy != "full" and self.cache == "none":
            raise ValueError(
                f"refresh_policy={self.refresh_policy!r}: cache='none' keeps no K/V; "
                "expected 'full'"
            )
        if self.full_refresh_every is not None:
            if self.refresh_policy == "full":
                raise ValueError(
                    f"full_refresh_every={self.full_refresh_every!r}: every refresh is full with "
                    "refresh_policy='full'; expected None"
                )
            check_int("full_refresh_every", self.full_refresh_every, 2)

    def _check_rule(self) -> None:
        named = [
            f"{name}={value!r}"
            for name in ("threshold", "factor", "frechet", "steps")
            if (value := getattr(self, name)) is not None
        ]
        if len(named) > 1:
            raise ValueError(
                f"{', '.join(named)}: expected at most one of threshold, factor, frechet, steps"
            )
        if not named:
            object.__setattr__(self, "threshold", DEFAULT_THRESHOLD)
        if self.threshold is not None:
            check_real("threshold", self.threshold, 0.0, 1.0)
        if self.factor is not None:
            check_real("factor", self.factor, 0.0, 1e6, open_low=True)
        if self.frechet is not None:
            check_real("frechet", self.frechet, -1.0, 1.0)
        if self.steps is not None:
            check_int("steps", self.steps, 1, self.gen_length, " (at most gen_length)")
            if self.schedule == "naive" and self.steps % self.num_blocks:
                raise ValueError(
                    f"steps={self.steps!r}: schedule='naive' spreads steps evenly over its "
                    f"{self.num_blocks} blocks; expected a multiple of {self.num_blocks}"
                )

    @property
    def num_blocks(self) -> int:
        """Naive blocks in the response; the last may be shorter."""
        return -(-self.gen_length // self.block_length)

    @property
    def rule(self) -> str:
        """The selection rule in force: a key of `dsb_kernels.commit.RULES`."""
        for name in ("factor", "frechet"):
            if getattr(self, name) is not None:
                return name
        return "quota" if self.steps is not None else "threshold"

    @property
    def rule_value(self) -> float:
        """The rule's number (0 for a quota, which counts in `steps`)."""
        return 0.0 if self.rule == "quota" else float(getattr(self, self.rule))

    @property
    def full_every(self) -> int:
        """Of how many refreshes one is full; the first always is."""
        if self.refresh_policy == "full":
            return 1
        return self.full_refresh_every or DEFAULT_FULL_EVERY
