"""window_linear against cuBLAS, with SiLU * mul as a call of its own where gated, and compiled.

    python -m pytest benchmarks/bench_window_linear.py

"op" is the public function: the Triton kernel on a GPU, the definition on a CPU. "matmul" is what
steps of more rows run. Results are compared with the definition's in float32 before they are timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.measure import Call, Make, compiled, device, low_precision, on_gpu, run
from dsb_kernels.window_linear import window_linear, window_linear_reference
from dsb_runtime.engine.layers import activate

# output features, input features, bias, gated
if on_gpu():
    LAYERS = {
        "LLaDA-8B qkv": (12288, 4096, False, False),
        "iLLaDA-8B qkv": (6144, 4096, False, False),
        "Dream-7B qkv": (4608, 3584, True, False),
        "LLaDA-8B gate/up": (12288, 4096, False, True),
        "Dream-7B gate/up": (18944, 3584, False, True),
    }
    SHAPES = [(name, rows) for name in LAYERS for rows in (16, 32, 56, 64, 128)]
else:
    LAYERS = {"small": (96, 64, True, False), "small gated": (96, 64, False, True)}
    SHAPES = [(name, rows) for name in LAYERS for rows in (4, 32)]


class Layer:
    """A layer's weight and the rows of a step."""

    def __init__(self, name: str, rows: int) -> None:
        torch.manual_seed(0)
        F, E, bias, self.gated = LAYERS[name]
        F, made = F * (2 if self.gated else 1), {"device": device(), "dtype": low_precision()}
        self.weight = torch.randn(F, E, **made) / E**0.5
        self.bias = torch.randn(F, **made) if bias else None
        self.x = torch.randn(rows, E, **made)

    def op(self) -> Tensor:
        return window_linear(self.x, self.weight, self.bias, gated=self.gated)

    def matmul(self) -> Tensor:
        made = linear(self.x, self.weight, self.bias)
        return activate(made) if self.gated else made

    def definition(
        self, of: Callable[..., Tensor] = window_linear_reference, *, wide: bool = False
    ) -> Tensor:
        given = (self.x, self.weight, self.bias)
        if wide:
            given = tuple(None if t is None else t.float() for t in given)
        return of(*given, self.gated)


def maker(name: str, rows: int, contender: str = "op") -> Make:
    if contender == "definition compiled":
        of = compiled(window_linear_reference)
        return lambda: Call(functools.partial(Layer(name, rows).definition, of))
    return lambda: Call(getattr(Layer(name, rows), contender))


def needs(name: str, rows: int) -> dict[str, int]:
    F, E, bias, gated = LAYERS[name]
    weights, size = F * (2 if gated else 1), low_precision().itemsize
    moved = (weights * E + weights * bias + rows * (E + F)) * size
    return {"bytes_needed": moved, "flops": 2 * weights * E * rows}


@pytest.mark.parametrize("contender", ["op", "matmul", "definition", "definition compiled"])
@pytest.mark.parametrize(("name", "rows"), SHAPES)
def test_linear(benchmark, name: str, rows: int, contender: str) -> None:
    make, expected = maker(name, rows, contender), Layer(name, rows).definition(wide=True)
    torch.testing.assert_close(make().run().float(), expected, rtol=0.02, atol=0.02)
    benchmark.group = f"{name} {rows} rows"
    run(benchmark, make, **needs(name, rows))
