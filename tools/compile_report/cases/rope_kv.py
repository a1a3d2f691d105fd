"""Compile cases of rope_write_kv."""

from __future__ import annotations

from dsb_kernels.rope_kv import TILE, _rope_write_kv_kernel
from tools.compile_report.case import CompileCase

INTEGERS = (
    "window_start_ptr", "window_length_ptr", "offset_ptr", "batch_idx_ptr", "position_ptr",
)  # fmt: skip


def cases() -> list[CompileCase]:
    """The models' head dim, with a table in float32 or in the model's dtype, and with a batch that
    is the whole cache or some of its rows; and columns that are no neighbours."""
    constexprs = {"HEAD_DIM": 128, "BLOCK_D": 128, **TILE.blocks}
    return [
        CompileCase(
            "rope_write_kv",
            f"head dim 128 table {table}{' indexed' * indexed}{' scattered' * scattered}",
            _rope_write_kv_kernel, TILE,
            constexprs | ({} if indexed else {"batch_idx_ptr": None})
            | ({} if scattered else {"position_ptr": None}),
            "*bf16", types=dict.fromkeys(INTEGERS, "*i32") | {"cos_sin_ptr": f"*{table}"},
            odd=("H", "max_pos"), expects_wide_loads=not scattered,
            # These are the row's start, length and offset, and its row of the cache.
            scalar_load_bytes=16 if indexed else 12,
        )
        for table, indexed, scattered in (
            ("fp32", False, False), ("fp32", True, False), ("bf16", False, False),
            ("fp32", True, True),
        )
    ]  # fmt: skip
