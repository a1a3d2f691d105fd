"""The calls of single ops that `ops.py` times and `correct.py` checks, one function for each op.

A function takes the shape and makes a `Case` of random inputs. `precision` is the dtype of weights
and activations, by its name; None is that in which ops are timed. What comes after it are options
of the op that are checked and not timed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from benchmarks.attention_cases import EPS, HEAD_DIM, MODELS, each
from benchmarks.op_case import Case, allowed_error, device, randn, relative_error
from dsb_kernels.commit import initial_rows, unmask_and_slide
from dsb_kernels.linear import linear_add_norm, window_linear
from dsb_kernels.lm_head import lm_head_confidence
from dsb_kernels.noise import sampling_scores
from dsb_kernels.place import place_rows
from dsb_kernels.rope_kv import rope_write_kv
from dsb_kernels.rows import Column, StepKind, UnmaskSpec
from dsb_kernels.score import confidence_of, exclude_tokens
from dsb_kernels.token_confidence import token_confidence

BLOCK, PREFIX = 32, 8
SLICE, COLUMNS = 256, 1 << 14  # candidates and tokens whose float64 logits are there at a time
TIE = 1e-3  # logits this close may be ordered either way by another order of summation
RULES = {"threshold": 0.9, "factor": 1.0, "frechet": 0.25}
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


def scoring_options(
    count: int, V: int, confidence: str, temperature: float, way: str = "plain"
) -> dict[str, Any]:
    """Arguments of an op that scores `count` candidates. `way` names what else it is asked for:
    "eligible" (every third candidate is skipped), "excluded" (tokens of every second candidate) or
    "seeds" (a seed of its own for each candidate)."""
    index = torch.arange(count, device=device())
    options: dict[str, Any] = {"banned": (V - 128,), "confidence": confidence}
    if temperature > 0:
        seed = torch.tensor(1, device=device()) if way != "seeds" else 2**33 * index - 7
        options |= {"temperature": temperature, "seed": seed, "noise_ids": index + 2**35}
    if way == "eligible":
        options["eligible"] = index % 3 > 0
    elif way == "excluded":
        options |= {"excluded": (0, V // 2), "excluding": index % 2 == 0}
    return options


def scoring_error(
    result: tuple[Tensor, Tensor], exact: Tensor, plain: Tensor, options: dict[str, Any], tie: float
) -> float:
    """The error of tokens and confidences over what is allowed. A token must have the largest score
    or one within `tie` of it, and its confidence is compared with that of the same token.

    `exact` are the logits (N, V) in float64, `plain` those that the definition would score.
    """
    (token, value), banned = result, options["banned"]
    temperature, kind = options.get("temperature", 0.0), options["confidence"]
    scored = options.get("eligible", torch.ones_like(token, dtype=torch.bool))
    if (token[~scored] != -1).any() or (value[~scored] != -math.inf).any():
        return math.inf
    for logits in (exact, plain):
        exclude_tokens(logits, options.get("excluded", ()), options.get("excluding"))
    allowed = exact.clone()
    allowed[:, banned[0]] = -math.inf
    noise = (options.get("seed"), options.get("noise_ids"))
    scores = sampling_scores(allowed, temperature, *noise)[scored]
    token, value, exact, plain = token[scored], value[scored], exact[scored], plain[scored]
    if (token < 0).any() or (token == banned[0]).any():
        return math.inf
    short = scores.amax(-1) - scores.gather(-1, token[:, None])[:, 0]
    if (short > tie / (temperature or 1.0)).any():
        return math.inf
    confidences = [
        confidence_of(logits.softmax(-1), token, banned, kind) for logits in (exact, plain)
    ]
    return relative_error(value, confidences[0]) / allowed_error(confidences[1], confidences[0])


def token_confidence_case(
    candidates: int, V: int, confidence: str, temperature: float, precision: str | None = None,
    way: str = "plain",
) -> Case:  # fmt: skip
    """The contender "float64" is what published decoding loops do: a softmax over the vocabulary in
    float64, argmax, gather."""
    logits = 3 * randn(candidates, V, precision=precision)
    options = scoring_options(candidates, V, confidence, temperature, way)
    banned = options["banned"]

    def float64() -> tuple[Tensor, Tensor]:
        p = logits.double().softmax(-1)
        scores = p.clone()
        scores[:, banned[0]] = -1.0
        token = scores.argmax(-1)
        return token, p.gather(-1, token[:, None])[:, 0]

    def error(result: tuple[Tensor, Tensor]) -> float:
        tie = TIE if temperature else 0.0  # without noise nothing is rounded before it is compared
        return max(
            scoring_error(
                (result[0][some], result[1][some]), logits[some].double(), logits[some].float(),
                {k: v[some] if isinstance(v, Tensor) and v.ndim else v for k, v in options.items()},
                tie,
            )
            for some in (slice(i, i + SLICE) for i in range(0, candidates, SLICE))
        )  # fmt: skip

    is_plain = confidence == "probability" and temperature == 0
    return Case(
        token_confidence, (logits,), options, {"float64": float64} if is_plain else {},
        bytes=candidates * (V * logits.element_size() + 12), error=error,
    )  # fmt: skip


def lm_head_confidence_case(
    model: str, candidates: int, confidence: str = "probability", temperature: float = 0.0,
    precision: str | None = None, way: str = "plain",
) -> Case:  # fmt: skip
    """The contender is the LM head's matmul followed by token_confidence."""
    V, E = HEADS[model]
    weight = randn(V, E, precision=precision)
    hidden = 3 / E**0.5 * randn(candidates, E, precision=precision)
    options = scoring_options(candidates, V, confidence, temperature, way)

    def error(result: tuple[Tensor, Tensor]) -> float:
        parts = weight.split(COLUMNS)
        exact = torch.cat([hidden.double() @ part.double().T for part in parts], 1)
        # The kernel scores in float32; everything else rounds logits to their own precision.
        tie = max(TIE, 4 * torch.finfo(hidden.dtype).eps * exact.abs().max().item())
        return scoring_error(result, exact, linear(hidden, weight).float(), options, tie)

    return Case(
        lm_head_confidence, (hidden, weight), options,
        {"matmul + op": lambda: token_confidence(linear(hidden, weight), **options)},
        bytes=(V + candidates) * E * weight.element_size() + 12 * candidates,
        flops=2 * V * E * candidates, error=error,
    )  # fmt: skip


def rope_write_kv_case(
    model: str, batch: int, width: int, positions: int, precision: str | None = None,
    way: str = "plain",
) -> Case:  # fmt: skip
    """`way` names what else is checked: "rows" (`cache_batch_idx`), "short" (a window that is not
    full, after padding) or "listed" (the position of each column)."""
    H, H_kv = MODELS[model]

    def heads(count: int) -> Tensor:
        """A tensor with a model's strides: it lies in memory as (batch, width, heads, D)."""
        return randn(batch, width, count, HEAD_DIM, precision=precision).transpose(1, 2)

    rows = batch + 1 if way == "rows" else batch
    cache = [randn(rows, H_kv, positions, HEAD_DIM, precision=precision) for _ in range(2)]
    table = torch.randn(positions, HEAD_DIM, device=device())
    options: dict[str, Any] = {
        "window_start": each(batch, (positions - width) // 2),
        "window_length": each(batch, width), "position_offset": each(batch, 0),
    }  # fmt: skip
    if way == "rows":
        options["cache_batch_idx"] = torch.arange(batch, 0, -1, device=device()).int()
    elif way == "short":
        options |= {"window_length": each(batch, width - 3), "position_offset": each(batch, 7)}
    elif way == "listed":
        options["position"] = torch.rand(batch, positions, device=device()).argsort(-1)[:, :width]
        options["position"] = options["position"].int().contiguous()
    return Case(
        rope_write_kv, (heads(H), heads(H_kv), heads(H_kv), table, *cache), options,
        written=tuple(cache),
        bytes=2 * batch * width * (H + 2 * H_kv) * HEAD_DIM * cache[0].element_size(),
    )  # fmt: skip


def window_linear_case(layer: str, num_tokens: int, precision: str | None = None) -> Case:
    """The contender is cuBLAS, followed by SiLU * mul in a call of its own where the layer is
    gated."""
    F, E, has_bias, gated = LAYERS[layer]
    weights = F * (2 if gated else 1)
    x = randn(num_tokens, E, precision=precision)
    weight = randn(weights, E, precision=precision) / E**0.5
    bias = randn(weights, precision=precision) if has_bias else None

    def matmul() -> Tensor:
        y = linear(x, weight, bias)
        return silu(y[:, :F]) * y[:, F:] if gated else y

    moved = weights * E + weights * has_bias + num_tokens * (E + F)
    return Case(
        window_linear, (x, weight, bias), {"gated": gated}, {"matmul": matmul},
        bytes=moved * x.element_size(), flops=2 * weights * E * num_tokens,
    )  # fmt: skip


def linear_add_norm_case(layer: str, num_tokens: int, precision: str | None = None) -> Case:
    """The contender is the definition: cuBLAS adds the residual in the product, then F.rms_norm."""
    E, F = OUTPUTS[layer]
    x, residual = (randn(num_tokens, n, precision=precision) for n in (F, E))
    weight, gain = randn(E, F, precision=precision) / F**0.5, 1 + randn(E, precision=precision) / 4
    args = (x, weight, residual, gain, EPS)
    moved = E * F + E + num_tokens * (F + 3 * E)  # weights, gain, x; the residual twice; the norm
    return Case(
        linear_add_norm, args, {}, {"cuBLAS": lambda: linear_add_norm.definition(*args)},
        written=(residual,), bytes=moved * x.element_size(), flops=2 * E * F * num_tokens,
    )  # fmt: skip


def masked_canvas(
    batch: int, prompt: int, response: int, rule: str, block: int = BLOCK
) -> tuple[Tensor, UnmaskSpec]:
    """A canvas with a masked response, and how it is decoded."""
    spec = UnmaskSpec(
        block_length=block, max_block_length=block, schedule="dsb",
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


def unmask_and_slide_case(
    rule: str, batch: int, prompt: int, response: int, block: int = BLOCK
) -> Case:
    """The last launch of a response's first step. The op changes its state in place and would soon
    have nothing left to unmask, so that canvas and state are restored between the calls."""
    canvas, spec = masked_canvas(batch, prompt, response, rule, block)
    leftpad = torch.zeros(batch, dtype=torch.int32, device=device())
    table, position = initial_rows(canvas, leftpad, spec)
    token = torch.randint(0, 1000, position.shape, device=device())
    confidence = 1 - 0.3 * torch.rand(position.shape, device=device()) ** 2
    commit = torch.zeros_like(position, dtype=torch.bool)
    written = (canvas, table, position, commit, torch.zeros_like(confidence))
    active = torch.ones(batch, dtype=torch.bool, device=device())
    # A call reads the response once, and each candidate's position, token, confidence and commit.
    moved = batch * (8 * response + block * (4 + 8 + 4 + 1 + 4))
    args = (*written, token, confidence, active, None, spec)
    return Case(unmask_and_slide, args, written=written, bytes=moved)
