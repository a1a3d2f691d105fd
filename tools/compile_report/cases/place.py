"""Compile cases of place_rows."""

from __future__ import annotations

from dsb_kernels.place import CONFIG, _place_rows_kernel
from dsb_kernels.rows import StepKind
from tools.compile_report.case import CompileCase, pointers_of, signature_of

INDICES = ("canvas_ptr", "input_ids_ptr", "source_index_ptr", "noise_ids_ptr")


def cases() -> list[CompileCase]:
    """Each kind of step of one row, and windows of some of a batch's rows."""
    types = dict.fromkeys(INDICES, "*i64")
    types |= dict.fromkeys(("active_ptr", "eligible_ptr"), "*i1")
    listed = []
    for name, kind, B, K, every in (
        ("window", StepKind.WINDOW, 1, 32, True),
        ("refresh", StepKind.REFRESH, 1, 32, True),
        ("window of 16 out of 64 rows", StepKind.WINDOW, 64, 256, False),
    ):
        constexprs = {"KIND": int(kind), "SHIFT": 1, "ALL": every, "BLOCK_B": B, "BLOCK_K": K}
        constexprs |= CONFIG.blocks
        signature = signature_of(_place_rows_kernel, constexprs, types)
        listed.append(
            CompileCase(
                op="place_rows",
                name=f"{name} K={K}",
                kernel=_place_rows_kernel,
                signature=signature,
                constexprs=constexprs,
                num_warps=CONFIG.num_warps,
                divisible=pointers_of(signature),
            )
        )
    return listed
