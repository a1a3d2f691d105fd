"""place_rows against its definition, eager and compiled.

    python -m pytest benchmarks/bench_place_rows.py

Results are compared with the definition's before they are timed. "op" is the public function, which
runs the definition on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Call, Make, compiled, device, on_gpu, run
from dsb_kernels.commit import initial_state
from dsb_kernels.place import place_rows, place_rows_definition
from dsb_kernels.rows import REFRESH, WINDOW, UnmaskSpec

KINDS = {"window": WINDOW, "refresh": REFRESH}
HELD = 32
Shape = tuple[str, int, int, int, int]  # kind, batch rows, rows of the step, prompt, response
SHAPES: list[Shape]
if on_gpu():
    SHAPES = [(kind, B, B, 1024, 256) for kind in KINDS for B in (1, 8, 64)]
    SHAPES += [("window", 64, 16, 1024, 256), ("refresh", 1, 1, 16128, 256)]
else:
    SHAPES = [("window", 2, 2, 16, 64), ("window", 4, 2, 16, 64), ("refresh", 2, 1, 16, 64)]


class Step:
    """A step that every row of a batch needs, or half of them where there is no room for all."""

    def __init__(self, kind: str, B: int, rows: int, prompt: int, response: int) -> None:
        self.spec = UnmaskSpec(
            prompt, HELD, HELD, "dsb", "dsb", 24, 0, "threshold", 0.9, 0, "select", 126336, (),
            False,
        )  # fmt: skip
        self.canvas = torch.randint(0, 1000, (B, prompt + response), device=device())
        self.canvas[:, prompt:] = self.spec.mask_id
        self.leftpad = torch.randint(0, prompt, (B,), device=device()).int()
        self.state = initial_state(self.canvas, self.leftpad, self.spec)
        self.state.prefix.fill_(8)
        self.state.forwards.random_(0, 100)
        needs = torch.full((B,), KINDS[kind], device=device())
        if rows < B:
            needs[torch.randperm(B, device=device())[: B // 2]] = 1 - KINDS[kind]
        self.state.needs.copy_(needs)
        width = HELD + 8 if kind == "window" else prompt + response
        self.room, self.kind = (rows, width, HELD), KINDS[kind]

    def op(self) -> tuple[Tensor, ...]:
        rows, width, held = self.room
        return place_rows(
            self.canvas, self.state, self.leftpad, kind=self.kind, rows=rows, width=width,
            held=held, prompt_length=self.spec.prompt_length,
        )  # fmt: skip

    def by(self, definition: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        state = self.state
        table, *rest = definition(
            self.canvas, state.start, state.end, state.prefix, state.position, state.needs,
            state.forwards, self.leftpad, self.kind, 0, list(self.room), 0,
            self.spec.prompt_length,
        )  # fmt: skip
        return (*table.unbind(), *rest)


def maker(shape: Shape, contender: str = "op") -> Make:
    definition = place_rows_definition
    if contender == "definition compiled":
        definition = compiled(definition)

    def make() -> Call:
        step = Step(*shape)
        return Call(step.op if contender == "op" else lambda: step.by(definition))

    return make


def bytes_needed(shape: Shape) -> int:
    """Tokens in and out; a candidate's position in; its row, its noise id and a flag out."""
    kind, _, rows, prompt, response = shape
    width = HELD + 8 if kind == "window" else prompt + response
    return rows * (2 * 8 * width + HELD * (4 + 2 * 8 + 1))


@pytest.mark.parametrize("contender", ["op", "definition", "definition compiled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_place_rows(benchmark, shape: Shape, contender: str) -> None:
    torch.manual_seed(0)
    expected = Step(*shape).by(place_rows_definition)
    torch.manual_seed(0)
    found = maker(shape, contender)().run()
    assert all(map(torch.equal, found, expected))
    kind, B, rows, prompt, response = shape
    benchmark.group = f"{kind} {rows} of {B} rows, {prompt + response} positions"
    run(benchmark, maker(shape, contender), bytes_needed=bytes_needed(shape))
