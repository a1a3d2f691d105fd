"""The cases that are compiled: every kernel in every production configuration, in a file by op."""

from collections.abc import Sequence

from tools.compile_report.case import CompileCase
from tools.compile_report.cases import attention, commit, confidence, linear, place, rope_kv

OPS = (attention, commit, confidence, linear, place, rope_kv)


def collect_cases(ops: Sequence[str] = ()) -> list[CompileCase]:
    """The cases of all ops, or of the ops that are named."""
    return [case for module in OPS for case in module.cases() if not ops or case.op in ops]
