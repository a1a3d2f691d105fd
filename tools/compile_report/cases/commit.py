"""Compile cases of unmask_and_slide."""

from __future__ import annotations

from dataclasses import replace

from dsb_kernels._configs import ARCHITECTURES
from dsb_kernels.commit_kernel import _unmask_kernel, config_of, constants
from dsb_kernels.rows import UnmaskSpec
from tools.compile_report.case import CompileCase

LLADA = UnmaskSpec(
    block_length=32, max_block_length=None, schedule="dsb", cache="dsb",
    prefix_window=24, min_prefix=0, rule="threshold", rule_value=0.9, steps=1,
    refresh_commit="select", mask_id=126336, eos_ids=(126081, 126348), stop_at_eos=True,
)  # fmt: skip
FRECHET = {"rule": "frechet", "rule_value": 0.25}
VARIANTS: tuple[tuple[int, int, dict[str, object]], ...] = (
    # candidates of a row, rows scored, what differs from LLADA
    (32, 1, {}),
    (256, 64, FRECHET),
    (1024, 1, {"schedule": "naive", "cache": "none", **FRECHET}),
    (32, 1, {"refresh_commit": "first"}),
    (32, 16, {}),
    (32, 1, FRECHET),
    (32, 1, {"cache": "none", "rule": "factor", "rule_value": 1.0, "stop_at_eos": False}),
    (32, 1, {"schedule": "naive", "cache": "dual", "refresh_commit": "first"}),
    (32, 1, {"schedule": "naive", "cache": "none", "rule": "quota", "stop_at_eos": False}),
    (32, 1, {"rule": "entropy", "rule_value": 0.4}),
    (32, 1, {"rule": "eb", "rule_value": 0.4}),
    (32, 1, {"progress": 0.5}),
    (32, 1, {"eos_bound": True}),
    (256, 1, {}),
    (64, 1, FRECHET),
    (32, 1, {"stop_at_eos": False}),
    (32, 1, {"refresh_commit": "first", "stop_at_eos": False}),
)
EVERYWHERE = 3  # of them, one of each configuration; the others are compiled for sm_90 alone
TYPES = {
    "canvas_ptr": "*i64", "token_ptr": "*i64", "confidence_ptr": "*fp32",
    "candidate_confidence_ptr": "*fp32", "commit_ptr": "*i1", "active_ptr": "*i1",
}  # fmt: skip


def cases() -> list[CompileCase]:
    """Every rule, schedule and cache policy, with 32 candidates as published and with many."""
    return [
        case(K, rows, replace(LLADA, **changes), everywhere=index < EVERYWHERE)  # type: ignore[arg-type]
        for index, (K, rows, changes) in enumerate(VARIANTS)
    ]


def case(K: int, rows: int, spec: UnmaskSpec, everywhere: bool) -> CompileCase:
    name = f"{spec.schedule} cache={spec.cache} {spec.rule} K={K}"
    name += " progress" * (spec.progress > 0) + " without EOS" * (not spec.stop_at_eos)
    name += " first" * (spec.refresh_commit == "first") + f" of {rows} rows" * (rows > 1)
    constexprs = constants(K, rows, spec) | ({"rows_ptr": None} if rows == 1 else {})
    return CompileCase(
        "unmask_and_slide", name, _unmask_kernel, config_of(K), constexprs,
        types=TYPES, odd=_unmask_kernel.arg_names,
        architectures=ARCHITECTURES if everywhere else ("sm_90",),
    )  # fmt: skip
