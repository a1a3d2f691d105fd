"""token_confidence against what published decoding loops do ("float64"): a softmax over the
vocabulary in float64, argmax, gather."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

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
from dsb_kernels.token_confidence import token_confidence

VOCABULARIES = (126464, 155136, 152064)  # LLaDA-8B, iLLaDA-8B, Dream-7B


def shape(
    candidates: int, V: int, confidence: str = "probability", temperature: float = 0
) -> Shape:
    return {"candidates": candidates, "V": V, "confidence": confidence, "temperature": temperature}


SHAPES: list[Shape]
if on_gpu():
    SHAPES = [shape(n, V) for n in (1024, 64, 32, 256) for V in VOCABULARIES]
    SHAPES += [shape(4096, 126464), *(shape(64, 126464, c) for c in ("margin", "entropy"))]
    SHAPES += [shape(n, 126464, temperature=1.0) for n in (64, 1024)]
else:
    SHAPES = [shape(8, 3000), shape(8, 3000, "margin"), shape(8, 3000, temperature=1.0)]


def case(candidates: int, V: int, confidence: str, temperature: float) -> Case:
    torch.manual_seed(0)
    logits, banned = 3 * randn(candidates, V), (V - 128,)
    options: dict[str, Any] = {"banned": banned, "confidence": confidence}
    if temperature > 0:
        options |= {
            "temperature": temperature, "seed": torch.tensor(1, device=logits.device),
            "noise_ids": torch.arange(candidates, device=logits.device),
        }  # fmt: skip

    def float64() -> tuple[Tensor, Tensor]:
        p = logits.double().softmax(-1)
        scores = p.clone()
        scores[:, banned[0]] = -1.0
        token = scores.argmax(-1)
        return token, p.gather(-1, token[:, None])[:, 0]

    def error(result: tuple[Tensor, Tensor]) -> float:
        """Equal scores may be ordered otherwise where the arithmetic is another one."""
        token, value = token_confidence.definition(logits, **options)
        _, exact = token_confidence.definition(logits.double(), **options)
        same = result[0] == token
        if same.double().mean() < 0.95:
            return math.inf
        allowed = allowed_error(value[same], exact[same])
        return relative_error(result[1][same], exact[same]) / allowed

    plain = confidence == "probability" and temperature == 0
    return Case(
        token_confidence, (logits,), options, {"float64": float64} if plain else {},
        bytes=candidates * (V * dtype().itemsize + 12), error=error,
    )  # fmt: skip


@over(SHAPES, ["float64"])
def test_token_confidence(benchmark: Any, shape: Shape, contender: str) -> None:
    run(benchmark, case, shape, contender)
