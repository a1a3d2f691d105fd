"""`dsb profile`: some steps of a decoding under a profiler, every phase in a range of its name.

A whole decoding runs first: it compiles, captures and counts. Then the same decoding runs again.
CUDA's profiler, for which Nsight waits, is started and stopped around the chosen steps of it, and
so is torch's profiler where `--torch` names a file. The host enters a phase's range while it
launches the phase's kernels, but a replayed CUDA graph launches them all at once.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import PreTrainedModel

from dsb_runtime.config import DecodingConfig
from dsb_runtime.engine.engine import Engine
from dsb_runtime.engine.forward import Phase, no_phase
from dsb_runtime.engine.graphs import Capture
from dsb_runtime.engine.output import GenerationOutput
from dsb_runtime.measure.command import PlainConsole
from dsb_runtime.measure.models import add_preset
from dsb_runtime.measure.profile_tables import PREFIX, longest_table, phase_table, read_trace
from dsb_runtime.measure.timing import synchronize

NOTE = (
    "Ranges are entered by the host that launches the kernels in them: replayed CUDA graphs "
    "(--graphs) show whole steps only."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("profile")
    add_preset(group)
    add = group.add_argument
    add("--batch", type=int, default=1, metavar="B", help="default: 1")
    add("--profile-steps", type=int, default=16, metavar="N", help="steps to profile (default: 16)")
    add("--warmup", type=int, default=1, metavar="W",
        help="steps of their decoding before them (default: 1); a whole decoding runs before "
        "that")  # fmt: skip
    add("--graphs", action=argparse.BooleanOptionalAction, default=False,
        help="replay CUDA graphs: only whole steps have ranges")  # fmt: skip
    add("--torch", type=Path, metavar="TRACE.json",
        help="without Nsight: write torch's trace, print its tables")  # fmt: skip


def ranges(device: torch.device) -> Phase:
    """Ranges for phases: one of torch's profiler and, on a GPU, an NVTX range around it."""

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        nvtx: Any = torch.cuda.nvtx.range if device.type == "cuda" else contextlib.nullcontext
        with nvtx(PREFIX + name), record_function(PREFIX + name):
            yield

    return phase


class Bracket:
    """Counts a decoding's steps, puts each into a range, and runs the profilers (`trace` is torch's
    after its `prepare_trace`) for `count` steps from step `first` on."""

    def __init__(
        self,
        device: torch.device,
        first: int = 0,
        count: int = 0,
        trace: torch.profiler.profile | None = None,
    ) -> None:
        self.device, self.first, self.count, self.trace = device, first, count, trace
        self.range = ranges(device)
        self.kinds: list[str] = []  # of the steps so far
        self.running = False

    @contextlib.contextmanager
    def step(self, kind: str) -> Iterator[None]:
        """Entered around the launch of a step."""
        index = len(self.kinds)
        if self.count and index == self.first:
            self.start()
        with self.range(f"{kind} step {index}"):
            yield
        self.kinds.append(kind)
        if len(self.kinds) == self.first + self.count:
            self.stop()

    def start(self) -> None:
        synchronize(self.device)
        self.running = True
        if self.trace is not None:
            self.trace.start_trace()
        if self.device.type == "cuda":
            torch.cuda.profiler.start()

    def stop(self) -> None:
        """Stop the profilers, if they run, after all launched work has run."""
        if not self.running:
            return
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.profiler.stop()
        if self.trace is not None:
            self.trace.stop_trace()
        self.running = False


def launch_again(step: Callable[[], None]) -> Callable[[], None]:
    """In place of a capture: every replay of a step launches its kernels again."""
    return step


@dataclass(frozen=True)
class Profiled:
    """The steps that were profiled, out of a decoding of `total` steps."""

    out: GenerationOutput
    total: int
    first: int
    kinds: list[str]  # of steps first, first + 1, ...


def profile_steps(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: DecodingConfig,
    *,
    count: int,
    first: int = 0,
    graphs: bool = False,
    capture: Capture | None = None,
    trace_file: Path | None = None,
    seed: int = 0,
) -> Profiled:
    """Decode prompts (B, P) twice and profile steps `first` to `first + count - 1` of the second
    decoding, or fewer if it ends before. With `graphs`, `capture` or else CUDA graphs record the
    steps. Without, a GPU's steps are those that would be recorded, of the same classes of widths
    and lengths, launched kernel by kernel; `capture` asks for that elsewhere. torch's profiler is
    left out where there is no `trace_file`.

    Raises:
        ValueError: the decoding ends before step `first`, or `graphs` is set without a GPU.
    """
    device = model.device
    # A replay enters no phase. A capture enters each once, but its time means nothing.
    phase = no_phase if graphs else ranges(device)
    if not graphs and device.type == "cuda":
        capture = launch_again
    engine = Engine(model, graphs=graphs or capture is not None, capture=capture, phase=phase)

    def decode(bracket: Bracket) -> GenerationOutput:
        engine.loop.observer = bracket.step
        generator = torch.Generator(device).manual_seed(seed)
        try:
            return engine.generate(input_ids, config, generator=generator)
        finally:
            bracket.stop()  # the decoding may have ended or failed before the last step to profile

    counted = Bracket(device)
    decode(counted)
    total = len(counted.kinds)
    if first >= total:
        raise ValueError(
            f"--warmup {first}: the decoding has {total} steps; expected at most {total - 1}"
        )
    trace = None
    if trace_file is not None:
        trace = torch.profiler.profile()
        trace.prepare_trace()  # here, since the first step's time must not include the set-up
    bracket = Bracket(device, first, count, trace)
    out = decode(bracket)
    if trace is not None:
        trace.export_chrome_trace(str(trace_file))
    return Profiled(out, total, first, bracket.kinds[first : first + count])


def nsight_lines(
    command: Sequence[str], profiled: Profiled, layers: int, graphs: bool
) -> list[tuple[str, str]]:
    """(what it shows, command line) for each of Nsight's tools on the same run. `command` comes
    without `--torch`: CUDA's tracing has one client at a time."""
    index = profiled.kinds.index("window") if "window" in profiled.kinds else 0
    step = f"{profiled.kinds[index]} step {profiled.first + index}"
    inner = f"layer {layers // 2}: attention"
    systems = ["nsys", "profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop",
               "--trace=cuda,nvtx", "--cuda-graph-trace=node", "-o", "dsb_steps"]  # fmt: skip
    compute = ["ncu", "--profile-from-start", "off", "--nvtx", "--nvtx-include"]
    # ncu reads "a/" as the push/pop range a, and "a/b" as the range b inside of a.
    whole = [*compute, f"{PREFIX}{step}/", "-o", "dsb_step"]
    phase = [*compute, f"{PREFIX}{step}/{PREFIX}{inner}", "--set", "full", "-o", "dsb_phase"]
    lines = [("the timeline of these steps", systems), (f"each kernel of {step}", whole)]
    if not graphs:
        lines.append((f"all metrics of {inner} in it", phase))
    return [(title, shlex.join([*tool, *command])) for title, tool in lines]


def without_torch(command: Sequence[str]) -> list[str]:
    """A command line without `--torch TRACE.json`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--torch", nargs="?")
    return parser.parse_known_args(command)[1]


def describe(profiled: Profiled, asked: int, graphs: bool) -> str:
    """One line that says which steps were profiled."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(profiled.kinds).items())
    last = profiled.first + len(profiled.kinds) - 1
    short = f"; {asked} asked for, it has no more" if len(profiled.kinds) < asked else ""
    return (
        f"Profiled steps {profiled.first} to {last} ({kinds}) of a decoding of {profiled.total}, "
        f"counted from 0, CUDA graphs {'on' if graphs else 'off'}{short}."
    )


def run(
    args: argparse.Namespace,
    model: PreTrainedModel,
    input_ids: Tensor,
    config: DecodingConfig,
    command: Sequence[str],
) -> int:
    """Profile, print torch's tables if `--torch` names a file, and print the lines for Nsight."""
    profiled = profile_steps(
        model, input_ids, config, count=args.profile_steps, first=args.warmup, graphs=args.graphs,
        trace_file=args.torch, seed=args.seed or 0,
    )  # fmt: skip
    print(describe(profiled, args.profile_steps, args.graphs))
    if args.torch is not None:
        events, on_gpu = read_trace(args.torch), model.device.type == "cuda"
        for table in (longest_table(events, on_gpu), phase_table(events, on_gpu)):
            PlainConsole().print(table)
        print(f"Trace: {args.torch} (for Perfetto or chrome://tracing)")
    print(f"{NOTE}\nUnder Nsight, on a GPU:")
    layers = len(model.model.layers)
    for title, line in nsight_lines(without_torch(command), profiled, layers, args.graphs):
        print(f"\n# {title}\n{line}")
    return 0
