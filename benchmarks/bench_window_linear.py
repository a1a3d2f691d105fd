"""window_linear against cuBLAS, with SiLU * mul as a call of its own where the layer is gated.

"matmul" is what steps of more tokens run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from benchmarks.ops import Case, Shape, dtype, on_gpu, over, randn, run
from dsb_kernels.linear import window_linear

# output features, input features, bias, gated
LAYERS = {
    "LLaDA-8B qkv": (12288, 4096, False, False),
    "iLLaDA-8B qkv": (6144, 4096, False, False),
    "Dream-7B qkv": (4608, 3584, True, False),
    "LLaDA-8B gate/up": (12288, 4096, False, True),
    "Dream-7B gate/up": (18944, 3584, False, True),
    "small": (96, 64, True, False),
    "small gated": (96, 64, False, True),
}
SHAPES: list[Shape]
if on_gpu():
    tokens = (64, 32, 128, 16, 56)
    layers = [name for name in LAYERS if not name.startswith("small")]
    SHAPES = [{"layer": layer, "num_tokens": n} for n in tokens for layer in layers]
else:
    SHAPES = [{"layer": layer, "num_tokens": n} for n in (4, 32) for layer in LAYERS
              if layer.startswith("small")]  # fmt: skip


def case(layer: str, num_tokens: int) -> Case:
    torch.manual_seed(0)
    F, E, has_bias, gated = LAYERS[layer]
    weights = F * (2 if gated else 1)
    x, weight = randn(num_tokens, E), randn(weights, E) / E**0.5
    bias = randn(weights) if has_bias else None

    def matmul() -> Tensor:
        y = linear(x, weight, bias)
        if not gated:
            return y
        gate, up = y.chunk(2, -1)
        return silu(gate) * up

    moved = weights * E + weights * has_bias + num_tokens * (E + F)
    return Case(
        window_linear, (x, weight, bias), {"gated": gated}, {"matmul": matmul},
        bytes=moved * dtype().itemsize, flops=2 * weights * E * num_tokens,
    )  # fmt: skip


@over(SHAPES, ["matmul"])
def test_window_linear(benchmark: Any, shape: Shape, contender: str) -> None:
    run(benchmark, case, shape, contender)
