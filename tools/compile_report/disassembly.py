"""The resources and the machine code of a compiled kernel, as cuobjdump prints them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dsb_kernels._op import triton

# A line of SASS has a comment with the address, perhaps a predicate, and the opcode with modifiers.
# The groups are the address and the opcode.
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE
)
# This matches a branch; its groups are its own address and the address that it leads to.
_BRANCH = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?BRA\b.*?0x([0-9a-f]+)", re.MULTILINE
)
PREFETCH = "CCTL"  # into the L2 cache
_ACCESSES = (
    "LDG", "STG", "LDGSTS", "RED", "REDG", "ATOM", "ATOMG", "UBLKCP", "UTMALDG", "UTMASTG",
    "UTMAREDG",
)  # fmt: skip
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Disassembly:
    """What cuobjdump says about one kernel's cubin."""

    registers: int  # per thread
    stack: int  # bytes per thread
    opcodes: Counter[str]  # static instruction counts, modifiers included
    loop: list[str]  # opcodes of the longest loop that holds no other
    overlap: str  # how it overlaps with the kernel before it, see `overlap`

    def count(self, prefix: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefix))

    @property
    def spilled_bytes(self) -> int:
        """Bytes per thread of register spills, counted from the stores to local memory."""
        return sum(_width(op) * n for op, n in self.opcodes.items() if op.split(".")[0] == "STL")

    @property
    def tensor_cores(self) -> str:
        """The widest matrix instruction in the code: "UTCMMA", "HGMMA", "HMMA" or ""."""
        names = {"UTCHMMA": "UTCMMA", "UTCQMMA": "UTCMMA", "HGMMA": "HGMMA", "HMMA": "HMMA"}
        return next((name for opcode, name in names.items() if self.count(opcode)), "")

    @property
    def global_loads(self) -> dict[int, int]:
        """How many global loads (asynchronous copies too) the code has, by bytes per thread."""
        loads: Counter[int] = Counter()
        for opcode, n in self.opcodes.items():
            if opcode.split(".")[0] in ("LDG", "LDGSTS"):
                loads[_width(opcode)] += n
        return dict(loads)

    @property
    def loop_prefetches(self) -> int:
        """How many prefetches into the L2 cache the longest loop has."""
        return sum(opcode.split(".")[0] == PREFETCH for opcode in self.loop)

    @property
    def exponentials(self) -> int:
        return self.count("MUFU.EX2")


def overlap(sass: str) -> str:
    """How a kernel overlaps with the one before it, by one letter for each instruction, in order:
    V is a volatile load (`peek`), P prefetches into the L2 cache, W waits for that kernel, L lets
    the next one begin, and A accesses global memory. Several prefetches or accesses in a row are
    one letter."""
    letters = {PREFETCH: "P", "ACQBULK": "W", "PREEXIT": "L"} | dict.fromkeys(_ACCESSES, "A")
    order = [
        "V" if name == "LDG" and "STRONG" in modifiers else letters.get(name, "")
        for name, *modifiers in (opcode.split(".") for opcode in opcodes_of(sass))
    ]
    return re.sub(r"([PA])\1+", r"\1", "".join(order))


def opcodes_of(sass: str) -> list[str]:
    return [opcode for _, opcode in _INSTRUCTION.findall(sass)]


def longest_loop(sass: str) -> list[str]:
    """The opcodes of the longest loop that holds no other loop. A loop reaches from where a branch
    back leads to that branch."""
    branches = [(int(start, 16), int(end, 16)) for end, start in _BRANCH.findall(sass)]
    loops = [(start, end) for start, end in branches if start < end]
    innermost = [
        (start, end) for start, end in loops if not any(start <= s and e < end for s, e in loops)
    ]
    start, end = max(innermost, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    return [op for at, op in _INSTRUCTION.findall(sass) if start <= int(at, 16) <= end]


def _width(opcode: str) -> int:
    """Bytes that a memory instruction moves per thread, from its modifiers."""
    parts = opcode.split(".")
    for part, width in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in parts:
            return width
    return 4


def disassemble(cubin: bytes) -> Disassembly:
    """Run the cuobjdump that Triton ships on a cubin."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    match = _USAGE.search(usage)
    if match is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no resource usage: {usage!r}")
    registers, stack = int(match[1]), int(match[2])
    opcodes = Counter(opcodes_of(sass))
    return Disassembly(registers, stack, opcodes, longest_loop(sass), overlap(sass))
