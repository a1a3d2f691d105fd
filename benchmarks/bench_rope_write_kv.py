"""rope_write_kv against its definition, eager and compiled.

    python -m pytest benchmarks/bench_rope_write_kv.py

Results are compared with the definition's before they are timed. On a GPU `extra_info` holds
microseconds with a cold and a warm L2 and the share of the copy bandwidth; on a CPU the shapes are
small, and "op" (the public function) runs the definition.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Call, Make, compiled, device, low_precision, on_gpu, run
from dsb_kernels.rope_kv import rope_write_kv, rope_write_kv_definition

MODELS = {"LLaDA-8B": (32, 32), "iLLaDA-8B": (32, 8), "Dream-7B": (28, 4)}  # heads, KV heads
if on_gpu():
    # The cache's length changes nothing; a short one leaves room for many of them.
    SHAPES = [(m, B, W, 1024) for m in MODELS for B in (1, 8) for W in (32, 64, 128, 256)]
else:
    SHAPES = [("LLaDA-8B", 1, 8, 64), ("Dream-7B", 2, 8, 64)]


def problem(model: str, B: int, W: int, C: int) -> tuple[list[Tensor], list[Tensor | None]]:
    """q, k, v, cos_sin_cache, k_cache, v_cache as a model strides them; then the row metadata."""
    torch.manual_seed(0)
    heads, kv_heads = MODELS[model]

    def random(n: int, rows: int) -> Tensor:
        x = torch.randn(B, rows, n, 128, device=device(), dtype=low_precision())
        return x.transpose(1, 2)

    q, k, v = random(heads, W), random(kv_heads, W), random(kv_heads, W)
    caches = (random(kv_heads, C).contiguous(), random(kv_heads, C).contiguous())
    table = torch.randn(C, 128, device=device())
    start = torch.full((B,), (C - W) // 2, dtype=torch.int32, device=device())
    metadata = [start, torch.full_like(start, W), torch.zeros_like(start), None]
    return [q, k, v, table, *caches], metadata


def call_of(contender: str) -> Callable[..., Tensor]:
    if contender == "definition compiled":
        return compiled(rope_write_kv_definition)
    if contender == "definition":
        return rope_write_kv_definition

    def op(*arguments: Tensor) -> Tensor:
        start, length, offset = arguments[6:9]
        return rope_write_kv(
            *arguments[:6], window_start=start, window_length=length, position_offset=offset
        )

    return op


Shape = tuple[str, int, int, int]  # model, batch, window rows, cache positions


def maker(shape: Shape, call: Callable[..., Tensor]) -> Make:
    def make() -> Call:
        tensors, metadata = problem(*shape)
        return Call(lambda: call(*tensors, *metadata, True))

    return make


def bytes_needed(shape: Shape) -> int:
    """Queries, keys and values, read and written."""
    (heads, kv_heads), (_, B, W, _) = MODELS[shape[0]], shape
    return 2 * B * W * (heads + 2 * kv_heads) * 128 * low_precision().itemsize


@pytest.mark.parametrize("contender", ["op", "definition", "definition compiled"])
@pytest.mark.parametrize(("model", "B", "W", "C"), SHAPES)
def test_rope_write_kv(benchmark, model: str, B: int, W: int, C: int, contender: str) -> None:
    tensors, metadata = problem(model, B, W, C)
    call = call_of(contender)
    expected = [t.clone() for t in tensors]
    q = rope_write_kv_definition(*expected, *metadata, True)
    tolerance = 2e-2 if on_gpu() else 1e-5
    found = call(*tensors, *metadata, True)
    for result, exact in zip((found, *tensors[4:]), (q, *expected[4:]), strict=True):
        torch.testing.assert_close(result, exact, rtol=tolerance, atol=tolerance)
    benchmark.group = f"{model} B={B} W={W}"
    shape = (model, B, W, C)
    run(benchmark, maker(shape, call), bytes_needed=bytes_needed(shape))
