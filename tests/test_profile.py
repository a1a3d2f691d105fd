"""`dsb profile`: ranges, brackets, tables, the lines for Nsight."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

import dsb_runtime as dsb
from dsb_runtime.cli import main as cli
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.engine.forward import Backbone
from dsb_runtime.measure.models import random_prompts
from dsb_runtime.measure.profile import Bracket, launch_again, profile_steps
from dsb_runtime.measure.profile_tables import by_kind, phase_table, read_trace, totals
from tests import golden
from tests.checkpoints import parts, write
from tests.recorded import Recorder

# 24 positions, a token a step: a refresh every eighth.
SMALL = ["--prompt-length", "12", "--gen-length", "24", "--block-length", "8", "--steps", "24"]
COMMAND = ["profile", "--device", "cpu", *SMALL, "--batch", "2", "--warmup", "3"]
ROOMS = ["norm", "qkv", "rope+write", "attention", "out", "mlp"]
ENDS = ["final norm", "score", "unmask"]


def config() -> dsb.DecodingConfig:
    return dsb.DecodingConfig(gen_length=24, block_length=8, steps=24)


@pytest.fixture(scope="module")
def model():
    return dsb.load_model(MODEL_DIR, device="cpu")


@pytest.fixture(scope="module")
def prompts(model) -> torch.Tensor:
    return random_prompts(model, dsb.load_tokenizer(MODEL_DIR), 2, 12, seed=0)


@pytest.fixture(scope="module")
def decoded(model, prompts) -> tuple[dsb.GenerationOutput, list[str]]:
    """The same decoding without a profiler, and the kinds of its steps."""
    kinds: list[str] = []
    out = dsb.generate(model, prompts, config(), on_step=lambda event: kinds.append(event.kind))
    return out, kinds


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> tuple[Path, str]:
    """One run of the command: its trace and what it printed."""
    trace, output = tmp_path_factory.mktemp("profile") / "trace.json", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setenv("COLUMNS", "120")
        assert cli.main([*COMMAND, "--profile-steps", "9", "--torch", str(trace)]) == 0
    return trace, output.getvalue()


def names(trace: Path) -> list[str]:
    """Ranges of a trace in their order."""
    result = [e for e in read_trace(trace) if e["cat"] == "user_annotation"]
    return [e["name"] for e in sorted(result, key=lambda e: (e["ts"], -e["dur"]))]


# --- ranges -----------------------------------------------------------------------------------


def test_a_trace_names_every_step_and_every_phase(profiled, decoded):
    trace, _ = profiled
    expected = []
    for index in range(3, 12):
        expected += [f"{decoded[1][index]} step {index}", "place", "embed"]
        expected += [f"layer {layer}: {room}" for layer in range(4) for room in ROOMS]
        expected += ENDS
    assert names(trace) == [f"dsb: {name}" for name in expected]
    assert decoded[1][3:12].count("refresh") == 1


def test_profiling_changes_no_token(model, prompts, decoded, tmp_path, cuda_calls):
    for file in (None, tmp_path / "trace.json"):
        result = profile_steps(model, prompts, config(), first=2, count=5, trace_file=file)
        assert torch.equal(result.out.sequences, decoded[0].sequences)
        assert result.out.tokens_per_forward == decoded[0].tokens_per_forward
        assert (result.total, result.first, result.kinds) == (24, 2, decoded[1][2:7])
    assert cuda_calls == [], "a CPU has no NVTX"


def test_steps_that_would_be_captured_are_profiled_kernel_by_kernel(
    model, prompts, decoded, tmp_path, monkeypatch
):
    """As on a GPU, where `generate` captures steps for prompts of many lengths: refreshes compute
    them as padded rows, by other kernels."""
    padded, forward, trace = [], Backbone.__call__, tmp_path / "trace.json"

    def watch(*args, **options):
        padded.append(options["padded"])
        return forward(*args, **options)

    monkeypatch.setattr(Backbone, "__call__", watch)
    result = profile_steps(
        model, prompts, config(), count=2, capture=launch_again, trace_file=trace
    )
    assert torch.equal(result.out.sequences, decoded[0].sequences) and all(padded)
    assert sum(name.endswith("attention") for name in names(trace)) == 2 * 4
    profile_steps(model, prompts, config(), count=2)
    assert not all(padded)


def test_the_same_seed_draws_the_same_tokens(model, prompts, tmp_path):
    settings = {"gen_length": 24, "block_length": 8, "temperature": 1.0, "stop_at_eos": False}
    result = profile_steps(model, prompts, dsb.DecodingConfig(**settings), count=2, seed=7,
                          trace_file=tmp_path / "trace.json")  # fmt: skip
    alone = dsb.generate(model, prompts, generator=torch.Generator().manual_seed(7), **settings)
    assert torch.equal(result.out.sequences, alone.sequences)


def test_replayed_steps_have_ranges_and_no_phases(model, prompts, decoded, tmp_path):
    """Steps run ahead of the host's look; some may move no row."""
    trace = tmp_path / "trace.json"
    result = profile_steps(model, prompts, config(), first=2, count=99, graphs=True,
                          capture=Recorder(), trace_file=trace)  # fmt: skip
    assert torch.equal(result.out.sequences, decoded[0].sequences)
    assert len(result.kinds) == result.total - 2 >= result.out.nfe - 2 == 22
    assert names(trace) == [f"dsb: {kind} step {i + 2}" for i, kind in enumerate(result.kinds)]
    shown = phase_table(read_trace(trace), on_gpu=False)
    assert list(shown.columns[0].cells) == ["outside of phases", "whole step"]


def test_steps_are_as_many_as_there_are(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    options = ["--warmup", "20", "--profile-steps", "9", "--torch", str(trace)]
    assert cli.main([*COMMAND, *options]) == 0
    assert sum(" step " in name for name in names(trace)) == 4
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("Profiled steps 20 to 23 (4 window) of a decoding of 24,")
    assert "; 9 asked for, it has no more." in first


def test_a_decoding_that_fails_leaves_no_profiler_running(tmp_path, monkeypatch):
    model = dsb.load_model(write(tmp_path / "model", *parts("llada")), device="cpu")
    ids, start, brackets = torch.tensor([[5, 6, 7, 8, 9]]), Bracket.start, []

    def poison(bracket: Bracket) -> None:
        brackets.append(bracket)
        start(bracket)
        model.model.norm.weight.data[3] = float("nan")

    monkeypatch.setattr(Bracket, "start", poison)
    with pytest.raises(FloatingPointError, match="step 1"):
        profile_steps(model, ids, config(), first=1, count=5, trace_file=tmp_path / "a.json")
    assert [bracket.running for bracket in brackets] == [False]
    monkeypatch.undo()
    model, trace = golden.model("llada"), tmp_path / "b.json"
    assert len(profile_steps(model, ids, config(), count=2, trace_file=trace).kinds) == 2
    assert sum(" step " in name for name in names(trace)) == 2


@pytest.fixture
def cuda_calls(monkeypatch) -> list[str]:
    """What is called of CUDA, which there need not be."""
    calls: list[str] = []

    @contextlib.contextmanager
    def nvtx(name: str) -> Any:
        calls.append(f"push {name}")
        yield
        calls.append("pop")

    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: calls.append("wait"))
    return calls


def test_what_a_gpu_is_told(cuda_calls):
    """Nsight starts and stops between finished steps; each has its NVTX range, phases in it."""
    bracket = Bracket(torch.device("cuda"), first=1, count=2)
    for kind in ("refresh", "window", "window", "refresh"):
        with bracket.step(kind), bracket.range("embed"):
            pass
    bracket.stop()

    def step(kind: str, index: int) -> list[str]:
        return [f"push dsb: {kind} step {index}", "push dsb: embed", "pop", "pop"]

    assert cuda_calls == [
        *step("refresh", 0), "wait", "start", *step("window", 1), *step("window", 2), "wait",
        "stop", *step("refresh", 3),
    ]  # fmt: skip


# --- tables -----------------------------------------------------------------------------------


def test_the_tables_name_phases_and_operators(profiled):
    trace, output = profiled
    phases = ["place", "embed", *(f"layer: {room}" for room in ROOMS), *ENDS]
    assert all(output.count(f"│ {label} ") == 1 for label in (*phases, "whole step"))
    operators = totals(read_trace(trace), on_gpu=False)
    assert len(operators) > 10 and {"aten::mm", "aten::addmm_"} <= {t.name for t in operators}
    shown = [line.split("│")[1].strip() for line in output.splitlines() if "│ aten::" in line]
    assert shown == [t.name for t in operators[:10] if t.name.startswith("aten::")]
    kinds = by_kind(read_trace(trace), on_gpu=False)
    assert {kind: each.steps for kind, each in kinds.items()} == {"window": 8, "refresh": 1}
    for each in kinds.values():
        assert [p.name for p in each.phases] == phases
        assert {p.calls // each.steps for p in each.phases} == {1, 4}
        assert 0.5 * each.us < sum(p.us for p in each.phases) < each.us


def test_own_times_are_those_of_torch(tmp_path):
    """torch sums them up itself, from what it recorded rather than from the file."""
    x, file = torch.randn(64, 64), tmp_path / "trace.json"
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            torch.nn.functional.rms_norm(x @ x, (64,)).softmax(-1).std()
    profiler.export_chrome_trace(str(file))
    theirs = {e.key: e for e in profiler.key_averages() if e.key.startswith("aten::")}
    ours = totals(read_trace(file), on_gpu=False)
    assert {t.name: t.calls for t in ours} == {name: e.count for name, e in theirs.items()}
    for t in ours:  # the file has ns
        assert t.us == pytest.approx(theirs[t.name].self_cpu_time_total, abs=0.01 * t.calls)
    assert [t.us for t in ours] == sorted((t.us for t in ours), reverse=True)


def gpu_trace() -> list[dict[str, Any]]:
    """Two window steps as torch records them on a GPU; kernels run later than they are launched."""
    events: list[dict[str, Any]] = []

    def add(cat: str, name: str, ts: float, dur: float, **args: int) -> None:
        events.append({"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args})

    for step in (0, 1):
        microsecond, number = 1000.0 * step, 10 * step
        add("user_annotation", f"dsb: window step {step}", microsecond, 100)
        add("user_annotation", "dsb: layer 0: qkv", microsecond + 10, 20)
        add("user_annotation", "dsb: layer 1: qkv", microsecond + 30, 20)
        add("gpu_user_annotation", "dsb: layer 0: qkv", microsecond + 200, 7)
        add("cuda_runtime", "cudaLaunchKernel", microsecond + 15, 2, correlation=number)
        add("cuda_driver", "cuLaunchKernelEx", microsecond + 40, 2, correlation=number + 1)
        add("cuda_runtime", "cudaMemcpyAsync", microsecond + 60, 2, correlation=number + 2)
        add(
            "cuda_runtime", "cudaLaunchKernel", microsecond + 500, 2, correlation=number + 3
        )  # no step's
        add("cpu_op", "aten::mm", microsecond + 12, 10)
        add("kernel", "gemm", microsecond + 200, 7, correlation=number)
        add("kernel", "gemm", microsecond + 210, 5, correlation=number + 1)
        add("gpu_memcpy", "Memcpy DtoH", microsecond + 220, 3, correlation=number + 2)
        add("kernel", "fill", microsecond + 510, 1, correlation=number + 3)
    return events


def test_gpu_time_belongs_to_where_it_was_launched():
    events = gpu_trace()
    (kind,) = by_kind(events, on_gpu=True).values()
    assert (kind.steps, kind.us) == (2, 30)
    assert [(p.name, p.calls, p.us) for p in kind.phases] == [("layer: qkv", 4, 24)]
    result = [(t.name, t.calls, t.us) for t in totals(events, on_gpu=True)]
    assert result == [("gemm", 4, 24), ("Memcpy DtoH", 2, 6), ("fill", 2, 2)]
    columns = [list(column.cells) for column in phase_table(events, on_gpu=True).columns]
    assert columns == [
        ["layer: qkv", "outside of phases", "whole step"], ["2", "", "1"],
        ["0.012", "0.003", "0.015"], ["80.0%", "20.0%", "100.0%"],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="holds no kernel"):
        totals([e for e in events if e["cat"] == "cpu_op"], on_gpu=True)


# --- the lines for Nsight ---------------------------------------------------------------------


def lines_of(output: str) -> list[list[str]]:
    """The words of each command line that was printed."""
    lines = output.splitlines()
    return [shlex.split(line) for line in lines if line.startswith(("nsys ", "ncu "))]


def test_the_lines_run_what_was_run(profiled):
    trace, output = profiled
    systems, step, phase = lines_of(output)
    command = ["dsb", *COMMAND, "--profile-steps", "9"]
    assert systems == [
        "nsys", "profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop",
        "--trace=cuda,nvtx", "--cuda-graph-trace=node", "-o", "dsb_steps", *command,
    ]  # fmt: skip
    ncu = ["ncu", "--profile-from-start", "off", "--nvtx", "--nvtx-include"]
    assert step == [*ncu, "dsb: window step 3/", "-o", "dsb_step", *command]
    include = phase[len(ncu)]
    assert phase == [*ncu, include, "--set", "full", "-o", "dsb_phase", *command]
    assert set(include.split("/")) <= set(names(trace)), "only ranges that there are"


def test_a_process_prints_its_own_command_line(tmp_path, monkeypatch, capsys):
    """Of a preset, which commits 3.5 tokens a step: 7 steps."""
    trace = tmp_path / "a trace.json"
    argv = [sys.executable, "-m", "dsb_runtime", "profile", "--preset", "tiny-dream", "--device",
            "cpu", *SMALL[:-2], "--prefix-window", "4", "--warmup", "0"]  # fmt: skip
    monkeypatch.setattr(sys, "orig_argv", [*argv, f"--torch={trace}"])
    monkeypatch.setattr(sys, "argv", sys.orig_argv[2:])
    assert cli.main() == 0
    output = capsys.readouterr().out
    lines = lines_of(output)
    assert len(lines) == 3 and all(line[-len(argv) :] == argv for line in lines)
    assert output.startswith("Profiled steps 0 to 6 (")
    ranges = names(trace)
    assert ranges.count("dsb: layer 1: mlp") == 7 and "dsb: layer 2: mlp" not in ranges
