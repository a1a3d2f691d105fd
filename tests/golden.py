"""The golden checkpoints and trajectories in `tests/data` (tiny random models of both families)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import dsb_runtime as dsb

DATA = Path(__file__).parent / "data"
FAMILIES = ("llada", "dream")


@cache
def model(family: str) -> PreTrainedModel:
    return dsb.load_model(DATA / family, dtype="float32", device="cpu")


@cache
def cases(family: str) -> list[dict[str, Any]]:
    return json.loads((DATA / family / "trajectories.json").read_text())


def settings(case: dict[str, Any]) -> dict[str, Any]:
    """`generate`'s arguments for one trajectory."""
    method, rule = case["method"], case["rule"]
    cache_policy = "dual" if method == "dual_cache" else "dsb" if "cache" in method else "none"
    made: dict[str, Any] = {
        "gen_length": case["gen_length"],
        "block_length": case["block_length"],
        "schedule": "dsb" if method.startswith("dsb") else "naive",
        "cache": cache_policy,
        "stop_at_eos": False,
        {"quota": "steps"}.get(rule, rule): case["steps"] if rule == "quota" else case[rule],
    }
    if method.startswith("dsb") and case["max_block_length"] > 0:
        made["max_block_length"] = case["max_block_length"]
    if cache_policy == "dsb":
        made["prefix_window"] = case["prefix_window"]
    return made
