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

from benchmarks.measure import device, on_gpu, run
from dsb_kernels import place_rows as module
from dsb_kernels.place_rows import PlacedRows, place_rows
from dsb_kernels.unmask import initial_state
from dsb_kernels.window_state import REFRESH, WINDOW, UnmaskSpec

KINDS = {"window": WINDOW, "refresh": REFRESH}
# kind, batch rows, rows of the step, prompt, response
if on_gpu():
    SHAPES = [(kind, B, B, 1024, 256) for kind in KINDS for B in (1, 8, 64)]
    SHAPES += [("window", 64, 16, 1024, 256), ("refresh", 1, 1, 16128, 256)]
else:
    SHAPES = [("window", 2, 2, 16, 64), ("window", 4, 2, 16, 64), ("refresh", 2, 1, 16, 64)]


def step_of(kind: str, B: int, rows: int, prompt: int, response: int) -> Callable[[], PlacedRows]:
    """A step of a batch half of whose rows, or all where there is room, need one of its kind."""
    torch.manual_seed(0)
    spec = UnmaskSpec(
        prompt, 32, 32, "dsb", "dsb", 24, 0, "threshold", 0.9, 0, "select", 126336, (), False
    )
    canvas = torch.randint(0, 1000, (B, prompt + response), device=device())
    canvas[:, prompt:] = spec.mask_id
    leftpad = torch.randint(0, prompt, (B,), device=device()).int()
    state = initial_state(canvas, leftpad, spec)
    state.prefix.fill_(8)
    state.forwards.random_(0, 100)
    other = REFRESH if kind == "window" else WINDOW
    state.needs.fill_(KINDS[kind])
    if rows < B:
        state.needs[torch.randperm(B)[: B // 2]] = other
    width = 40 if kind == "window" else canvas.shape[1]
    return lambda: place_rows(
        canvas, state, leftpad, kind=KINDS[kind], rows=rows, width=width, held=32,
        prompt_length=prompt,
    )  # fmt: skip


def contender_of(name: str, call: Callable[[], PlacedRows], patch: pytest.MonkeyPatch) -> Callable:
    """The call as it is, by its definition, or by that compiled."""
    if name == "op":
        return call
    definition: Callable[..., tuple[Tensor, ...]] = module.place_rows_definition
    if name == "definition compiled":
        torch._dynamo.reset()
        definition = torch.compile(definition, dynamic=False)
    patch.setattr(module, "takes_definition", lambda *tensors: True)
    patch.setattr(module, "place_rows_definition", definition)
    return call


@pytest.mark.parametrize("contender", ["op", "definition", "definition compiled"])
@pytest.mark.parametrize(("kind", "B", "rows", "prompt", "response"), SHAPES)
def test_place_rows(
    benchmark, monkeypatch, kind: str, B: int, rows: int, prompt: int, response: int, contender: str
) -> None:
    call = step_of(kind, B, rows, prompt, response)
    with monkeypatch.context() as patch:
        expected = contender_of("definition", call, patch)()
    found = (call := contender_of(contender, call, monkeypatch))()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    benchmark.group = f"{kind} {rows} of {B} rows, {prompt + response} positions"
    run(benchmark, call, bytes_needed=2 * found.ids.nbytes)
