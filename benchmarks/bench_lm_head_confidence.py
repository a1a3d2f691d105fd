"""lm_head_confidence against the LM head's matmul followed by token_confidence ("matmul + op"), and
beside the matmul alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.ops import (
    Case,
    Shape,
    allowed_error,
    dtype,
    on_gpu,
    over,
    randn,
    relative_error,
    run,
)
from dsb_kernels.lm_head import lm_head_confidence
from dsb_kernels.token_confidence import token_confidence

HEADS = {
    "LLaDA-8B": (126464, 4096), "iLLaDA-8B": (155136, 4096), "Dream-7B": (152064, 3584),
    "small": (2000, 64),
}  # fmt: skip
SHAPES: list[Shape]
if on_gpu():
    models = [name for name in HEADS if name != "small"]
    SHAPES = [{"model": m, "candidates": n} for n in (64, 32, 128, 16, 96, 256) for m in models]
else:
    SHAPES = [{"model": "small", "candidates": n} for n in (4, 32)]
TIE = 1e-3  # logits this close may be ordered either way by another order of summation


def case(model: str, candidates: int) -> Case:
    torch.manual_seed(0)
    (V, E), size = HEADS[model], dtype().itemsize
    weight, hidden, banned = randn(V, E), 3 / E**0.5 * randn(candidates, E), (V - 128,)

    def error(result: tuple[Tensor, Tensor]) -> float:
        """Each token has the largest logit or one within rounding of it, and its probability."""
        token, confidence = result
        logits = hidden.double() @ weight.double().T
        # The kernel scores in float32; everything else rounds logits to their own precision.
        tie = max(TIE, 4 * torch.finfo(dtype()).eps * logits.abs().max().item())
        index = token.clamp(min=0)[:, None]
        allowed_logits = logits.clone()
        allowed_logits[:, banned[0]] = -math.inf
        short = allowed_logits.amax(-1) - logits.gather(-1, index)[:, 0]
        if (short > tie).any() or (token < 0).any() or (token == banned[0]).any():
            return math.inf
        exact = logits.softmax(-1).gather(-1, index)[:, 0]
        plain = linear(hidden, weight).float().softmax(-1).gather(-1, index)[:, 0]
        return relative_error(confidence, exact) / allowed_error(plain, exact)

    return Case(
        lm_head_confidence, (hidden, weight), {"banned": banned},
        {"matmul + op": lambda: token_confidence(linear(hidden, weight), banned=banned)},
        bytes=(V + candidates) * E * size + 12 * candidates, flops=2 * V * E * candidates,
        error=error,
    )  # fmt: skip


@over(SHAPES, ["matmul + op"])
def test_lm_head_confidence(benchmark: Any, shape: Shape, contender: str) -> None:
    run(benchmark, case, shape, contender)
