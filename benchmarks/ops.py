"""The benchmarks of single ops: their shapes, their contenders, and the command.

    python -m benchmarks.ops --op window_attention token_confidence --json ops.json
    python -m pytest benchmarks/ops.py -k window_attention

`BENCHMARKS` lists the shapes of each op, those of the targets first, and the function that makes a
`Case` of a shape, which `op_case.py` checks and times.

On a GPU the figures are microseconds with a cold and a warm L2, the share of the copy bandwidth
that the needed bytes amount to in the cold time, and TFLOP/s. On a CPU the shapes are small, "op"
runs the definition, and the figures only show that the benchmark works.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from benchmarks import describe_benchmark
from benchmarks.op_case import (
    DEFINITIONS,
    Case,
    allowed_error,
    check,
    compiled,
    device,
    dtype,
    on_gpu,
    randn,
    relative_error,
    time_contender,
)
from dsb_kernels.attention import window_attention
from dsb_kernels.commit import initial_rows, unmask_and_slide
from dsb_kernels.linear import linear_add_norm, window_linear
from dsb_kernels.lm_head import lm_head_confidence
from dsb_kernels.place import place_rows
from dsb_kernels.rope_kv import rope_write_kv
from dsb_kernels.rows import Column, StepKind, UnmaskSpec
from dsb_kernels.token_confidence import token_confidence
from dsb_runtime.cli.process import OneLineParser, run_process
from dsb_runtime.files import write_json
from dsb_runtime.measure.command import check_arguments
from dsb_runtime.measure.timing import capture_calls, timed

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None

Shape = dict[str, Any]
EPS = 1e-5
HEAD_DIM, BLOCK, PREFIX = 128, 32, 8
TIE = 1e-3  # logits this close may be ordered either way by another order of summation
RULES = {"threshold": 0.9, "factor": 1.0, "frechet": 0.25}
MODELS = {"LLaDA-8B": (32, 32), "iLLaDA-8B": (32, 8), "Dream-7B": (28, 4)}  # heads, KV heads
HEADS = {
    "LLaDA-8B": (126464, 4096), "iLLaDA-8B": (155136, 4096), "Dream-7B": (152064, 3584),
    "small": (2000, 64),
}  # fmt: skip
# output features, input features, bias, gated
LAYERS = {
    "LLaDA-8B qkv": (12288, 4096, False, False),
    "iLLaDA-8B qkv": (6144, 4096, False, False),
    "Dream-7B qkv": (4608, 3584, True, False),
    "LLaDA-8B gate/up": (12288, 4096, False, True),
    "Dream-7B gate/up": (18944, 3584, False, True),
    "small": (96, 64, True, False),
    "small gated": (96, 64, False, True),
}
# output features, input features of the layers that a residual and a norm follow
OUTPUTS = {
    "LLaDA-8B out": (4096, 4096),
    "LLaDA-8B down": (4096, 12288),
    "Dream-7B out": (3584, 3584),
    "Dream-7B down": (3584, 18944),
    "small out": (64, 96),
}


def token_confidence_case(candidates: int, V: int, confidence: str, temperature: float) -> Case:
    """The contender "float64" is what published decoding loops do: a softmax over the vocabulary in
    float64, argmax, gather."""
    logits, banned = 3 * randn(candidates, V), (V - 128,)
    options: dict[str, Any] = {"banned": banned, "confidence": confidence}
    if temperature > 0:
        options |= {
            "temperature": temperature, "seed": torch.tensor(1, device=logits.device),
            "noise_ids": torch.arange(candidates, device=logits.device),
        }  # fmt: skip

    def float64() -> tuple[Tensor, Tensor]:
        p = logits.double().softmax(-1)
        scores = p.clone()
        scores[:, banned[0]] = -1.0
        token = scores.argmax(-1)
        return token, p.gather(-1, token[:, None])[:, 0]

    def error(result: tuple[Tensor, Tensor]) -> float:
        """Tokens may differ at near ties, so that only candidates with the same token count."""
        token, value = token_confidence.definition(logits, **options)
        _, exact = token_confidence.definition(logits.double(), **options)
        same = result[0] == token
        if same.double().mean() < 0.95:
            return math.inf
        allowed = allowed_error(value[same], exact[same])
        return relative_error(result[1][same], exact[same]) / allowed

    plain = confidence == "probability" and temperature == 0
    return Case(
        token_confidence, (logits,), options, {"float64": float64} if plain else {},
        bytes=candidates * (V * dtype().itemsize + 12), error=error,
    )  # fmt: skip


def lm_head_confidence_case(model: str, candidates: int) -> Case:
    """The contender is the LM head's matmul followed by token_confidence."""
    (V, E), size = HEADS[model], dtype().itemsize
    weight, hidden, banned = randn(V, E), 3 / E**0.5 * randn(candidates, E), (V - 128,)

    def error(result: tuple[Tensor, Tensor]) -> float:
        """Each token has the largest logit or one within rounding of it, and its probability."""
        token, confidence = result
        logits = hidden.double() @ weight.double().T
        # The kernel scores in float32; everything else rounds logits to their own precision.
        tie = max(TIE, 4 * torch.finfo(dtype()).eps * logits.abs().max().item())
        index = token.clamp(min=0)[:, None]
        allowed_logits = logits.clone()
        allowed_logits[:, banned[0]] = -math.inf
        short = allowed_logits.amax(-1) - logits.gather(-1, index)[:, 0]
        if (short > tie).any() or (token < 0).any() or (token == banned[0]).any():
            return math.inf
        exact = logits.softmax(-1).gather(-1, index)[:, 0]
        plain = linear(hidden, weight).float().softmax(-1).gather(-1, index)[:, 0]
        return relative_error(confidence, exact) / allowed_error(plain, exact)

    return Case(
        lm_head_confidence, (hidden, weight), {"banned": banned},
        {"matmul + op": lambda: token_confidence(linear(hidden, weight), banned=banned)},
        bytes=(V + candidates) * E * size + 12 * candidates, flops=2 * V * E * candidates,
        error=error,
    )  # fmt: skip


def window_attention_case(
    model: str, batch: int, width: int, positions: int, splits: int | None = None
) -> Case:
    """The window's keys and values are in the cache already, every stored position is visible and
    the cache is full, so that every contender computes the same thing from the same tensors."""
    H, H_kv = MODELS[model]
    q = randn(batch, H, width, HEAD_DIM)
    k, v = (randn(batch, H_kv, positions, HEAD_DIM) for _ in range(2))

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
        "cache_seqlens": seqlens, "num_splits": splits,
    }  # fmt: skip
    return Case(
        window_attention, (q, None, None, k, v), options, others,
        bytes=2 * batch * (H * width + H_kv * positions) * HEAD_DIM * dtype().itemsize,
        flops=4 * batch * H * width * positions * HEAD_DIM,
    )  # fmt: skip


def rope_write_kv_case(model: str, batch: int, width: int, positions: int) -> Case:
    H, H_kv = MODELS[model]

    def heads(count: int) -> Tensor:
        """A tensor with a model's strides: it lies in memory as (batch, width, heads, D)."""
        return randn(batch, width, count, HEAD_DIM).transpose(1, 2)

    k_cache, v_cache = (randn(batch, H_kv, positions, HEAD_DIM) for _ in range(2))
    table = torch.randn(positions, HEAD_DIM, device=device())
    start = torch.full((batch,), (positions - width) // 2, dtype=torch.int32, device=device())
    options = {
        "window_start": start, "window_length": torch.full_like(start, width),
        "position_offset": torch.zeros_like(start),
    }  # fmt: skip
    return Case(
        rope_write_kv, (heads(H), heads(H_kv), heads(H_kv), table, k_cache, v_cache), options,
        written=(k_cache, v_cache),
        bytes=2 * batch * width * (H + 2 * H_kv) * HEAD_DIM * dtype().itemsize,
    )  # fmt: skip


def window_linear_case(layer: str, num_tokens: int) -> Case:
    """The contender is cuBLAS, followed by SiLU * mul in a call of its own where the layer is
    gated."""
    F, E, has_bias, gated = LAYERS[layer]
    weights = F * (2 if gated else 1)
    x, weight = randn(num_tokens, E), randn(weights, E) / E**0.5
    bias = randn(weights) if has_bias else None

    def matmul() -> Tensor:
        y = linear(x, weight, bias)
        return silu(y[:, :F]) * y[:, F:] if gated else y

    moved = weights * E + weights * has_bias + num_tokens * (E + F)
    return Case(
        window_linear, (x, weight, bias), {"gated": gated}, {"matmul": matmul},
        bytes=moved * dtype().itemsize, flops=2 * weights * E * num_tokens,
    )  # fmt: skip


def linear_add_norm_case(layer: str, num_tokens: int) -> Case:
    """The contender is the definition: cuBLAS adds the residual in the product, then F.rms_norm."""
    E, F = OUTPUTS[layer]
    x, weight, residual = randn(num_tokens, F), randn(E, F) / F**0.5, randn(num_tokens, E)
    gain = torch.rand(E, device=x.device, dtype=dtype())
    args = (x, weight, residual, gain, EPS)
    moved = E * F + E + num_tokens * (F + 3 * E)  # weights, gain, x; the residual twice; the norm
    return Case(
        linear_add_norm, args, {}, {"cuBLAS": lambda: linear_add_norm.definition(*args)},
        written=(residual,), bytes=moved * dtype().itemsize, flops=2 * E * F * num_tokens,
    )  # fmt: skip


def masked_canvas(batch: int, prompt: int, response: int, rule: str) -> tuple[Tensor, UnmaskSpec]:
    """A canvas with a masked response, and how it is decoded."""
    spec = UnmaskSpec(
        block_length=BLOCK, max_block_length=BLOCK, schedule="dsb",
        cache="dsb", prefix_window=24, min_prefix=0, rule=rule, rule_value=RULES[rule], steps=0,
        refresh_commit="select", mask_id=126336, eos_ids=(126081,), stop_at_eos=True,
    )  # fmt: skip
    canvas = torch.randint(0, 1000, (batch, prompt + response), device=device())
    canvas[:, prompt:] = spec.mask_id
    return canvas, spec


def place_rows_case(kind: str, batch: int, num_rows: int, prompt: int, response: int) -> Case:
    """The first launch of a step that every batch row needs, or half of them where its capacity is
    smaller."""
    canvas, spec = masked_canvas(batch, prompt, response, "threshold")
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
    }  # fmt: skip
    # A call reads and writes the tokens; it reads each candidate's position, and writes its index,
    # noise id and flag.
    moved = num_rows * (2 * 8 * width + BLOCK * (4 + 2 * 8 + 1))
    return Case(place_rows, (canvas, table, position), options, bytes=moved)


def unmask_and_slide_case(rule: str, batch: int, prompt: int, response: int) -> Case:
    """The last launch of a response's first step. The op changes its state in place and would soon
    have nothing left to unmask, so that canvas and state are restored between the calls."""
    canvas, spec = masked_canvas(batch, prompt, response, rule)
    leftpad = torch.zeros(batch, dtype=torch.int32, device=device())
    table, position = initial_rows(canvas, leftpad, spec)
    token = torch.randint(0, 1000, position.shape, device=device())
    confidence = 1 - 0.3 * torch.rand(position.shape, device=device()) ** 2
    commit = torch.zeros_like(position, dtype=torch.bool)
    written = (canvas, table, position, commit, torch.zeros_like(confidence))
    active = torch.ones(batch, dtype=torch.bool, device=device())
    # A call reads the response once, and each candidate's position, token, confidence and commit.
    moved = batch * (8 * response + BLOCK * (4 + 8 + 4 + 1 + 4))
    args = (*written, token, confidence, active, None, spec)
    return Case(unmask_and_slide, args, written=written, bytes=moved)


@dataclass(frozen=True)
class Benchmark:
    """An op's shapes: for each the values of `names`, arguments of `make`."""

    make: Callable[..., Case]
    names: str
    gpu: list[tuple[Any, ...]]
    cpu: list[tuple[Any, ...]]
    others: tuple[str, ...] = ()  # contenders beside the op and its definition

    @property
    def shapes(self) -> list[Shape]:
        names, values = self.names.split(), self.gpu if on_gpu() else self.cpu
        return [dict(zip(names, each, strict=True)) for each in values]

    def case(self, **shape: Any) -> Case:
        torch.manual_seed(0)
        return self.make(**shape)


def large(names: dict[str, Any]) -> list[str]:
    return [name for name in names if not name.startswith("small")]


V = 126464  # LLaDA-8B
PLAIN, SAMPLED = ("probability", 0.0), ("probability", 1.0)
BENCHMARKS = {
    "token_confidence": Benchmark(
        token_confidence_case, "candidates V confidence temperature",
        [*((n, v, *PLAIN) for n in (1024, 64, 32, 256) for v, _ in list(HEADS.values())[:3]),
         (4096, V, *PLAIN), (64, V, "margin", 0.0), (64, V, "entropy", 0.0),
         (64, V, *SAMPLED), (1024, V, *SAMPLED)],
        [(8, 3000, *PLAIN), (8, 3000, "margin", 0.0), (8, 3000, *SAMPLED)],
        ("float64",),
    ),
    "lm_head_confidence": Benchmark(
        lm_head_confidence_case, "model candidates",
        [(m, n) for n in (64, 32, 128, 16, 96, 256) for m in large(HEADS)],
        [("small", 4), ("small", 32)],
        ("matmul + op",),
    ),
    "window_attention": Benchmark(
        window_attention_case, "model batch width positions",
        [*(("LLaDA-8B", 1, W, C) for C in (4096, 16384) for W in (64, 128, 32)),
         *(("Dream-7B", 1, W, C) for C in (16384, 4096) for W in (128, 64, 32)),
         *(("iLLaDA-8B", 1, W, C) for C in (4096, 16384) for W in (64, 128, 32)),
         *((m, 1, 64, 1024) for m in MODELS), *((m, 8, 64, 4096) for m in MODELS),
         *((m, 1, 256, C) for m in MODELS for C in (1024, 4096, 16384)),
         *((m, 64, 64, 4096) for m in MODELS if m != "LLaDA-8B")],
        [("LLaDA-8B", 1, 8, 96), ("Dream-7B", 2, 8, 96)],
        ("sdpa", "flex", "flash"),
    ),
    "rope_write_kv": Benchmark(
        # The cache's length changes nothing; a short one leaves memory for many of them.
        rope_write_kv_case, "model batch width positions",
        [(m, B, W, 1024) for B in (1, 8) for W in (64, 32, 128, 256) for m in MODELS],
        [("LLaDA-8B", 1, 8, 64), ("Dream-7B", 2, 8, 64)],
    ),
    "window_linear": Benchmark(
        window_linear_case, "layer num_tokens",
        [(layer, n) for n in (64, 32, 128, 16, 56) for layer in large(LAYERS)],
        [(layer, n) for n in (4, 32) for layer in ("small", "small gated")],
        ("matmul",),
    ),
    "linear_add_norm": Benchmark(
        linear_add_norm_case, "layer num_tokens",
        [(layer, n) for n in (64, 32, 128, 16, 56) for layer in large(OUTPUTS)],
        [("small out", 4), ("small out", 32)],
        ("cuBLAS",),
    ),
    "place_rows": Benchmark(
        place_rows_case, "kind batch num_rows prompt response",
        [*((kind, B, B, 1024, 256) for kind in ("window", "refresh") for B in (1, 8, 64)),
         ("window", 64, 16, 1024, 256), ("refresh", 1, 1, 16128, 256)],
        [("window", 2, 2, 16, 64), ("window", 4, 2, 16, 64), ("refresh", 2, 1, 16, 64)],
    ),
    "unmask_and_slide": Benchmark(
        unmask_and_slide_case, "rule batch prompt response",
        [*((rule, B, 1024, 256) for B in (1, 8, 64) for rule in RULES),
         ("threshold", 1, 1024, 4096)],
        [(rule, 2, 16, 64) for rule in RULES],
    ),
}  # fmt: skip


def words(value: Any) -> str:
    return " ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(
    ("op", "shape", "contender"),
    [
        (op, shape, contender)
        for op, each in BENCHMARKS.items()
        for shape in each.shapes
        for contender in ("op", *each.others, *DEFINITIONS)
    ],
    ids=words,
)
def test_op(benchmark: Any, op: str, shape: Shape, contender: str) -> None:
    """Check a contender, then time it under pytest-benchmark, whose own clock times the replay of a
    graph of one call on a GPU; `extra_info` gets the figures."""
    make = functools.partial(BENCHMARKS[op].case, **shape)
    case = make()
    if contender not in (*case.others, "op", *DEFINITIONS):
        pytest.skip(f"{contender} is not installed or does not compute this")
    error = check(case, contender)
    assert error <= 1, f"{contender}: {error:.2f} times the error that is allowed"
    call, benchmark.group = case.call(contender), f"{op} {words(shape)}"
    benchmark.extra_info["error"] = error
    if not on_gpu():
        benchmark.pedantic(call.run, setup=call.restore, rounds=5, warmup_rounds=1)
        return
    benchmark.extra_info.update(time_contender(make, contender))
    replay = functools.partial(timed, capture_calls([call.run]).replay, device())
    benchmark.pedantic(replay, setup=call.restore, rounds=15, warmup_rounds=2)


def measure(name: str, *, check_only: bool, definitions: bool) -> Iterator[dict[str, Any]]:
    """The figures of every shape and contender of an op."""
    for shape in BENCHMARKS[name].shapes:
        make = functools.partial(BENCHMARKS[name].case, **shape)
        others = [] if check_only else [*make().others, *(DEFINITIONS if definitions else ())]
        cold: dict[str, float] = {}
        for contender in ("op", *others):
            line: dict[str, Any] = {"op": name, "shape": shape, "contender": contender}
            try:
                line["error"] = check(make(), contender)
                if not check_only:
                    line |= time_contender(make, contender)
                    cold[contender] = line["cold_us"]
            except Exception as error:  # a contender may not take this shape
                line["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if contender != "op" and {contender, "op"} <= cold.keys():
                line["over_op"] = round(cold[contender] / cold["op"], 3)
            yield line
        rivals = {other: us for other, us in cold.items() if other not in ("op", *DEFINITIONS)}
        if rivals and "op" in cold:
            best = min(rivals, key=rivals.__getitem__)
            yield {"op": name, "shape": shape, "contender": "best of the others", "best": best,
                   "over_op": round(rivals[best] / cold["op"], 3)}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="ops", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--op", choices=BENCHMARKS, nargs="+", metavar="OP",
        help=f"these of {', '.join(BENCHMARKS)}")  # fmt: skip
    add("--check", action="store_true", help="check the ops, time nothing")
    add("--definitions", action="store_true", help="time the definitions as well")
    add("--json", type=Path, metavar="FILE", help="written after every line")
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    record, right = {**describe_benchmark("ops", argv, device()), "lines": []}, True
    for name in args.op or BENCHMARKS:
        for line in measure(name, check_only=args.check, definitions=args.definitions):
            right &= line["contender"] != "op" or line.get("error", math.inf) <= 1
            record["lines"].append(line)
            print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)
            if args.json:
                write_json(args.json, record)
    return int(not right)


if __name__ == "__main__":
    sys.exit(run_process("ops", main))
