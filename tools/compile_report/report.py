"""`python -m tools.compile_report`: compile every kernel for every architecture, without a GPU.

The report has each kernel's resources (registers, spills, stack, shared memory, resident blocks per
SM) and what its disassembly shows (tensor cores, width of loads, instructions of the longest loop,
exponentials per element).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from dsb_kernels._configs import ARCHITECTURES
from dsb_kernels._op import interpreted, triton
from tools.compile_report.case import OVERLAPPING, CompileCase
from tools.compile_report.cases import collect_cases
from tools.compile_report.cases.sweep import sweep_cases
from tools.compile_report.disassembly import disassemble


@dataclass(frozen=True)
class Chip:
    """Limits of one SM (CUDA C++ Programming Guide, compute capabilities)."""

    shared_bytes: int  # of an SM
    shared_bytes_block: int  # the most that one block may have
    registers: int = 65536
    warps: int = 64
    blocks: int = 32

    def resident_blocks(self, registers: int, shared: int, warps: int) -> int:
        """Blocks of a kernel that fit on one SM together."""
        per_warp = -(-registers * 32 // 256) * 256  # registers are allocated in units of 256
        by_registers = self.registers // (per_warp * warps)
        by_shared = self.shared_bytes // (shared + 1024)  # 1 KiB of each block is reserved
        return min(by_registers, by_shared, self.warps // warps, self.blocks)


CHIPS = {
    "sm_80": Chip(shared_bytes=164 * 1024, shared_bytes_block=163 * 1024),
    # These are RTX 40 and L4; RTX 30, RTX 50 and A10 have the same shared memory.
    "sm_89": Chip(shared_bytes=100 * 1024, shared_bytes_block=99 * 1024, warps=48, blocks=24),
    "sm_90": Chip(shared_bytes=228 * 1024, shared_bytes_block=227 * 1024),
    "sm_100": Chip(shared_bytes=228 * 1024, shared_bytes_block=227 * 1024),
}


@dataclass(frozen=True)
class Resources:
    """What one kernel in one configuration needs on one architecture."""

    op: str
    name: str
    architecture: str
    registers: int
    spilled_bytes: int
    stack: int
    shared_bytes: int
    resident_blocks: int
    tensor_cores: str
    narrow_loads: int  # bytes per thread (static) of global loads of less than 128 bits
    loop: int  # instructions of the longest loop that holds no other
    exponentials: float | None  # per element, where the case says how to count them
    loop_prefetches: int = 0  # of its instructions
    overlap: str = ""  # how it overlaps with the kernel before it, see `disassembly.overlap`
    failures: tuple[str, ...] = ()  # what keeps it from being fit for sm_90, in words


def compile_case(case: CompileCase, architecture: str) -> Resources:
    """Compile one case with Triton's own compiler and read the result's disassembly."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    overlapping = architecture in OVERLAPPING
    values = {**case.constexprs, "PDL": overlapping}
    constexprs = {(names.index(name),): value for name, value in values.items()}
    warps = case.config.num_warps
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32),
        options={
            "num_warps": warps, "num_stages": case.config.num_stages, "enable_fp_fusion": True,
            "launch_pdl": overlapping,
        },
    )  # fmt: skip
    code = disassemble(compiled.asm["cubin"])
    shared, elements = compiled.metadata.shared, case.elements_per_thread
    resources = Resources(
        op=case.op,
        name=case.name,
        architecture=architecture,
        registers=code.registers,
        spilled_bytes=code.spilled_bytes,
        stack=code.stack,
        shared_bytes=shared,
        resident_blocks=CHIPS[architecture].resident_blocks(code.registers, shared, warps),
        tensor_cores=code.tensor_cores,
        narrow_loads=sum(width * n for width, n in code.global_loads.items() if width < 16),
        loop=len(code.loop),
        loop_prefetches=code.loop_prefetches,
        exponentials=None if elements is None else code.exponentials / elements,
        overlap=code.overlap,
    )
    if architecture != "sm_90":
        return resources
    return dataclasses.replace(resources, failures=tuple(failures(case, resources)))


def _compile_indexed(job: tuple[int, Sequence[str], str, bool]) -> Resources:
    """Compile a case in a worker. Cases hold kernels, which cannot be pickled, so that the worker
    gets the index of its case."""
    index, ops, architecture, sweep = job
    return compile_case(chosen_cases(ops, sweep)[index], architecture)


def chosen_cases(ops: Sequence[str], sweep: bool) -> list[CompileCase]:
    """What production launches, or the configurations that may take its place."""
    return sweep_cases(ops) if sweep else collect_cases(ops)


def compile_all(
    architectures: Sequence[str], ops: Sequence[str], jobs: int, sweep: bool = False
) -> list[Resources]:
    """The resources of every case on every architecture that it names, in a fixed order."""
    work = [
        (index, ops, architecture, sweep)
        for index, case in enumerate(chosen_cases(ops, sweep))
        for architecture in architectures
        if architecture in case.architectures
    ]
    if jobs == 1:
        return [_compile_indexed(job) for job in work]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(_compile_indexed, work))


def failures(case: CompileCase, resources: Resources) -> list[str]:
    """What keeps a kernel from being fit for sm_90, in words; empty if nothing does."""
    limit = CHIPS["sm_90"].shared_bytes_block
    order = "V" * case.peeks + "P" * case.prefetches + "WLA" + "PA" * case.prefetches_in_loop
    checks = [
        (resources.spilled_bytes == 0, f"{resources.spilled_bytes} bytes spilled"),
        (resources.stack == 0, f"{resources.stack} bytes of stack"),
        (resources.shared_bytes <= limit, f"{resources.shared_bytes} bytes of shared memory"),
        (resources.resident_blocks >= 1, "does not fit on an SM"),
        (
            resources.overlap == order,
            f"prefetches, wait, launch and accesses in the order {resources.overlap}",
        ),
        (
            (resources.loop_prefetches > 0) == case.prefetches_in_loop,
            f"{resources.loop_prefetches} prefetches in its loop",
        ),
        (not case.expects_tensor_cores or resources.tensor_cores == "HGMMA", "no HGMMA"),
        (
            not case.expects_wide_loads or resources.narrow_loads <= case.scalar_load_bytes,
            f"{resources.narrow_loads} bytes a thread by loads of less than 128 bits",
        ),
    ]
    if case.max_loop is not None:
        loop = resources.loop
        checks.append((0 < loop <= case.max_loop, f"{loop} instructions in its loop"))
    if case.max_exponentials is not None:
        count = resources.exponentials
        # Less than one means that the elements of the code were not counted right.
        good = count is not None and 1 <= count <= case.max_exponentials
        checks.append((good, f"{count} exponentials per element"))
    return [f"{resources.op} {resources.name}: {words}" for good, words in checks if not good]


def print_table(resources: Sequence[Resources]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Kernels as compiled (per thread: registers, spills and stack)")
    for heading in (
        "op", "kernel", "arch", "regs", "spill B", "stack B", "shared KiB", "blocks/SM",
        "tensor cores", "narrow loads", "loop", "exp/elem",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("op", "kernel") else "right")
    for r in resources:
        exponentials = "" if r.exponentials is None else f"{r.exponentials:.2f}"
        table.add_row(
            r.op, r.name, r.architecture, str(r.registers), str(r.spilled_bytes), str(r.stack),
            f"{r.shared_bytes / 1024:.1f}", str(r.resident_blocks), r.tensor_cores or "-",
            f"{r.narrow_loads} B", str(r.loop or "-"), exponentials,
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.compile_report", description=__doc__)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--op", action="append", default=[], help="only this op (repeatable)")
    parser.add_argument(
        "--sweep", action="store_true", help="the configurations of benchmarks/sweep.toml instead"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--jobs", type=int, default=1, help="compiler processes")
    args = parser.parse_args()
    if triton is None:
        parser.error("Triton is not installed")
    if interpreted():
        parser.error("TRITON_INTERPRET is set: kernels cannot be compiled then")
    known = sorted({case.op for case in collect_cases()})
    for op in args.op:
        if op not in known:
            parser.error(f"--op {op}: expected one of {', '.join(known)}")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: expected at least 1")
    resources = compile_all(args.arch or ARCHITECTURES, args.op, args.jobs, args.sweep)
    if args.json:
        for r in resources:
            print(json.dumps(dataclasses.asdict(r)))
    else:
        print_table(resources)
        print("\n".join(words for r in resources for words in r.failures) or "Nothing failed.")
