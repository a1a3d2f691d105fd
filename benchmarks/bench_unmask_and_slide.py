"""unmask_and_slide against its definition: the last launch of a step.

The op changes its state in place and would soon have nothing left to unmask, so that canvas and
state are restored between the calls that are timed.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.ops import Case, Shape, device, on_gpu, over, run
from dsb_kernels.commit import initial_rows, unmask_and_slide
from dsb_kernels.rows import UnmaskSpec

RULES = {"threshold": 0.9, "factor": 1.0, "frechet": 0.25}


def shape(rule: str, batch: int, prompt: int, response: int) -> Shape:
    return {"rule": rule, "batch": batch, "prompt": prompt, "response": response}


SHAPES: list[Shape]
if on_gpu():
    SHAPES = [shape(rule, B, 1024, 256) for B in (1, 8, 64) for rule in RULES]
    SHAPES += [shape("threshold", 1, 1024, 4096)]
else:
    SHAPES = [shape(rule, 2, 16, 64) for rule in RULES]


def case(rule: str, batch: int, prompt: int, response: int) -> Case:
    """The first step of a response."""
    torch.manual_seed(0)
    spec = UnmaskSpec(
        prompt_length=prompt, block_length=32, max_block_length=32, schedule="dsb", cache="dsb",
        prefix_window=24, min_prefix=0, rule=rule, rule_value=RULES[rule], steps=0,
        refresh_commit="select", mask_id=126336, eos_ids=(126081,), stop_at_eos=True,
    )  # fmt: skip
    canvas = torch.randint(0, 1000, (batch, prompt + response), device=device())
    canvas[:, prompt:] = spec.mask_id
    leftpad = torch.zeros(batch, dtype=torch.int32, device=device())
    table, position = initial_rows(canvas, leftpad, spec)
    token = torch.randint(0, 1000, position.shape, device=device())
    confidence = 1 - 0.3 * torch.rand(position.shape, device=device()) ** 2
    commit = torch.zeros_like(position, dtype=torch.bool)
    written = (canvas, table, position, commit, torch.zeros_like(confidence))
    active = torch.ones(batch, dtype=torch.bool, device=device())
    # The response's canvas once; of 32 candidates positions, tokens, confidences and commits.
    moved = batch * (8 * response + 32 * (4 + 8 + 4 + 1 + 4))
    args = (*written, token, confidence, active, None, spec)
    return Case(unmask_and_slide, args, written=written, bytes=moved)


@over(SHAPES)
def test_unmask_and_slide(benchmark: Any, shape: Shape, contender: str) -> None:
    run(benchmark, case, shape, contender)
