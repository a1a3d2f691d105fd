"""Compile cases of window_attention."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch

from dsb_kernels._configs import ARCHITECTURES, Config
from dsb_kernels._launch import odd_lines
from dsb_kernels._op import triton
from dsb_kernels.attention_kernel import (
    COMBINE_QUERIES,
    _attention_kernel,
    _combine_kernel,
    choose_splits,
    tile_of,
)
from tools.compile_report.case import DTYPES, OVERLAPPING, CompileCase

SHAPES = [  # name, heads, KV heads, head dim, window capacities
    ("LLaDA-8B", 32, 32, 128, (16, 32, 64, 128, 256)),
    ("iLLaDA-8B", 32, 8, 128, (16, 32, 64, 128, 256)),
    ("Dream-7B", 28, 4, 128, (16, 32, 64, 128, 256)),
    *((f"head dim {d}", 16, 16, d, (64, 128)) for d in (64, 80, 96, 256)),
]
WAYS = ("in cache", "in cache indexed", "fresh listed")
REFRESH = (1280, 32)  # the queries of a refresh's layers, and those of its last layer
SMS = 132  # of an H100, for which splits are chosen


def cases() -> list[CompileCase]:
    """LLaDA-8B, iLLaDA-8B and Dream-7B at every window capacity, and the other head dims.

    Capacities that share tile and splits are one case. Either the window is in the K/V cache
    already, as in the runtime, and the cache has the batch's rows or others too; the weight of the
    next layer is asked for, but not where a window is "full", as at a refresh. In a sparse context
    there is a list of KV blocks, and each key's visibility. Or the window's keys and values are
    arguments, and the KV blocks of a list are visited. Splits, which only divide the keys, are
    those of one row where the runtime needs them, and else four.
    """
    by_name: dict[object, CompileCase] = {}
    for architecture, (name, H, H_kv, D, capacities) in itertools.product(ARCHITECTURES, SHAPES):
        for W, way in itertools.product(capacities, WAYS if D == 128 else WAYS[:1]):
            if architecture != "sm_90" and way == "in cache indexed":
                continue  # it differs from "in cache" by one load
            runs = architecture == "sm_90" and way == "in cache" and W <= 128
            splits = splits_of(H, H_kv, W, D) if runs else 4
            words = f"{name} {splits} splits {min(H // H_kv * W, 128)} rows {way}"
            case = attention_case(words, H, H_kv, W, D, way, splits, architecture)
            by_name.setdefault((words, architecture), case)
    for (name, H, H_kv, D, _), W in itertools.product(SHAPES[:3], REFRESH):
        words = f"{name} refresh {W} queries"
        splits = splits_of(H, H_kv, W, D)
        by_name[words] = attention_case(words, H, H_kv, W, D, "in cache full", splits, "sm_90")
    for architecture in ARCHITECTURES:
        by_name["one split", architecture] = attention_case(
            "LLaDA-8B one split", 32, 32, 64, 128, "in cache", 1, architecture
        )
        by_name["sparse", architecture] = attention_case(
            "LLaDA-8B 64 rows sparse", 32, 32, 64, 128, "in cache visible listed", 4, architecture
        )
        for D in (64, 128, 256):
            by_name["float32", D, architecture] = attention_case(
                f"float32 head dim {D}", 16, 4, 64, D, "in cache", 4, architecture, "fp32"
            )
    combined = sorted({case.constexprs["NUM_SPLITS"] for case in by_name.values()} - {1, 4})
    return [
        *by_name.values(),
        *(combine_case(*shape, ARCHITECTURES) for shape in ((128, 4), (128, 32), (256, 4))),
        *(combine_case(128, splits, ("sm_90",)) for splits in combined),
    ]


def splits_of(H: int, H_kv: int, W: int, D: int) -> int:
    """How many splits one row's queries have on an H100."""
    queries = H // H_kv * W
    tile = tile_of(queries, D, torch.bfloat16, "sm_90").blocks["BLOCK_M"]
    return choose_splits(H_kv * triton.cdiv(queries, tile), SMS)


def attention_case(
    name: str, H: int, H_kv: int, W: int, D: int, way: str, splits: int, architecture: str,
    dtype: str = "bf16",
) -> CompileCase:  # fmt: skip
    config = tile_of(H // H_kv * W, D, DTYPES[dtype], architecture)
    block_m = config.blocks["BLOCK_M"]
    listed, indexed, in_cache = "listed" in way, "indexed" in way, "in cache" in way
    early = not listed and not indexed  # it prefetches keys and values before it waits
    prefetching = D <= 128 and in_cache and "full" not in way
    lists, window = ("num_blocks_ptr", "indices_ptr"), ("kw_ptr", "vw_ptr")
    # The next weight is the output projection, whose rows have the elements of all heads.
    weight: Any = SimpleNamespace(shape=(H * D, H * D), itemsize=DTYPES[dtype].itemsize)
    lines = odd_lines(weight) if prefetching else 0
    # The runtime's caches are full, so that C is the end of what is stored.
    absent = (
        *(() if listed else lists), *(() if indexed else ("batch_idx_ptr",)),
        *((*window, "seqlens_ptr") if in_cache else ()), *(("lse_ptr",) if splits == 1 else ()),
        *(() if "visible" in way else ("visible_ptr",)),
        *(() if prefetching else ("next_ptr",)),
    )  # fmt: skip
    constexprs = {
        "GROUP": H // H_kv, "HEAD_DIM": D, "NUM_SPLITS": splits, "KV_BLOCK": 64, **config.blocks,
        "BLOCK_D": max(64, triton.next_power_of_2(D)), **dict.fromkeys(absent),
        "NEXT_LINES": max(32 * config.num_warps, triton.next_power_of_2(lines)),
        "NEXT_ROW_LINES": lines,
    }  # fmt: skip
    integers = ("window_start_ptr", "window_length_ptr", "seqlens_ptr", "leftpad_ptr")
    types = dict.fromkeys((*integers, "batch_idx_ptr", *lists), "*i32")
    # 64 keys of 128 queries keep an SM's tensor cores busy for 1024 clocks. Its four schedulers are
    # busy for 920 if each of 8 warps has 460 instructions.
    max_loop = {64: 500, 128: 460}.get(block_m) if D == 128 and not listed else None
    return CompileCase(
        "window_attention", name, _attention_kernel, config, constexprs, f"*{dtype}",
        types=types | {"lse_ptr": "*fp32", "visible_ptr": "*i1", "softmax_scale": "fp32"},
        odd=("lists", "list_size"),
        architectures=(architecture,),
        expects_tensor_cores=block_m >= 64,
        peeks=early,
        prefetches=early,
        prefetches_in_loop=prefetching and architecture in OVERLAPPING,
        expects_wide_loads="visible" not in way,  # each key's visibility is a byte
        max_loop=None if "visible" in way else max_loop,
        # These are the row's start, length and padding, its row of the cache, and the end of what
        # is stored where the cache is not full. With a list they are also its length, and an entry
        # for each stage. What the kernel peeks at is the padding.
        scalar_load_bytes=12
        + 4 * (indexed + (not in_cache) + (1 + config.num_stages) * listed + early),
    )  # fmt: skip


def combine_case(D: int, splits: int, architectures: tuple[str, ...]) -> CompileCase:
    constexprs = {
        "HEAD_DIM": D, "NUM_SPLITS": splits, "BLOCK_M": COMBINE_QUERIES, "BLOCK_D": D,
        "lse_ptr": None,
    }  # fmt: skip
    return CompileCase(
        "window_attention", f"combine {splits} splits, head dim {D}", _combine_kernel,
        Config({}, num_warps=4), constexprs, "*bf16",
        types={"partial_lse_ptr": "*fp32", "window_length_ptr": "*i32"},
        odd=("H",),
        architectures=architectures,
        expects_wide_loads=True,
        scalar_load_bytes=4 + 2 * 4 * splits,  # the row's length; each log-sum-exp, twice
    )  # fmt: skip
