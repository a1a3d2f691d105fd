"""linear_add_norm against cuBLAS with the residual in the product and F.rms_norm, and compiled.

    python -m pytest benchmarks/bench_linear_add_norm.py

"op" is the public function: the Triton kernels on a GPU, the definition on a CPU. Results are
compared with the definition's in float32 before they are timed; the residual, which a call changes,
is restored before each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Call, Make, compiled, device, low_precision, on_gpu, run
from dsb_kernels.linear_add_norm import linear_add_norm, linear_add_norm_definition

EPS = 1e-5
# output features, input features
if on_gpu():
    LAYERS = {
        "LLaDA-8B out": (4096, 4096),
        "LLaDA-8B down": (4096, 12288),
        "Dream-7B out": (3584, 3584),
        "Dream-7B down": (3584, 18944),
    }
    SHAPES = [(name, rows) for name in LAYERS for rows in (16, 32, 56, 64, 128)]
else:
    LAYERS = {"small out": (64, 96)}
    SHAPES = [("small out", rows) for rows in (4, 32)]


class Layer:
    """A layer's weights, the rows of a step and their residual."""

    def __init__(self, name: str, rows: int) -> None:
        torch.manual_seed(0)
        (E, F), made = LAYERS[name], {"device": device(), "dtype": low_precision()}
        self.weight = torch.randn(E, F, **made) / F**0.5
        self.norm_weight = torch.rand(E, **made)
        self.x, self.residual = torch.randn(rows, F, **made), torch.randn(rows, E, **made)
        self.before = self.residual.clone()

    def restore(self) -> None:
        self.residual.copy_(self.before)

    def op(self) -> Tensor:
        return linear_add_norm(self.x, self.weight, self.residual, self.norm_weight, EPS)

    def definition(
        self, of: Callable[..., Tensor] = linear_add_norm_definition, *, wide: bool = False
    ) -> Tensor:
        given = (self.x, self.weight, self.residual, self.norm_weight)
        return of(*(t.float() for t in given) if wide else given, EPS)


def maker(name: str, rows: int, contender: str = "op") -> Make:
    of = compiled(linear_add_norm_definition) if contender == "definition compiled" else None

    def make() -> Call:
        layer = Layer(name, rows)
        if of is not None:
            return Call(functools.partial(layer.definition, of), layer.restore)
        return Call(getattr(layer, contender), layer.restore)

    return make


def needs(name: str, rows: int) -> dict[str, int]:
    """Weights, x, the residual in and out, and the norm."""
    (E, F), size = LAYERS[name], low_precision().itemsize
    return {"bytes_needed": (E * F + E + rows * (F + 3 * E)) * size, "flops": 2 * E * F * rows}


@pytest.mark.parametrize("contender", ["op", "definition", "definition compiled"])
@pytest.mark.parametrize(("name", "rows"), SHAPES)
def test_linear(benchmark, name: str, rows: int, contender: str) -> None:
    make, expected = maker(name, rows, contender), Layer(name, rows).definition(wide=True)
    torch.testing.assert_close(make().run().float(), expected, rtol=0.02, atol=0.02)
    benchmark.group = f"{name} {rows} rows"
    run(benchmark, make, **needs(name, rows))
