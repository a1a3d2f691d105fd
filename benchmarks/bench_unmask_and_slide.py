"""unmask_and_slide against its definition, eager and compiled.

    python -m pytest benchmarks/bench_unmask_and_slide.py

The op changes its state in place and would soon have nothing left to unmask: canvas and state are
restored between the calls that are timed (`measure.py`). Results are compared with the definition's
before they are timed. "op" is the public function, which runs the definition on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Call, Make, compiled, device, on_gpu, run
from dsb_kernels.commit import (
    UnmaskSpec,
    WindowState,
    initial_state,
    unmask_and_slide,
    unmask_and_slide_definition,
)

MASK, EOS = 126336, (126081,)
RULES = {"threshold": 0.9, "factor": 1.0, "frechet": 0.25}
if on_gpu():
    SHAPES = [(rule, B, 1024, 256) for rule in RULES for B in (1, 8, 64)]
    SHAPES += [("threshold", 1, 1024, 4096)]
else:
    SHAPES = [(rule, 2, 16, 64) for rule in RULES]


class Step:
    """The first step of a response."""

    def __init__(self, rule: str, B: int, prompt: int, response: int) -> None:
        torch.manual_seed(0)
        self.spec = UnmaskSpec(
            prompt, 32, 32, "dsb", "dsb", 24, 0, rule, RULES[rule], 0, "select", MASK, EOS, True
        )  # fmt: skip
        canvas = torch.randint(0, 1000, (B, prompt + response), device=device())
        canvas[:, prompt:] = MASK
        self.leftpad = torch.zeros(B, dtype=torch.int32, device=device())
        state = initial_state(canvas, self.leftpad, self.spec)
        shape = state.position.shape
        self.token = torch.randint(0, 1000, shape, device=device())
        self.confidence = 1 - 0.3 * torch.rand(shape, device=device()) ** 2
        self.active = torch.ones(B, dtype=torch.bool, device=device())
        self.canvas, self.state = canvas, state
        self.before = self.tensors(copy.deepcopy(canvas), copy.deepcopy(state))

    @staticmethod
    def tensors(canvas: Tensor, state: WindowState) -> list[Tensor]:
        return [canvas, *(getattr(state, f.name) for f in fields(WindowState))]

    def restore(self) -> None:
        for tensor, before in zip(self.tensors(self.canvas, self.state), self.before, strict=True):
            tensor.copy_(before)

    def call(self, fn: Callable[..., Tensor]) -> Tensor:
        return fn(
            self.canvas, self.token, self.confidence, self.state, self.active, self.leftpad,
            self.spec,
        )  # fmt: skip


def contender_of(name: str) -> Callable[..., Tensor]:
    if name == "definition compiled":
        return compiled(unmask_and_slide_definition)
    return {"op": unmask_and_slide, "definition": unmask_and_slide_definition}[name]


Shape = tuple[str, int, int, int]  # rule, batch, prompt, response


def maker(shape: Shape, fn: Callable[..., Tensor]) -> Make:
    def make() -> Call:
        step = Step(*shape)
        return Call(lambda: step.call(fn), step.restore)

    return make


def bytes_needed(shape: Shape) -> int:
    """The response's canvas once; of 32 candidates positions, tokens, confidences and commits."""
    _, B, _, response = shape
    return B * (8 * response + 32 * (4 + 8 + 4 + 1 + 4))


@pytest.mark.parametrize("contender", ["op", "definition", "definition compiled"])
@pytest.mark.parametrize(("rule", "B", "prompt", "response"), SHAPES)
def test_unmask(benchmark, rule: str, B: int, prompt: int, response: int, contender: str) -> None:
    shape = (rule, B, prompt, response)
    step, fn = Step(*shape), contender_of(contender)
    commit = step.call(unmask_and_slide_definition)
    expected = [t.clone() for t in (commit, *step.tensors(step.canvas, step.state))]
    step.restore()
    found = (step.call(fn), *step.tensors(step.canvas, step.state))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    benchmark.group = f"{rule} B={B} G={response}"
    run(benchmark, maker(shape, fn), bytes_needed=bytes_needed(shape))
