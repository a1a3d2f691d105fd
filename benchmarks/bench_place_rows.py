"""place_rows against its definition: the first launch of a step."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.ops import Case, Shape, device, on_gpu, over, run
from dsb_kernels.commit import initial_rows
from dsb_kernels.place import place_rows
from dsb_kernels.rows import Column, StepKind, UnmaskSpec

BLOCK, PREFIX = 32, 8


def shape(kind: str, batch: int, num_rows: int, prompt: int, response: int) -> Shape:
    return {"kind": kind, "batch": batch, "num_rows": num_rows, "prompt": prompt,
            "response": response}  # fmt: skip


SHAPES: list[Shape]
if on_gpu():
    SHAPES = [shape(kind, B, B, 1024, 256) for kind in ("window", "refresh") for B in (1, 8, 64)]
    SHAPES += [shape("window", 64, 16, 1024, 256), shape("refresh", 1, 1, 16128, 256)]
else:
    SHAPES = [shape("window", n, 2, 16, 64) for n in (2, 4)] + [shape("refresh", 2, 1, 16, 64)]


def case(kind: str, batch: int, num_rows: int, prompt: int, response: int) -> Case:
    """A step that every batch row needs, or half of them where its capacity is smaller."""
    torch.manual_seed(0)
    spec = UnmaskSpec(
        prompt_length=prompt, block_length=BLOCK, max_block_length=BLOCK, schedule="dsb",
        cache="dsb", prefix_window=24, min_prefix=0, rule="threshold", rule_value=0.9, steps=0,
        refresh_commit="select", mask_id=126336, eos_ids=(), stop_at_eos=False,
    )  # fmt: skip
    canvas = torch.randint(0, 1000, (batch, prompt + response), device=device())
    canvas[:, prompt:] = spec.mask_id
    leftpad = torch.randint(0, prompt, (batch,), device=device()).int()
    table, position = initial_rows(canvas, leftpad, spec)
    needed = StepKind[kind.upper()]
    other = StepKind.REFRESH if needed == StepKind.WINDOW else StepKind.WINDOW
    table[:, Column.PREFIX] = PREFIX
    table[:, Column.FORWARDS].random_(0, 100)
    table[:, Column.NEXT_KIND] = int(needed)
    if num_rows < batch:
        table[torch.randperm(batch, device=device())[: batch // 2], Column.NEXT_KIND] = int(other)
    width = BLOCK + PREFIX if kind == "window" else prompt + response
    options = {
        "kind": int(needed), "num_rows": num_rows, "width": width, "num_candidates": BLOCK,
        "prompt_length": prompt,
    }  # fmt: skip
    # Tokens in and out; a candidate's position in; its index, its noise id and a flag out.
    moved = num_rows * (2 * 8 * width + BLOCK * (4 + 2 * 8 + 1))
    return Case(place_rows, (canvas, table, position), options, bytes=moved)


@over(SHAPES)
def test_place_rows(benchmark: Any, shape: Shape, contender: str) -> None:
    run(benchmark, case, shape, contender)
