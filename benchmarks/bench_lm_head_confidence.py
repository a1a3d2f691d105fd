"""lm_head_confidence against the LM head's matmul followed by scoring, eager and compiled.

    python -m pytest benchmarks/bench_lm_head_confidence.py

"op" is the public function: the Triton kernel on a GPU, the definition on a CPU. "matmul + op" is
`F.linear` (cuBLAS) with `token_confidence`, "matmul" the product alone, "definition compiled"
`torch.compile` of the definition. Results are compared with the definition's in float32 before
they are timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.measure import Call, Make, compiled, device, low_precision, on_gpu, run
from dsb_kernels.lm_head import lm_head_confidence, lm_head_confidence_reference
from dsb_kernels.token_confidence import token_confidence

if on_gpu():
    HEADS = {"LLaDA-8B": (126464, 4096), "iLLaDA-8B": (155136, 4096), "Dream-7B": (152064, 3584)}
    SHAPES = [(name, rows) for name in HEADS for rows in (16, 32, 64, 96, 128, 256)]
else:
    HEADS = {"small": (2000, 64)}
    SHAPES = [("small", rows) for rows in (4, 32)]

Scored = tuple[Tensor, Tensor]


class Head:
    """A head's weight and the hidden states of a step."""

    def __init__(self, name: str, rows: int) -> None:
        torch.manual_seed(0)
        (V, E), dtype = HEADS[name], low_precision()
        self.weight = torch.randn(V, E, device=device(), dtype=dtype)
        self.hidden = (3 / E**0.5 * torch.randn(rows, E, device=device())).to(dtype)
        self.banned = (V - 128,)

    def op(self) -> Scored:
        return lm_head_confidence(self.hidden, self.weight, banned=self.banned)

    def matmul(self) -> Tensor:
        return linear(self.hidden, self.weight)

    def matmul_op(self) -> Scored:
        return token_confidence(self.matmul(), banned=self.banned)

    def definition(
        self, scoring: Callable[..., Scored] = lm_head_confidence_reference, *, wide: bool = False
    ) -> Scored:
        hidden, weight = self.hidden, self.weight
        if wide:
            hidden, weight = hidden.float(), weight.float()
        return scoring(hidden, weight, banned=self.banned)


METHODS = {"op": "op", "matmul + op": "matmul_op", "matmul": "matmul", "definition": "definition"}


def maker(name: str, rows: int, contender: str) -> Make:
    if contender == "definition compiled":
        scoring = compiled(lm_head_confidence_reference)
        return lambda: Call(functools.partial(Head(name, rows).definition, scoring))
    return lambda: Call(getattr(Head(name, rows), METHODS[contender]))


def needs(name: str, rows: int) -> dict[str, int]:
    (V, E), size = HEADS[name], low_precision().itemsize
    return {"bytes_needed": (V + rows) * E * size + 12 * rows, "flops": 2 * V * E * rows}


@pytest.mark.parametrize("contender", ["op", "matmul + op", "definition", "definition compiled"])
@pytest.mark.parametrize(("name", "rows"), SHAPES)
def test_score(benchmark, name: str, rows: int, contender: str) -> None:
    make = maker(name, rows, contender)
    (expected, reference), (token, c) = Head(name, rows).definition(wide=True), make().run()
    same = token == expected
    # bfloat16 logits of the contenders may tie where float32 ones do not.
    assert same.float().mean() >= (0.9 if on_gpu() else 1.0)
    torch.testing.assert_close(c[same].float(), reference[same].float(), rtol=0.05, atol=1e-3)
    benchmark.group = f"{name} {rows} rows"
    run(benchmark, make, **needs(name, rows))


@pytest.mark.parametrize(("name", "rows"), SHAPES)
def test_matmul_alone(benchmark, name: str, rows: int) -> None:
    benchmark.group = f"{name} {rows} rows"
    run(benchmark, maker(name, rows, "matmul"), **needs(name, rows))
