"""Compile cases of rope_write_kv."""

from __future__ import annotations

from typing import Any

from dsb_kernels.rope_kv import TILE, _rope_write_kv_kernel
from tools.compile_report.case import CompileCase, all_but, signature_of


def cases() -> list[CompileCase]:
    """The models' head dim; a table in float32 and in the model's dtype; a batch that is the
    cache's and one that is some of its rows."""
    integers = ("window_start_ptr", "window_length_ptr", "offset_ptr", "batch_idx_ptr")
    listed = []
    for table, indexed in (("fp32", False), ("fp32", True), ("bf16", False)):
        constexprs: dict[str, Any] = {"HEAD_DIM": 128, "BLOCK_D": 128, **TILE.blocks}
        constexprs |= {} if indexed else {"batch_idx_ptr": None}
        types = dict.fromkeys(integers, "*i32") | {"cos_sin_ptr": f"*{table}"}
        signature = signature_of(_rope_write_kv_kernel, constexprs, types, "*bf16")
        listed.append(
            CompileCase(
                op="rope_write_kv",
                name=f"head dim 128 table {table}{' indexed' * indexed}",
                kernel=_rope_write_kv_kernel,
                signature=signature,
                constexprs=constexprs,
                num_warps=TILE.num_warps,
                num_stages=TILE.num_stages,
                divisible=all_but(signature, "H", "max_pos"),
                expects_wide_loads=True,
                # The row's start, length and offset, and the cache's row.
                scalar_load_bytes=16 if indexed else 12,
            )
        )
    return listed
