"""Compile cases of the launch configurations that `benchmarks/sweep.py` times, for sm_90."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import read_toml
from benchmarks.op_cases import LAYERS
from benchmarks.sweep import candidates, in_words, using
from tools.compile_report.case import CompileCase
from tools.compile_report.cases import attention, confidence, linear


def sweep_cases(ops: Sequence[str] = ()) -> list[CompileCase]:
    """Every configuration of `benchmarks/sweep.toml`, or those of the ops that are named."""
    cases = []
    for item in read_toml("sweep.toml")["sweep"]:
        for config in candidates(item) if not ops or item["op"] in ops else ():
            with using(item["key"], item["size"], config, "sm_90"):
                case = case_of(item["op"], item["shape"])
            # Their loops are no longer than others by much, or the sweep shows it.
            cases.append(replace(case, name=f"{case.name}, {in_words(config)}", max_loop=None))
    return cases


def case_of(op: str, shape: dict[str, Any]) -> CompileCase:
    """What an op launches first at a shape of `benchmarks/ops.py`."""
    if op == "window_attention":
        heads = next(sizes[:3] for name, *sizes in attention.SHAPES if name == shape["model"])
        H, H_kv, D = heads
        W, splits = shape["width"], attention.splits_of(H, H_kv, shape["width"], D)
        words = f"{shape['model']} {W} columns"
        return attention.attention_case(words, H, H_kv, W, D, "in cache", splits, "sm_90")
    if op == "window_linear":
        F, _, bias, gated = LAYERS[shape["layer"]]
        return linear.linear_case("sm_90", shape["num_tokens"], F, gated, "bf16", bias)
    if op == "linear_add_norm":
        return linear.split_case("sm_90", shape["num_tokens"], "bf16")
    if op == "lm_head_confidence":
        case = confidence.head_case("sm_90", shape["candidates"], "probability", False, "bf16")
    else:
        case = confidence.logits_case(shape["candidates"], "probability", False, "bf16")
    return replace(case, architectures=("sm_90",))
