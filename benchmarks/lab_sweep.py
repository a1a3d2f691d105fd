"""Alternatives to the configurations of `dsb_kernels/_configs.py`, timed by `benchmarks/lab.py`.

The table is changed by hand where one of these is faster by more than the two times of each differ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.table import Table

from benchmarks import bench_linear_add_norm as add_norm
from benchmarks import bench_lm_head_confidence as head
from benchmarks import bench_token_confidence as token
from benchmarks import bench_window_attention as attention
from benchmarks import bench_window_linear as linear
from benchmarks.lab_ops import LLADA_VOCABULARY, words
from benchmarks.lab_state import Lab, one_line
from benchmarks.measure import Call, Make, Timing, device, on_gpu, timing
from dsb_kernels import _configs as tuning
from dsb_kernels._configs import Config, architecture_of, head_blocks, linear_blocks


def _tile(block_m: int, block_n: int) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n}


def _split(block_v: int, blocks: int) -> dict[str, int]:
    return {"BLOCK_V": block_v, "SPLIT_BLOCKS": blocks}


# (op in the table of dsb_kernels/_configs.py, size): configurations to try instead of the table's.
# Each compiles for sm_90 without spills.
ALTERNATIVES: dict[tuple[str, int], list[Config]] = {
    ("lm_head_confidence", 32): [
        Config(head_blocks(128, 32, 32, programs=132), 8, 5),
        Config(head_blocks(128, 32, 32, programs=528), 8, 4),
        Config(head_blocks(128, 32, 32, programs=264, block_k=128), 8, 3),
        Config(head_blocks(64, 32, 32, programs=528), 4, 5),
        Config(head_blocks(256, 32, 32, programs=132), 8, 4),
    ],
    ("lm_head_confidence", 64): [
        Config(head_blocks(128, 64, 32, programs=132), 8, 5),
        Config(head_blocks(128, 64, 32, programs=528), 8, 4),
        Config(head_blocks(128, 64, 32, programs=264, block_k=128), 8, 2),
        Config(head_blocks(256, 64, 32, programs=132), 16, 4),
    ],
    ("lm_head_confidence", 128): [
        Config(head_blocks(128, 128, 32, programs=264), 8, 3),
        Config(head_blocks(128, 128, 32, programs=132), 8, 5),
        Config(head_blocks(256, 128, 32, programs=264), 16, 4),
        Config(head_blocks(256, 128, 32, programs=132), 16, 3),
    ],
    ("window_linear", 32): [
        Config(linear_blocks(64, 32, programs=64), 4, 5),
        Config(linear_blocks(64, 32, programs=64, block_k=128), 4, 4),
        Config(linear_blocks(128, 32, programs=64), 8, 6),
    ],
    ("window_linear", 128): [
        Config(linear_blocks(128, 128, programs=64), 8, 4),
        Config(linear_blocks(64, 128, programs=64), 4, 4),
    ],
    ("window_linear gated", 32): [
        Config(linear_blocks(64, 32, programs=64), 4, 4),
        Config(linear_blocks(64, 32, programs=64, block_k=128), 4, 2),
        Config(linear_blocks(128, 32, programs=64), 8, 3),
    ],
    ("window_linear gated", 128): [
        Config(linear_blocks(128, 128, programs=64), 8, 3),
        Config(linear_blocks(64, 128, programs=64), 8, 4),
    ],
    ("linear_add_norm", 32): [
        Config(linear_blocks(64, 32, programs=200), 4, 7),
        Config(linear_blocks(64, 32, programs=100), 4, 5),
        Config(linear_blocks(64, 32, programs=260, block_k=128), 4, 4),
    ],
    ("linear_add_norm", 128): [
        Config(linear_blocks(128, 128, programs=60), 8, 6),
        Config(linear_blocks(128, 128, programs=100), 8, 4),
        Config(linear_blocks(64, 128, programs=100), 4, 6),
    ],
    ("window_attention 128", 64): [
        Config(_tile(64, 64), 4, 2),
        Config(_tile(64, 64), 4, 4),
        Config(_tile(64, 32), 4, 4),
    ],
    ("window_attention 128", 128): [
        Config(_tile(128, 64), 8, 2),
        Config(_tile(128, 64), 8, 4),
        Config(_tile(128, 32), 8, 4),
        Config(_tile(64, 64), 4, 3),
    ],
    ("window_attention 128", 896): [
        Config(_tile(128, 64), 8, 2),
        Config(_tile(128, 64), 8, 4),
        Config(_tile(64, 64), 4, 3),
    ],
    ("token_confidence", 64): [
        Config(_split(8192, 1), 8),
        Config(_split(4096, 2), 4, 3),
        Config(_split(2048, 1), 4),
    ],
    ("token_confidence", 1024): [
        Config(_split(4096, 16), 4, 3),
        Config(_split(4096, 8), 8, 3),
        Config(_split(8192, 4), 8, 3),
        Config(_split(2048, 16), 4, 4),
    ],
}  # fmt: skip
# Of the op's benchmark the layer that stands for all, on a GPU and on a CPU.
LAYER = {
    "window_linear": ("LLaDA-8B qkv", "small"),
    "window_linear gated": ("LLaDA-8B gate/up", "small gated"),
    "linear_add_norm": ("LLaDA-8B down", "small out"),
}
SPLITS = (2, 3, 4, 5, 6)  # of window_attention, at 128 rows of LLaDA


@contextmanager
def using(op: str, size: int, config: Config) -> Iterator[None]:
    """The table's configuration of an op for a size is another one inside."""
    key = (op, architecture_of(device()))
    table = tuning.CONFIGS[key if key in tuning.CONFIGS else (op, "any")]
    limit = min(most for most in table if most >= size)
    before = table[limit]
    table[limit] = config
    try:
        yield
    finally:
        table[limit] = before


def sweep_case(op: str, size: int) -> tuple[str, Make, int]:
    """What alternatives are timed on: shape in words, calls, bytes."""
    if op == "lm_head_confidence":
        name = next(iter(head.HEADS))
        needs = head.needs(name, size)["bytes_needed"]
        return f"{name} {size} rows", head.maker(name, size, "op"), needs
    if "linear" in op:
        module = add_norm if op == "linear_add_norm" else linear
        name = LAYER[op][not on_gpu()]
        needs = module.needs(name, size)["bytes_needed"]
        return f"{name} {size} rows", module.maker(name, size, "op"), needs
    if op == "token_confidence":
        shape = (size, LLADA_VOCABULARY if on_gpu() else 3000, "probability", 0.0)
        return f"{size} rows", token.maker(shape, "op"), token.bytes_needed(shape)
    shape = ("LLaDA-8B", 1, size, 4096 if on_gpu() else 256)
    if size == 896:  # query rows of a KV head: 7 x 128, bound by the tensor cores
        shape = ("Dream-7B", 1, 128, 16384) if on_gpu() else ("Dream-7B", 1, 8, 256)
    return words(shape), attention.maker(shape, "op"), attention.needs(shape)["bytes_needed"]


def short(config: Config) -> str:
    blocks = " ".join(f"{name}={value}" for name, value in config.blocks.items())
    return f"{blocks} warps={config.num_warps} stages={config.num_stages}"


def sweep(lab: Lab) -> None:
    """Alternatives to `dsb_kernels/_configs.py`, twice each, so that noise shows."""
    lines: list[dict[str, Any]] = []
    lab.details["sweep"] = lines

    def try_all(op: str, case: str, ways: list[tuple[str, bool, Callable[[], Timing]]]) -> None:
        for name, current, run in ways:
            line = {"op": op, "case": case, "configuration": name, "current": current}
            try:
                line["us"] = [round(run().cold * 1e6, 2) for _ in range(2)]
            except Exception as error:  # an alternative that does not compile is none
                line["error"] = one_line(error)
                if current:
                    raise
            lines.append(line)
            lab.save()

    for (op, size), configs in ALTERNATIVES.items():
        case, make, touched = sweep_case(op, size)
        now = tuning.configuration(op, size, architecture_of(device()))

        def run(op=op, size=size, config=now, make=make, touched=touched) -> Timing:
            with using(op, size, config):
                return timing(make, touched)

        ways = [(short(now), True, run)]
        ways += [(short(c), False, functools.partial(run, config=c)) for c in configs]
        try_all(op, case, ways)
    for C in (1280, 4096) if on_gpu() else (256,):
        shape = ("LLaDA-8B", 1, 128, C)
        touched = attention.needs(shape)["bytes_needed"]

        def split(n: int | None, shape=shape, touched=touched) -> Timing:
            def make() -> Call:
                return Call(functools.partial(attention.problem(*shape).op, num_splits=n))

            return timing(make, touched)

        ways = [("num_splits as chosen", True, functools.partial(split, None))]
        ways += [(f"num_splits={n}", False, functools.partial(split, n)) for n in SPLITS]
        try_all("window_attention", words(shape), ways)


def sweep_table(lines: list[dict[str, Any]]) -> Table:
    """Of each case the alternatives, the fastest in bold."""
    table = Table(
        title="Alternatives to dsb_kernels/_configs.py (* = as it is)", title_justify="left"
    )
    for name in ("op", "case", "configuration", "µs", "again µs"):
        table.add_column(name, overflow="fold", justify="right" if "µs" in name else "left")
    best: dict[tuple[str, str], float] = {}
    for line in lines:
        case = (line["op"], line["case"])
        best[case] = min(best.get(case, math.inf), *line.get("us", [math.inf]))
    last = None
    for line in lines:
        case = (line["op"], line["case"])
        if case != last and last is not None:
            table.add_section()
        name = line["configuration"] + (" *" if line["current"] else "")
        times = [f"{t:g}" for t in line["us"]] if "us" in line else [line["error"], ""]
        style = "bold" if best[case] in line.get("us", []) else None
        table.add_row(*(case if case != last else ("", "")), name, *times, style=style)
        last = case
    return table
