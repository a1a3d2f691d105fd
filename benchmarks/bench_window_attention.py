"""window_attention against SDPA, FlexAttention and flash-attn.

The window's keys and values are in the cache already, every stored position is visible and the
cache is full, so that every contender computes the same thing from the same tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.ops import Case, Shape, compiled, device, dtype, on_gpu, over, randn, run
from dsb_kernels.attention import window_attention

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None

MODELS = {"LLaDA-8B": (32, 32), "iLLaDA-8B": (32, 8), "Dream-7B": (28, 4)}  # heads, KV heads
D = 128


def shape(model: str, batch: int, width: int, positions: int) -> Shape:
    return {"model": model, "batch": batch, "width": width, "positions": positions}


SHAPES: list[Shape]
if on_gpu():
    SHAPES = [shape("LLaDA-8B", 1, W, C) for C in (4096, 16384) for W in (64, 128, 32)]
    SHAPES += [shape("Dream-7B", 1, W, C) for C in (16384, 4096) for W in (128, 64, 32)]
    SHAPES += [shape("iLLaDA-8B", 1, W, C) for C in (4096, 16384) for W in (64, 128, 32)]
    SHAPES += [shape(m, 1, 64, 1024) for m in MODELS] + [shape(m, 8, 64, 4096) for m in MODELS]
    SHAPES += [shape(m, 1, 256, C) for m in MODELS for C in (1024, 4096, 16384)]
    SHAPES += [shape(m, 64, 64, 4096) for m in MODELS if m != "LLaDA-8B"]
else:
    SHAPES = [shape("LLaDA-8B", 1, 8, 96), shape("Dream-7B", 2, 8, 96)]


def case(model: str, batch: int, width: int, positions: int) -> Case:
    torch.manual_seed(0)
    H, H_kv = MODELS[model]
    q = randn(batch, H, width, D)
    k, v = randn(batch, H_kv, positions, D), randn(batch, H_kv, positions, D)

    def each(value: int) -> Tensor:
        return torch.full((batch,), value, dtype=torch.int32, device=device())

    def flash() -> Tensor:
        by_position = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_with_kvcache(*by_position, cache_seqlens=seqlens).transpose(1, 2)

    flex, seqlens = compiled(flex_attention, q.shape, k.shape), each(positions)
    others = {
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "flex": lambda: flex(q, k, v, enable_gqa=True),
    }
    if flash_attn_with_kvcache is not None and on_gpu():
        others["flash"] = flash
    options = {
        "window_start": each((positions - width) // 2), "window_length": each(width),
        "cache_seqlens": seqlens,
    }  # fmt: skip
    return Case(
        window_attention, (q, None, None, k, v), options, others,
        bytes=2 * batch * (H * width + H_kv * positions) * D * dtype().itemsize,
        flops=4 * batch * H * width * positions * D,
    )  # fmt: skip


@over(SHAPES, ["sdpa", "flex", "flash"])
def test_window_attention(benchmark: Any, shape: Shape, contender: str) -> None:
    run(benchmark, case, shape, contender)
