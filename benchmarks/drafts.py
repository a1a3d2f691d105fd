"""Forwards that drafts save, what they cost on this machine, and what that means for a large model.

    python -m benchmarks.drafts --task sudoku --json benchmarks/drafts_sudoku.json
    python -m benchmarks.drafts --lowered 0.9 0.95 1 --threshold 0.7 0.9 0.99

The first command measures every rule without drafts and with them; the second the rule `threshold`
with draft thresholds of so many times its value. The tokens must be equal to those without drafts.
Forwards are those of each row. Times are this process's CPU time, which other processes change
least. The last columns are **computed**, not measured: they take the counts of forwards from here
and the time of a forward from the roofline of LLaDA-8B on an H100 (`benchmarks/roofline.py`, 1024
prompt and 256 response positions, batch 1).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel

import dsb_runtime as dsb
from benchmarks import batches_of, print_lines, problems_parser, record_of
from benchmarks.roofline import GPUS, budget
from benchmarks.step_cost import StepSize
from dsb_runtime.cli.process import run_process
from dsb_runtime.demo.tasks import TASKS
from dsb_runtime.measure.models import PRESETS

CACHES = ("none", "dsb")
PROMPT, GEN, BLOCK = 1024, 256, 32  # of the computed columns
WINDOW = BLOCK + 24  # with LLaDA's published prefix window


def schedules_of(block_length: int) -> dict[str, dict[str, Any]]:
    """The schedules by their names, the two that `--lowered` measures at the ends."""
    shape = {"block_length": block_length}
    return {
        "naive": {**shape, "schedule": "naive"},
        "DSB const": {**shape, "max_block_length": block_length},
        "DSB greedy": shape,
    }


def settings_of(
    gen_length: int, block_length: int, thresholds: Sequence[float], lowered: bool
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What names a setting, and the setting."""
    rules: dict[str, dict[str, Any]] = {"one token a step": {"steps": gen_length}}
    rules |= {f"threshold {value:g}": {"threshold": value} for value in thresholds}
    rules |= {
        "factor 1": {"factor": 1.0}, "frechet 0.25": {"frechet": 0.25},
        "entropy 0.4": {"entropy": 0.4}, "eb 0.2": {"eb": 0.2},
        "progress 0.3": {"threshold": 0.9, "progress": 0.3},
        "margin 0.9": {"threshold": 0.9, "confidence": "margin"},
    }  # fmt: skip
    for schedule, settings in schedules_of(block_length).items():
        for rule, setting in rules.items():
            if lowered and (schedule == "DSB const" or not rule.startswith("threshold")):
                continue
            for cache in CACHES:
                name = {"rule": rule, "schedule": schedule, "block": block_length, "cache": cache}
                how = {**settings, **setting, "cache": cache}
                yield name, {**how, "gen_length": gen_length, "stop_at_eos": True}


def step_ms() -> dict[str, float]:
    """The floor of a forward of LLaDA-8B on an H100: of each kind, and of each with a draft.

    A draft doubles the positions of a window step; its attention reads the K/V a second time. With
    cache="none" it is another canvas.
    """
    preset, gpu, length = PRESETS["llada-8b"], GPUS["h100"], PROMPT + GEN

    def floor(kind: str, canvases: int, tokens: int) -> Any:
        scored = BLOCK * tokens // (WINDOW if kind == "window" else length)
        return budget(preset, kind, StepSize(canvases, tokens, scored, length, GEN, 2), gpu)

    window, refresh = floor("window", 1, WINDOW), floor("refresh", 1, length)
    drafted = floor("window", 1, 2 * WINDOW)
    second_read = window.phases["attention"]["cache"] / (gpu.gb_per_s * 1e9) * 1e3
    return {
        "window": window.floor_ms, "refresh": refresh.floor_ms,
        "window+draft": drafted.floor_ms + second_read,
        "refresh+draft": floor("refresh", 2, 2 * length).floor_ms,
    }  # fmt: skip


def decode(
    model: PreTrainedModel, batches: list[Any], config: dsb.DecodingConfig
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Decode all problems. Returns the sequences, and the forwards of rows by kind, their drafts,
    their tokens and the time."""
    kinds: Counter[str] = Counter()
    sequences, run, accepted, tokens = [], 0, 0, 0

    def watch(event: dsb.StepEvent) -> None:
        if not event.draft:
            kinds[event.kind] += len(event.rows)

    began = time.process_time()
    for _, ids, mask in batches:
        out = dsb.generate(model, ids, config, attention_mask=mask, on_step=watch)
        sequences.append(out.sequences)
        run, accepted = run + out.drafts.run, accepted + out.drafts.accepted
        tokens += sum(out.row_tokens)
    return sequences, {
        "kinds": dict(kinds), "run": run, "accepted": accepted, "tokens": tokens,
        "cpu_seconds": time.process_time() - began,
    }  # fmt: skip


def computed_ms(counts: dict[str, Any], kind_of_drafts: str, ms: dict[str, float]) -> float:
    """What the forwards of a decoding take at the floor."""
    whole = sum(count * ms[kind] for kind, count in counts["kinds"].items())
    return whole + counts["run"] * (ms[f"{kind_of_drafts}+draft"] - ms[kind_of_drafts])


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line for each task, setting and draft threshold."""
    lines, ms = [], step_ms()
    for task in map(TASKS.__getitem__, args.task):
        model, _, batches = batches_of(task, args)
        for name, how in (
            setting
            for block in args.block_length or task.compared
            for setting in settings_of(task.gen_length, block, args.threshold, bool(args.lowered))
        ):
            expected, plain = decode(model, batches, dsb.DecodingConfig(**how))
            kind = "refresh" if name["cache"] == "none" else "window"
            floor = computed_ms(plain, kind, ms)
            for lowered in args.lowered or [None]:  # None is the engine's own
                guess = None if lowered is None else lowered * how["threshold"]
                config = dsb.DecodingConfig(**how, drafts=1, draft_threshold=guess)
                sequences, drafted = decode(model, batches, config)
                assert all(map(torch.equal, sequences, expected)), name
                lines.append({
                    "task": task.name, **name, "lowered": lowered, "problems": args.problems,
                    "forwards": sum(plain["kinds"].values()),
                    "forwards_with_drafts": sum(drafted["kinds"].values()),
                    "run": drafted["run"], "accepted": drafted["accepted"],
                    "cpu_time_ratio": drafted["cpu_seconds"] / plain["cpu_seconds"],
                    "computed_speedup": floor / computed_ms(drafted, kind, ms),
                    "computed_tokens_per_second": 1e3 * plain["tokens"] / floor,
                })  # fmt: skip
    return lines


NAMES = {"task": "left", "rule": "left", "schedule": "left", "block": "right"}


def forwards(line: dict[str, Any], name: str = "forwards") -> str:
    """Those of a problem."""
    return f"{line[name] / line['problems']:.2f}"


def tokens_per_second(line: dict[str, Any]) -> str:
    """Computed, without drafts and with them."""
    rate = line["computed_tokens_per_second"]
    return f"{rate:.0f} → {rate * line['computed_speedup']:.0f}"


def forwards_saved(line: dict[str, Any]) -> str:
    """The forwards without drafts and with them, and how many of the guesses were right."""
    right = f" ({line['accepted'] / line['run']:.0%})" if line["run"] else ""
    return f"{forwards(line)} → {forwards(line, 'forwards_with_drafts')}{right}"


# What a table shows of a setting with one draft threshold.
SHOWN: dict[str, Callable[[dict[str, Any]], str]] = {
    "forwards (guesses right)": forwards_saved,
    "CPU time": lambda line: f"{line['cpu_time_ratio']:.2f}",
    "H100 tokens/s, computed": tokens_per_second,
}


def print_all(lines: list[dict[str, Any]]) -> None:
    """A line for each setting and draft threshold."""
    print_lines(
        {**NAMES, "cache": "left", "guess from": "right"} | dict.fromkeys(SHOWN, "right"),
        [
            [*(str(line[name]) for name in NAMES), line["cache"],
             "" if line["lowered"] is None else f"{line['lowered']:g} τ",
             *(show(line) for show in SHOWN.values())]
            for line in lines
        ],
        False,
    )  # fmt: skip


def print_by_cache(lines: list[dict[str, Any]]) -> None:
    """Markdown with a line for each setting, and the caches side by side."""
    settings: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for show in SHOWN.values():
        for line in sorted(lines, key=lambda line: CACHES.index(line["cache"])):
            settings[tuple(str(line[name]) for name in NAMES)].append(show(line))
    columns = {f"{what}, `{cache}`": "right" for what in SHOWN for cache in CACHES}
    print_lines(NAMES | columns, [[*name, *cells] for name, cells in settings.items()], True)


def print_by_guess(lines: list[dict[str, Any]]) -> None:
    """Markdown with a line for each task, block and cache, and the draft thresholds side by side:
    forwards, as the mean over rules and schedules."""
    means: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        of = means[line["task"], str(line["block"]), f"`{line['cache']}`"]
        of["no drafts"].append(line["forwards"] / line["problems"])
        of[f"{line['lowered']:g} τ"].append(line["forwards_with_drafts"] / line["problems"])
    columns = dict.fromkeys(next(iter(means.values())), "right")
    print_lines(
        {"task": "left", "block": "right", "cache": "left"} | columns,
        [[*name, *(f"{mean(of[key]):.3f}" for key in columns)] for name, of in means.items()],
        True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = problems_parser("drafts", __doc__)
    add = parser.add_argument
    add("--task", nargs="+", choices=TASKS, default=list(TASKS), help="default: both")
    add("--block-length", type=int, nargs="+", metavar="N", help="default: the task's")
    add("--threshold", type=float, nargs="+", default=[0.9], metavar="T", help="default: 0.9")
    lowered = "measure the thresholds alone, with draft thresholds of so many times them"
    add("--lowered", type=float, nargs="+", metavar="F", help=lowered)
    args, lines = record_of(parser, argv, measure)
    if not args.markdown:
        print_all(lines)
    elif lines[0]["lowered"] is None:
        print_by_cache(lines)
    else:
        print_by_guess(lines)


if __name__ == "__main__":
    sys.exit(run_process("drafts", main))
