"""Compile cases of place_rows."""

from __future__ import annotations

from dsb_kernels.place import CONFIG, _place_rows_kernel
from dsb_kernels.rows import StepKind
from tools.compile_report.case import CompileCase

INDICES = ("canvas_ptr", "input_ids_ptr", "source_index_ptr", "noise_ids_ptr")
TYPES = dict.fromkeys(INDICES, "*i64") | {"active_ptr": "*i1", "eligible_ptr": "*i1"}


def cases() -> list[CompileCase]:
    """A window step and a refresh of one row, of a family that shifts its logits and of one that
    does not, and a window step of some of a batch's rows."""
    return [
        CompileCase(
            "place_rows", f"{name} K={K}{' shifted' * shift}", _place_rows_kernel, CONFIG,
            {"KIND": int(kind), "SHIFT": shift, "ALL": every, "BLOCK_B": B, "BLOCK_K": K,
             **CONFIG.blocks},
            types=TYPES, odd=_place_rows_kernel.arg_names,
        )
        for name, kind, shift, B, K, every in (
            ("window", StepKind.WINDOW, 0, 1, 32, True),
            ("window", StepKind.WINDOW, 1, 1, 32, True),
            ("refresh", StepKind.REFRESH, 0, 1, 32, True),
            ("refresh", StepKind.REFRESH, 1, 1, 32, True),
            ("window of 16 out of 64 rows", StepKind.WINDOW, 1, 64, 256, False),
        )
    ]  # fmt: skip
