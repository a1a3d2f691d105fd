"""The part of `benchmarks/lab.py` on the linear layers of window steps: ours beside cuBLAS's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from benchmarks import bench_linear_add_norm as add_norm
from benchmarks import bench_window_linear as window
from benchmarks.lab_decode import PREFIXES, Bench, bench, window_steps
from benchmarks.lab_ops import keep, listed
from benchmarks.lab_state import Lab
from benchmarks.measure import timing
from dsb_runtime.engine import layers

# Of an op the benchmark, and what there would be in its place.
OPS: tuple[tuple[ModuleType, str], ...] = ((window, "matmul"), (add_norm, "definition"))


@contextmanager
def cublas(made: Bench) -> Iterator[None]:
    """The engine runs cuBLAS at any number of rows inside."""
    most = layers.MAX_ROWS
    made.engine.release()
    layers.MAX_ROWS = 0
    try:
        yield
    finally:
        layers.MAX_ROWS = most
        made.engine.release()


def time_layers(lab: Lab) -> None:
    bandwidth = lab.ceilings().bandwidth
    for rows in PREFIXES:
        ratios, shares = {}, {}
        for module, other in OPS:
            for name in module.LAYERS:
                needs = module.needs(name, rows)["bytes_needed"]
                ours, theirs = (
                    keep(lab, "linear", f"{name} {rows} rows: {contender}",
                         timing(module.maker(name, rows, contender), needs))
                    for contender in ("op", other)
                )  # fmt: skip
                ratios[name], shares[name] = theirs.cold / ours.cold, needs / ours.cold / bandwidth
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        lab.fact(f"linear layers, {rows} rows: cuBLAS over ours, geometric mean", mean, "x",
                 listed(ratios, "{:.2f}"))  # fmt: skip
        lab.fact(f"linear layers, {rows} rows: of bandwidth, worst", min(shares.values()), "share",
                 listed(shares, "{:.0%}"))  # fmt: skip


def linear_part(lab: Lab) -> None:
    """Layer by layer, then whole window steps of LLaDA-8B."""
    time_layers(lab)
    made = bench(lab, "llada-8b")
    with cublas(made):
        theirs = {rows: window_steps(lab, made, rows) for rows in PREFIXES}
    for rows, their in theirs.items():
        our = window_steps(lab, made, rows)
        share = f"{their['share_of_weights_limit']:.1%} of the weight-streaming limit"
        lab.fact(f"window step, {rows} rows: cuBLAS's linear layers over ours",
                 their["ms"] / our["ms"], "x",
                 f"{their['ms']:.2f} ms, {share}, over {our['ms']:.2f} ms")  # fmt: skip
