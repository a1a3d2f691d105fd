"""What machine code must look like, and what ops launch: in processes without the interpreter."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton

from benchmarks import read_toml
from dsb_kernels.attention_kernel import tile_of
from dsb_runtime.engine.graphs import WIDTHS
from tools.compile_report import report
from tools.compile_report.case import OVERLAPPING
from tools.compile_report.cases import collect_cases
from tools.compile_report.disassembly import Disassembly, longest_loop, overlap
from tools.compile_report.report import ARCHITECTURES, CHIPS, Resources, failures

ROOT = Path(__file__).parent.parent
# Triton 3.6 keeps a few more registers: 4 to 92 bytes of a thread.
SPILLED_BEFORE_3_9 = (
    "lm_head_confidence margin bf16 128 candidates",
    "lm_head_confidence entropy bf16 128 candidates",
    "lm_head_confidence probability sampled fp32",
)


def run_module(*arguments: str) -> str:
    """What `python -m` prints without the interpreter that the tests run in."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Encountered an exception" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("way", ["compiled", "traced"])
def test_every_op_launches_its_kernels(way):
    """On fake tensors: arguments bind and compile, and what torch.compile sees of an op are its
    kernels."""
    run_module("tests.kernel_launches", way)


@pytest.mark.parametrize("way", ["in cache", "in cache indexed", "fresh listed"])
@pytest.mark.parametrize(("model", "group"), [("LLaDA-8B", 1), ("iLLaDA-8B", 4), ("Dream-7B", 7)])
def test_every_tile_of_window_attention_that_the_runtime_launches_is_a_case(model, group, way):
    listed = [
        (case.constexprs["GROUP"], case.constexprs["HEAD_DIM"], case.config, case.architectures)
        for case in collect_cases(["window_attention"])
        if case.name.startswith(f"{model} ") and case.name.endswith(f" rows {way}")
    ]
    architectures = ("sm_90",) if way == "in cache indexed" else ARCHITECTURES
    for architecture, width in itertools.product(architectures, WIDTHS):
        tile = tile_of(group * width, 128, torch.bfloat16, architecture)
        assert (group, 128, tile, (architecture,)) in listed, width


@pytest.mark.slow
def test_every_kernel_is_fit_for_the_chips():
    """On sm_90: no spills, no stack, shared memory of a block, tensor cores, 128-bit loads and
    1.1 exponentials per element where the case asks for them. Elsewhere: it compiles and fits. From
    sm_90 on a kernel waits for the one before it, once, before it loads or stores anything, but
    attention peeks at the row's padding, and asks for the next layer's weight in its loop."""
    output = run_module("tools.compile_report", "--json", "--jobs", "2")
    rows = [json.loads(line) for line in output.splitlines()]
    cases = [case for case in collect_cases() for _ in case.architectures]
    bad = [words for row in rows for words in row["failures"]]
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        bad = [words for words in bad if not words.startswith(SPILLED_BEFORE_3_9)]
    assert not bad, "\n".join(bad)
    for case, row in zip(cases, rows, strict=True):
        assert row["shared_bytes"] <= CHIPS[row["architecture"]].shared_bytes_block, row
        assert row["resident_blocks"] >= 1, row
        order = "V" * case.peeks + "P?WLA" + "(PA)+" * case.prefetches_in_loop
        order = order if row["architecture"] in OVERLAPPING else "A"
        assert re.fullmatch(order, row["overlap"]), row
        assert (row["loop_prefetches"] > 0) == case.prefetches_in_loop, row


@pytest.mark.slow
def test_every_configuration_of_the_sweep_is_fit_for_sm_90():
    """No spills, shared memory of a block: none is timed that production could not take."""
    output = run_module(
        "tools.compile_report", "--sweep", "--arch", "sm_90", "--json", "--jobs", "2"
    )
    rows = [json.loads(line) for line in output.splitlines()]
    assert len(rows) == sum(len(item["configs"]) for item in read_toml("sweep.toml")["sweep"])
    bad = [words for row in rows for words in row["failures"]]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("options", "interpret", "said"),
    [
        (("--op", "nope"), False, "--op nope: expected one of combine_partials, linear_add_norm, "),
        (("--jobs", "0"), False, "--jobs 0: expected at least 1"),
        ((), True, "TRITON_INTERPRET is set"),
    ],
)
def test_what_it_refuses_is_named(options, interpret, said, monkeypatch, capsys):
    monkeypatch.setattr(report, "interpreted", lambda: interpret)
    monkeypatch.setattr(sys, "argv", ["compile_report", *options])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (32, 0, 4, 16),  # 64 warps
        (128, 0, 4, 4),  # 65536 registers
        (33, 0, 1, 32),  # 32 blocks
        (32, 100, 4, 2),
        (32, 227, 4, 1),
    ],
)
def test_resident_blocks(registers, shared, warps, expected):
    """Against the CUDA occupancy calculator's results for these limits."""
    assert CHIPS["sm_90"].resident_blocks(registers, shared * 1024, warps) == expected


def test_opcodes_are_read_as_what_they_are():
    code = Disassembly(
        40, 0,
        Counter({"LDG.E.128": 2, "LDG.E.U8": 1, "LDGSTS.E.BYPASS.128": 3, "STL.64": 2, "LDL": 5,
                 "MUFU.EX2": 7, "MUFU.LG2": 1, "HGMMA.64x32x16.F32.BF16": 4, "HMMA.16816.F32": 1}),
        ["CCTL.E.PF2", "LDGSTS.E.BYPASS.128", "CCTL.E.PF2", "BRA"], "",
    )  # fmt: skip
    assert code.loop_prefetches == 2
    assert code.global_loads == {16: 5, 1: 1}
    assert code.spilled_bytes == 16
    assert code.exponentials == 7
    assert code.tensor_cores == "HGMMA"


def test_the_longest_loop_that_holds_no_other():
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/              @!P0 BRA 0x50 ;
        /*0030*/                   FADD R2, R2, R3 ;
        /*0040*/               @P1 BRA 0x30 ;
        /*0050*/                   FADD R2, R2, R3 ;
        /*0060*/                   FADD R2, R2, R3 ;
        /*0070*/              @!UP1 BRA `(.L_x_1) 0x50 ;
        /*0080*/               @P2 BRA 0x10 ;
        /*0090*/                   BRA 0x90;
    """
    assert longest_loop(sass) == ["FADD", "FADD", "BRA"]  # 0x50 to 0x70; 0x10 to 0x80 holds it
    assert longest_loop("        /*0000*/                   EXIT ;") == []


def test_how_a_kernel_overlaps_with_the_one_before_it():
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P3 CCTL.E.PF2 [R2] ;
        /*0020*/                   CCTL.E.PF2 [R4] ;
        /*0030*/                   ACQBULK ;
        /*0040*/                   PREEXIT ;
        /*0050*/               @P1 LDGSTS.E.BYPASS.128 [R6], desc[UR4][R8.64] ;
        /*0060*/                   STG.E desc[UR4][R8.64], R3 ;
    """
    assert overlap(sass) == "PWLA"
    assert overlap(sass.replace("CCTL.E.PF2 [R4]", "ATOMS.OR RZ, [R4], R5")) == "PWLA"  # is shared
    assert overlap(sass.replace("CCTL.E.PF2 [R4]", "LDG.E R2, desc[UR4][R4.64]")) == "PAWLA"
    assert overlap(sass.replace("LDC R1", "LDG.E.STRONG.SYS R1")) == "VPWLA"


def test_failures_are_named_and_printed(capsys):
    case = next(case for case in collect_cases() if case.op == "token_confidence")
    good = Resources("op", "k", "sm_90", 90, 0, 0, 0, 5, "", 1, 517, 1.03, 0, "WLA")
    assert failures(case, good) == []
    bad = Resources("op", "k", "sm_90", 90, 8, 16, 0, 5, "", 64, 600, 3.0, 2, "AWLA")
    words = " ".join(failures(case, bad))
    expected = (
        "8 bytes spilled",
        "16 bytes of stack",
        "less than 128 bits",
        "600 inst",
        "3.0 expo",
        "AWLA",
        "2 prefetches in its loop",
    )
    assert all(word in words for word in expected)
    report.print_table([bad])
    assert "sm_90 │   90 │       8 │" in capsys.readouterr().out
