"""Compile cases of unmask_and_slide."""

from __future__ import annotations

from dsb_kernels.commit_kernel import _unmask_kernel, config_of, constants
from tools.compile_report.case import CompileCase, pointers_of, signature_of

VARIANTS = (
    # K, rows, schedule, S_max, cache, rule, value, refresh commits, stops at EOS
    (32, 1, "dsb", 32, "dsb", "threshold", 0.9, "select", True),
    (32, 1, "dsb", None, "dsb", "threshold", 0.9, "first", True),
    (32, 16, "dsb", None, "dsb", "threshold", 0.9, "select", True),
    (32, 1, "dsb", None, "dsb", "frechet", 0.25, "select", True),
    (32, 1, "dsb", None, "none", "factor", 1.0, "select", False),
    (32, 1, "naive", None, "dual", "threshold", 0.9, "first", True),
    (32, 1, "naive", None, "none", "quota", 0.0, "select", False),
    (256, 1, "dsb", None, "dsb", "threshold", 0.9, "select", True),
    (256, 64, "dsb", None, "dsb", "frechet", 0.25, "select", True),
    (64, 1, "dsb", None, "dsb", "frechet", 0.25, "select", True),
    (1024, 1, "naive", None, "none", "frechet", 0.25, "select", True),
)


def cases() -> list[CompileCase]:
    """Every rule, schedule and cache policy; K = 32 as published and the widest window."""
    types = {"canvas_ptr": "*i64", "token_ptr": "*i64"}
    types |= dict.fromkeys(("confidence_ptr", "scored_ptr"), "*fp32")
    types |= dict.fromkeys(("commit_ptr", "refresh_ptr", "done_ptr"), "*i1")
    types |= dict.fromkeys(("failed_ptr", "active_ptr"), "*i1")
    listed = []
    for K, rows, schedule, max_size, cache, rule, value, commit, stop in VARIANTS:
        eos = (126081, 126348) if stop else ()
        constexprs = constants(K, rows, schedule, max_size, cache, rule, value, commit, eos)
        if rows == 1:
            constexprs["rows_ptr"] = None
        signature = signature_of(_unmask_kernel, constexprs, types)
        listed.append(
            CompileCase(
                op="unmask_and_slide",
                name=f"{schedule} cache={cache} {rule} K={K}"
                + " first" * (commit == "first")
                + f" of {rows} rows" * (rows > 1),
                kernel=_unmask_kernel,
                signature=signature,
                constexprs=constexprs,
                num_warps=config_of(K).num_warps,
                divisible=pointers_of(signature),
            )
        )
    return listed
