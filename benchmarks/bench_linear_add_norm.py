"""linear_add_norm against its definition: cuBLAS with the residual in the product, F.rms_norm."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.ops import Case, Shape, dtype, on_gpu, over, randn, run
from dsb_kernels.linear import linear_add_norm

EPS = 1e-5
# output features, input features
LAYERS = {
    "LLaDA-8B out": (4096, 4096),
    "LLaDA-8B down": (4096, 12288),
    "Dream-7B out": (3584, 3584),
    "Dream-7B down": (3584, 18944),
    "small out": (64, 96),
}
SHAPES: list[Shape]
if on_gpu():
    layers = [name for name in LAYERS if name != "small out"]
    SHAPES = [{"layer": layer, "num_tokens": n} for n in (64, 32, 128, 16, 56) for layer in layers]
else:
    SHAPES = [{"layer": "small out", "num_tokens": n} for n in (4, 32)]


def case(layer: str, num_tokens: int) -> Case:
    torch.manual_seed(0)
    E, F = LAYERS[layer]
    x, weight, residual = randn(num_tokens, F), randn(E, F) / F**0.5, randn(num_tokens, E)
    gain = torch.rand(E, device=x.device, dtype=dtype())
    args = (x, weight, residual, gain, EPS)
    moved = E * F + E + num_tokens * (F + 3 * E)  # weights, gain, x; the residual twice; the norm
    return Case(
        linear_add_norm, args, {}, {"cuBLAS": lambda: linear_add_norm.definition(*args)},
        written=(residual,), bytes=moved * dtype().itemsize, flops=2 * E * F * num_tokens,
    )  # fmt: skip


@over(SHAPES, ["cuBLAS"])
def test_linear_add_norm(benchmark: Any, shape: Shape, contender: str) -> None:
    run(benchmark, case, shape, contender)
