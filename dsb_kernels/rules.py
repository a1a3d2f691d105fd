"""Selection rules: which of a row's candidates a step commits (plain PyTorch; the kernel's are in
`unmask_kernel.py`). B = batch rows, K = candidates of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsb_kernels.rows import UnmaskSpec

# A rule takes confidences sorted descending (B, K) float64 with -inf past the last candidate, their
# ranks 1..K, the number of candidates (B,), the rule's value, and the tokens due by the quota (B,).


def count_threshold(c: Tensor, rank: Tensor, m: Tensor, value: float, due: Tensor) -> Tensor:
    """Every confidence of at least `value`."""
    return (c >= value).sum(-1)


def count_quota(c: Tensor, rank: Tensor, m: Tensor, value: float, due: Tensor) -> Tensor:
    """A number fixed up front."""
    return due


def count_factor(c: Tensor, rank: Tensor, m: Tensor, value: float, due: Tensor) -> Tensor:
    """The ranks before the first c_(j) < 1 - value / (j + 1); all if none or the last fails."""
    bound = torch.where(rank == 1, -1.0, 1.0 - value / (rank + 1).double())
    fails = (c < bound) & (rank <= m[:, None])
    first = torch.where(fails, rank, c.shape[-1] + 1).amin(-1)
    return torch.where(first >= m, m, first - 1)


def count_frechet(c: Tensor, rank: Tensor, m: Tensor, value: float, due: Tensor) -> Tensor:
    """The ranks with sum_{j<=n} c_(j) - (n - 1) - (1 - c_(n)) > value (arXiv 2606.02955)."""
    bound = c.cumsum(-1) - (rank - 1) - (1.0 - c)
    return ((bound > value) & (rank <= m[:, None])).sum(-1)


RULES: dict[str, Callable[[Tensor, Tensor, Tensor, float, Tensor], Tensor]] = {
    "threshold": count_threshold,
    "quota": count_quota,
    "factor": count_factor,
    "frechet": count_frechet,
}


def select(confidence: Tensor, valid: Tensor, due: Tensor, spec: UnmaskSpec) -> Tensor:
    """Which candidates the rule commits: (B, K) bool. Ties go to the lower position."""
    c = torch.where(valid, confidence.double(), -torch.inf)
    c, order = c.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(1, c.shape[-1] + 1, device=c.device)
    m = valid.sum(-1)
    count = RULES[spec.rule](c, rank, m, spec.rule_value, due).clamp(min=1).minimum(m)
    chosen = rank <= count[:, None]
    return torch.zeros_like(chosen).scatter(1, order, chosen) & valid
