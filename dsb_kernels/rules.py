"""Selection rules: which of a row's candidates a step commits.

A rule is one `Rule` here and one branch of `_commit_count` in the kernel of `unmask_and_slide`;
settings, command line and integrations are derived from `RULES`.

B = batch rows, K = candidates of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """A selection rule and the setting of `DecodingConfig` that turns it on.

    `count(c, rank, m, value, due)` returns (B,) int64: how many of its best candidates each row
    commits. `select` then raises it to 1 and lowers it to `m`. The arguments are:
        c: (B, K) float64, the confidences in descending order, -inf past the last candidate.
        rank: (K,) int64, the numbers 1 to K.
        m: (B,) int64, how many candidates each row has.
        value: the value of the setting, 0.0 where `kind` is int; (B, 1) where it differs by row.
        due: (B,) int64, how many tokens the plan of a quota asks for in this step.
    """

    name: str
    setting: str  # the field of DecodingConfig
    help: str  # what the setting does, a phrase for the command line and the docs
    count: Callable[[Tensor, Tensor, Tensor, Any, Tensor], Tensor]
    low: float
    high: float | None  # None stands for gen_length
    open_low: bool = False  # whether `low` itself is refused
    kind: type[int] | type[float] = float  # int where the setting is a number of steps
    default: float | None = None  # only one rule has a default: it decides where none is named
    confidences: tuple[str, ...] = ("probability", "margin")  # what may rank, by default the first


def count_threshold(
    c: Tensor, rank: Tensor, m: Tensor, value: float | Tensor, due: Tensor
) -> Tensor:
    return (c >= value).sum(-1)


def count_factor(c: Tensor, rank: Tensor, m: Tensor, value: float, due: Tensor) -> Tensor:
    """Fast-dLLM: a rank j > 1 fails if c_(j) < 1 - value / (j + 1). Count the ranks before the
    first that fails. Count all m where none fails, or where rank m is the first that does."""
    bound = torch.where(rank == 1, -1.0, 1.0 - value / (rank + 1).double())
    fails = (c < bound) & (rank <= m[:, None])
    first_failure = torch.where(fails, rank, c.shape[-1] + 1).amin(-1)
    return torch.where(first_failure >= m, m, first_failure - 1)


def count_frechet(c: Tensor, rank: Tensor, m: Tensor, value: float, due: Tensor) -> Tensor:
    """Count the ranks n with c_(1) + ... + c_(n) - (n - 1) - (1 - c_(n)) > value (2606.02955).

    For probabilities the left side never grows with n, so that these are the first ranks.
    """
    bound = c.cumsum(-1) - (rank - 1) - (1.0 - c)
    return ((bound > value) & (rank <= m[:, None])).sum(-1)


def count_entropy(c: Tensor, rank: Tensor, m: Tensor, value: float, due: Tensor) -> Tensor:
    """Count the entropies of at most `value` nats. A confidence is the negative entropy here."""
    return (c >= -value).sum(-1)


def count_eb(c: Tensor, rank: Tensor, m: Tensor, value: float, due: Tensor) -> Tensor:
    """Count the ranks before which the entropies sum to at most `value` nats (2505.24857)."""
    before = c.cumsum(-1) - c  # the negative sum
    return ((before >= -value) & (rank <= m[:, None])).sum(-1)


def count_quota(c: Tensor, rank: Tensor, m: Tensor, value: float, due: Tensor) -> Tensor:
    return due


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "threshold", "threshold", "commit every confidence of at least this",
            count_threshold, 0.0, 1.0, default=0.9,
        ),
        Rule(
            "factor", "factor", "Fast-dLLM's factor rule: commit more where many are confident",
            count_factor, 0.0, 1e6, open_low=True,
        ),
        Rule(
            "frechet", "frechet", "commit while the Fréchet bound of the joint probability exceeds "
            "this (arXiv 2606.02955)", count_frechet, -1.0, 1.0, confidences=("probability",),
        ),
        Rule(
            "entropy", "entropy", "commit every token whose entropy is at most this, in nats",
            count_entropy, 0.0, 1e6, confidences=("entropy",),
        ),
        Rule(
            "eb", "eb", "commit while the entropies of the better ones sum to at most this, in "
            "nats (arXiv 2505.24857)", count_eb, 0.0, 1e6, confidences=("entropy",),
        ),
        Rule(
            "quota", "steps", "decode in this many steps, fixed up front",
            count_quota, 1, None, kind=int, confidences=("probability", "margin", "entropy"),
        ),
    )
}  # fmt: skip


def select(
    confidence: Tensor, valid: Tensor, due: Tensor, rule: str, value: float | Tensor
) -> Tensor:
    """Which candidates the rule commits: (B, K) bool. Of equal confidences the one at the lower
    position ranks first.

    Args:
        confidence: (B, K), read where `valid`.
        valid: (B, K) bool, whether the candidate may be committed.
        due: (B,) int64, how many tokens the plan of a quota asks for.
    """
    c = torch.where(valid, confidence.double(), -torch.inf)
    c, order = c.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(1, c.shape[-1] + 1, device=c.device)
    m = valid.sum(-1)
    count = RULES[rule].count(c, rank, m, value, due).clamp(min=1).minimum(m)
    chosen = rank <= count[:, None]
    return torch.zeros_like(chosen).scatter(1, order, chosen) & valid
