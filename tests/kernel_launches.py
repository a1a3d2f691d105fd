"""Every op on fake CUDA tensors, by the keyword, and the kernels that it must launch.

    python -m tests.kernel_launches compiled   each launch binds its arguments and compiles
    python -m tests.kernel_launches traced     what torch.compile sees of an op are its kernels

`tests/test_resources.py` runs both, in processes without Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from functorch.compile import aot_function
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dsb_kernels.attention import window_attention
from dsb_kernels.commit import unmask_and_slide
from dsb_kernels.linear import linear_add_norm, window_linear
from dsb_kernels.lm_head import lm_head_confidence, lm_head_partial
from dsb_kernels.place import place_rows
from dsb_kernels.rope_kv import rope_write_kv
from dsb_kernels.rows import NUM_COLUMNS, StepKind
from dsb_kernels.score import PLANES, combine_partials
from dsb_kernels.token_confidence import token_confidence
from tests.fake_cuda import Launcher, bound_launches, cuda, h100
from tools.compile_report.cases.commit import LLADA

BF16, FP32, INT32, INT64, BOOL = (
    torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.bool,
)  # fmt: skip


Call = tuple[Callable[..., Any], list[str], dict[str, Any]]  # an op, its kernels, its arguments


def call(op: Callable[..., Any], kernels: str, **arguments: Any) -> Call:
    return op, kernels.split(), arguments


def scoring_calls() -> Iterator[Call]:
    kernels = "_token_confidence_kernel combine_kernel"
    for n, V in ((1, 1), (1, 126464), (300, 1001)):
        sampling = {"temperature": 0.7, "seed": cuda(), "noise_ids": cuda(n)}
        banned = (0,)[: V - 1]
        yield call(token_confidence, kernels, logits=cuda(n, V, dtype=BF16))
        yield call(token_confidence, kernels, logits=cuda(n, V, dtype=BF16), banned=banned,
                   eligible=cuda(n, dtype=BOOL), confidence="margin", **sampling)  # fmt: skip
        yield call(token_confidence, kernels, logits=cuda(n, V, dtype=BF16), excluded=banned,
                   excluding=cuda(n, dtype=BOOL))  # fmt: skip
    kernels = "_lm_head_kernel combine_kernel"
    for n, V, dtype in ((1, 16, BF16), (128, 1001, FP32)):
        head = {"hidden": cuda(n, 128, dtype=dtype), "weight": cuda(V, 128, dtype=dtype)}
        yield call(lm_head_confidence, kernels, **head, bias=cuda(V, dtype=dtype), banned=(0,),
                   eligible=cuda(n, dtype=BOOL), confidence="margin")  # fmt: skip
        yield call(lm_head_confidence, kernels, **head, excluded=(0, 5),
                   excluding=cuda(n, dtype=BOOL))  # fmt: skip
        yield call(lm_head_partial, kernels, **head, vocab_start=7)
    for parts, n in ((1, 1), (72, 33)):
        partials = cuda(parts, PLANES, n, dtype=FP32)
        yield call(combine_partials, "combine_kernel", partials=partials)
        yield call(combine_partials, "combine_kernel", partials=partials, banned=(0, 1),
                   eligible=cuda(n, dtype=BOOL), confidence="entropy")  # fmt: skip


def attention_calls() -> Iterator[Call]:
    for B, W, cache_batch in ((1, 1, 1), (3, 32, 5)):
        q, k = cuda(B, 8, W, 128, dtype=BF16), cuda(B, 2, W, 128, dtype=BF16)
        cache, row = cuda(cache_batch, 2, 96, 128, dtype=BF16), cuda(B, dtype=INT32)
        caches = {"k_cache": cache, "v_cache": cuda(*cache.shape, dtype=BF16)}
        where = {"window_start": row, "window_length": row}
        where["cache_batch_idx"] = row if cache_batch > B else None
        rotation = {"q": q, "k": k, "v": k, "cos_sin_cache": cuda(96, 128, dtype=FP32)}
        for offset in (None, row):
            yield call(rope_write_kv, "_rope_write_kv_kernel", **rotation, **caches, **where,
                       position_offset=offset)  # fmt: skip
        yield call(rope_write_kv, "_rope_write_kv_kernel", **rotation, **caches, **where,
                   position=cuda(B, W, dtype=INT32))  # fmt: skip
        lists = {"kv_num_blocks": row, "kv_indices": cuda(B, 1, dtype=INT32)}
        yield call(window_attention, "_attention_kernel", q=q, k_window=None, v_window=None,
                   **caches, **where, kv_visible=cuda(B, 96, dtype=BOOL), **lists, num_splits=1,
                   next_weight=cuda(40, 8 * 128, dtype=BF16))  # fmt: skip
        yield call(window_attention, "_attention_kernel", q=q, k_window=None, v_window=None,
                   **caches, **where, cache_seqlens=row, num_splits=1)  # fmt: skip
        yield call(window_attention, "_attention_kernel _combine_kernel", q=q, k_window=k,
                   v_window=k, **caches, **where, cache_seqlens=row, cache_leftpad=row, **lists,
                   num_splits=3, return_lse=True)  # fmt: skip


RULES = (
    {"rule": "threshold", "eos_ids": (126081,)},
    {"rule": "frechet", "rule_value": 0.25, "max_block_length": 64, "min_prefix": 1,
     "refresh_commit": "first", "eos_ids": (1, 151643)},
    {"rule": "factor", "rule_value": 1.0, "max_block_length": 1, "cache": "none",
     "prefix_window": 0, "eos_ids": (), "stop_at_eos": False},
    {"rule": "quota", "rule_value": 0.0, "schedule": "naive", "cache": "dual", "min_prefix": 1,
     "stop_at_eos": False},
)  # fmt: skip


def schedule_calls() -> Iterator[Call]:
    for B, K, L in ((1, 1, 1), (3, 20, 300)):
        canvas = torch.empty_strided((B, L), (L + 4, 1), device="cuda", dtype=INT64)
        state = {"table": cuda(B, NUM_COLUMNS, dtype=INT32), "position": cuda(B, K, dtype=INT32)}
        record = {
            "commit": cuda(B, K, dtype=BOOL), "candidate_confidence": cuda(B, K, dtype=FP32),
        }  # fmt: skip
        scored = {
            "token": cuda(B, K), "confidence": cuda(B, K, dtype=FP32),
            "active": cuda(B, dtype=BOOL),
        }  # fmt: skip
        some = (None, cuda(B, dtype=INT32)) * 2
        for rule, rows in zip(RULES, some if B > 1 else reversed(some), strict=True):
            yield call(unmask_and_slide, "_unmask_kernel", canvas=canvas, **state, **record,
                       **scored, rows=rows,
                       spec=replace(LLADA, **rule))  # fmt: skip
        for kind, shift in (
            (StepKind.WINDOW, True), (StepKind.REFRESH, False), (StepKind.RESPONSE, True),
        ):  # fmt: skip
            yield call(place_rows, "_place_rows_kernel", canvas=canvas, **state, kind=int(kind),
                       num_rows=1, width=L, num_candidates=K, shift=shift)  # fmt: skip
        yield call(place_rows, "_place_rows_kernel", canvas=canvas, **state,
                   kind=int(StepKind.WINDOW), num_rows=B, width=1, num_candidates=1)  # fmt: skip


def linear_calls() -> Iterator[Call]:
    for n, E, F, dtype in ((1, 1, 1, BF16), (1, 128, 192, BF16), (33, 100, 130, BF16),
                           (128, 128, 1, FP32)):  # fmt: skip
        empty = functools.partial(cuda, dtype=dtype)
        x, weight, gain = empty(n, E), empty(F, E), empty(F)
        for bias in (None, gain):
            yield call(window_linear, "_window_linear_kernel", x=x, weight=weight, bias=bias)
        yield call(window_linear, "_window_linear_kernel", x=x, weight=empty(2 * F, E),
                   bias=empty(2 * F), gated=True)  # fmt: skip
        yield call(linear_add_norm, "_split_linear_kernel _add_norm_kernel", x=x, weight=weight,
                   residual=empty(n, F), norm_weight=gain, eps=1e-5)  # fmt: skip
    many = cuda(300, 128, dtype=BF16)
    yield call(window_linear, "_silu_mul_kernel", x=many, weight=cuda(64, 128, dtype=BF16),
               gated=True)  # fmt: skip
    yield call(linear_add_norm, "_add_norm_kernel", x=many, weight=cuda(64, 128, dtype=BF16),
               residual=cuda(300, 64, dtype=BF16), norm_weight=cuda(64, dtype=BF16),
               eps=1e-5)  # fmt: skip


def calls() -> list[Call]:
    return [*scoring_calls(), *attention_calls(), *schedule_calls(), *linear_calls()]


def compiled() -> None:
    """Every launch binds its arguments (the interpreter binds in its own way: none is a constant
    because it is 1 or None) and compiles within the limits of the chip."""
    launched: list[str] = []

    def check(name: str, kernel: Any) -> None:
        launched.append(name)
        assert kernel.metadata.enable_fp_fusion
        assert kernel.metadata.shared <= 227 * 1024, name
        if name == "_unmask_kernel":  # whose threads read what they then overwrite
            assert before_commit(kernel.asm["ptx"]) == "bar.sync"

    with (
        mock.patch.object(Launcher, "compiled", staticmethod(check)),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
        h100(),
        bound_launches(),
        FakeTensorMode(),
    ):
        for op, kernels, arguments in calls():
            op(**arguments)
            assert launched == kernels, (op, arguments, launched)
            launched.clear()


def before_commit(ptx: str) -> str:
    """What precedes the first write to the canvas, which is of 64 bits."""
    accesses = re.findall(r"(?:ld|st)\.global(?:\.v2)?\.b64|bar\.sync", ptx)
    return accesses[[access[:2] for access in accesses].index("st") - 1]


class TracedError(Exception):
    """The graph has been made; running it needs a GPU."""


def traced() -> None:
    """What torch.compile sees of an op are its kernels, which one call for each of them shows."""
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> None:
        graphs.append(graph)
        raise TracedError

    with h100():
        with FakeTensorMode():
            listed = {(op, *kernels): arguments for op, kernels, arguments in calls()}
        for (op, *kernels), arguments in listed.items():
            tensors = {n: v for n, v in arguments.items() if isinstance(v, Tensor)}
            others = {n: v for n, v in arguments.items() if n not in tensors}
            with contextlib.suppress(TracedError):
                aot_function(functools.partial(op, **others), fw_compiler=keep)(**tensors)
            names = [str(n.target) for n in graphs.pop().graph.nodes if n.op == "call_function"]
            launches = sum("triton_kernel_wrapper" in name for name in names)
            assert launches == len(kernels), (op, arguments, names)


if __name__ == "__main__":
    {"compiled": compiled, "traced": traced}[sys.argv[1]]()
