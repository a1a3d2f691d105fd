"""rope_write_kv against its definition: the rotary embedding of a window and its write into the
cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import Case, Shape, device, dtype, on_gpu, over, randn, run
from dsb_kernels.rope_kv import rope_write_kv

MODELS = {"LLaDA-8B": (32, 32), "iLLaDA-8B": (32, 8), "Dream-7B": (28, 4)}  # heads, KV heads
D = 128


def shape(model: str, batch: int, width: int, positions: int) -> Shape:
    return {"model": model, "batch": batch, "width": width, "positions": positions}


SHAPES: list[Shape]
if on_gpu():
    # The cache's length changes nothing; a short one leaves memory for many of them.
    SHAPES = [shape(m, B, W, 1024) for B in (1, 8) for W in (64, 32, 128, 256) for m in MODELS]
else:
    SHAPES = [shape("LLaDA-8B", 1, 8, 64), shape("Dream-7B", 2, 8, 64)]


def case(model: str, batch: int, width: int, positions: int) -> Case:
    torch.manual_seed(0)
    H, H_kv = MODELS[model]

    def heads(count: int) -> Tensor:
        """As a model strides them: (batch, width, heads, D) in memory."""
        return randn(batch, width, count, D).transpose(1, 2)

    k_cache, v_cache = (randn(batch, H_kv, positions, D) for _ in range(2))
    table = torch.randn(positions, D, device=device())
    start = torch.full((batch,), (positions - width) // 2, dtype=torch.int32, device=device())
    options = {
        "window_start": start, "window_length": torch.full_like(start, width),
        "position_offset": torch.zeros_like(start),
    }  # fmt: skip
    return Case(
        rope_write_kv, (heads(H), heads(H_kv), heads(H_kv), table, k_cache, v_cache), options,
        written=(k_cache, v_cache),
        bytes=2 * batch * width * (H + 2 * H_kv) * D * dtype().itemsize,
    )  # fmt: skip


@over(SHAPES)
def test_rope_write_kv(benchmark: Any, shape: Shape, contender: str) -> None:
    run(benchmark, case, shape, contender)
