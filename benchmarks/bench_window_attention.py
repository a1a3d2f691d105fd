"""window_attention against its definition, SDPA, FlexAttention and flash-attn.

    python -m pytest benchmarks/bench_window_attention.py

The window's rows are in the cache already, every stored position is visible and all of the cache is
in use, so that every contender computes the same thing from the same tensors; each result is
compared with the definition's before it is timed. On a GPU `extra_info` holds microseconds with a
cold and a warm L2, the share of the copy bandwidth, and TFLOP/s; on a CPU the shapes are small, and
"op" (the public function) runs the definition.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import Call, Make, compiled, device, low_precision, on_gpu, run
from dsb_kernels.attention import window_attention, window_attention_definition

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None

MODELS = {"LLaDA-8B": (32, 32), "iLLaDA-8B": (32, 8), "Dream-7B": (28, 4)}  # heads, KV heads
if on_gpu():
    SHAPES = [(m, 1, W, C) for m in MODELS for C in (1024, 4096, 16384) for W in (32, 64, 128, 256)]
    SHAPES += [(m, B, 64, 4096) for m in MODELS for B in (8, 64) if (m, B) != ("LLaDA-8B", 64)]
else:
    SHAPES = [("LLaDA-8B", 1, 8, 96), ("Dream-7B", 2, 8, 96)]


@dataclass
class Problem:
    q: Tensor  # (B, H, W, D)
    k: Tensor  # (B, H_kv, C, D)
    v: Tensor
    start: Tensor
    length: Tensor
    seqlens: Tensor

    def definition(self) -> Tensor:
        rows = (self.start, self.length, self.seqlens)
        scale = 1 / math.sqrt(self.q.shape[-1])
        tensors = (self.q, None, None, self.k, self.v, *rows, None, None, None, None, 64, scale)
        return window_attention_definition(*tensors)[0]

    def op(self, num_splits: int | None = None) -> Tensor:
        return window_attention(
            self.q, None, None, self.k, self.v, num_splits=num_splits,
            window_start=self.start, window_length=self.length, cache_seqlens=self.seqlens,
        )  # fmt: skip

    def sdpa(self) -> Tensor:
        return scaled_dot_product_attention(self.q, self.k, self.v, enable_gqa=True)

    def flex(self, attention: Callable[..., Tensor]) -> Tensor:
        return attention(self.q, self.k, self.v, enable_gqa=True)

    def flash(self) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        return flash_attn_with_kvcache(q, k, v, cache_seqlens=self.seqlens).transpose(1, 2)


def problem(model: str, B: int, W: int, C: int) -> Problem:
    torch.manual_seed(0)
    heads, kv_heads = MODELS[model]

    def random(n: int, rows: int) -> Tensor:
        return torch.randn(B, n, rows, 128, device=device(), dtype=low_precision())

    def each(value: int) -> Tensor:
        return torch.full((B,), value, dtype=torch.int32, device=device())

    q, k, v = random(heads, W), random(kv_heads, C), random(kv_heads, C)
    return Problem(q, k, v, each((C - W) // 2), each(W), each(C))


Shape = tuple[str, int, int, int]  # model, batch, window rows, cache positions


def others() -> list[str]:
    """What the op is to be no slower than, as far as it is there."""
    return ["sdpa", "flex", *(["flash"] if flash_attn_with_kvcache is not None else [])]


def maker(shape: Shape, contender: str) -> Make:
    if contender == "definition compiled":
        definition = compiled(Problem.definition)
        return lambda: Call(functools.partial(definition, problem(*shape)))
    if contender == "flex":
        attention = compiled(flex_attention)
        return lambda: Call(functools.partial(problem(*shape).flex, attention))
    return lambda: Call(getattr(problem(*shape), contender))


def needs(shape: Shape) -> dict[str, int]:
    (heads, kv_heads), (_, B, W, C) = MODELS[shape[0]], shape
    rows, positions, size = B * heads * W, B * kv_heads * C, low_precision().itemsize
    return {"bytes_needed": 2 * (rows + positions) * 128 * size, "flops": 4 * rows * C * 128}


@pytest.mark.parametrize(
    "contender", ["op", "definition", "definition compiled", "sdpa", "flex", "flash"]
)
@pytest.mark.parametrize(("model", "B", "W", "C"), SHAPES)
def test_window_attention(benchmark, model: str, B: int, W: int, C: int, contender: str) -> None:
    if contender == "flash" and (flash_attn_with_kvcache is None or not on_gpu()):
        pytest.skip("flash-attn is not installed, or there is no GPU")
    shape = (model, B, W, C)
    make, tolerance = maker(shape, contender), 2e-2 if on_gpu() else 1e-5
    expected = problem(*shape).definition()
    torch.testing.assert_close(make().run(), expected, rtol=tolerance, atol=tolerance)
    benchmark.group = f"{model} B={B} W={W} C={C}"
    run(benchmark, make, **needs(shape))
