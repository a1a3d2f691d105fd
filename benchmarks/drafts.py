"""Forwards that drafts save, what they cost on this machine, and what that means for a large model.

    python -m benchmarks.drafts --json benchmarks/drafts_embedded.json

Every setting decodes held-out problems without drafts and with them, and the tokens must be equal.
Forwards are those of each row, so that they are the same in any batch. Times are this process's
CPU time, which other processes change least. The last columns are **computed**, not measured: they
take the counts of forwards from here and the time of a forward from the roofline of LLaDA-8B on an
H100 (`benchmarks/roofline.py`, 1024 prompt and 256 response positions, batch 1).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

import dsb_runtime as dsb
from benchmarks import encode_batches
from benchmarks.roofline import GPUS, budget
from benchmarks.step_cost import StepSize
from dsb_runtime.cli.process import OneLineParser, run_process
from dsb_runtime.demo.tasks import TASKS
from dsb_runtime.files import read_json, write_json
from dsb_runtime.measure.command import table_of, wide_console
from dsb_runtime.measure.models import PRESETS

SCHEDULES: dict[str, dict[str, Any]] = {
    "naive": {"schedule": "naive"}, "DSB const": {}, "DSB greedy": {}
}  # fmt: skip
CACHES = ("dsb", "none")
PROMPT, GEN, BLOCK = 1024, 256, 32  # of the computed columns
WINDOW = BLOCK + 24  # with LLaDA's published prefix window


def rules_of(gen_length: int, thresholds: Sequence[float]) -> dict[str, dict[str, Any]]:
    """The rules that are measured, by their words."""
    rules: dict[str, dict[str, Any]] = {"one token a step": {"steps": gen_length}}
    rules |= {f"threshold {value:g}": {"threshold": value} for value in thresholds}
    return rules | {
        "factor 1": {"factor": 1.0}, "frechet 0.25": {"frechet": 0.25},
        "entropy 0.4": {"entropy": 0.4}, "eb 0.2": {"eb": 0.2},
    }  # fmt: skip


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


def measure(model: PreTrainedModel, batches: list[Any], args: argparse.Namespace) -> list[dict]:
    """One entry for each schedule, cache, rule and draft threshold."""
    record, ms, count = [], step_ms(), sum(len(problems) for problems, *_ in batches)
    shape = {"gen_length": args.gen_length, "block_length": args.block_length, "stop_at_eos": True}
    rules = rules_of(args.gen_length, args.threshold)
    for schedule, settings in SCHEDULES.items():
        if schedule == "DSB const":
            settings = {"max_block_length": args.block_length}
        for cache in CACHES:
            for rule, setting in rules.items():
                if schedule != "DSB greedy" and not {"steps", "threshold"} & setting.keys():
                    continue  # the other rules are measured with one schedule
                how = {**shape, **settings, **setting, "cache": cache}
                config = dsb.DecodingConfig(**how)
                expected, plain = decode(model, batches, config)
                kind = "refresh" if cache == "none" else "window"
                floor = computed_ms(plain, kind, ms)
                tried = args.draft_threshold if "threshold" in setting else None
                for guess in tried or [None]:
                    drafted = dsb.DecodingConfig(**how, drafts=1, draft_threshold=guess)
                    sequences, with_drafts = decode(model, batches, drafted)
                    assert all(map(torch.equal, sequences, expected)), (rule, schedule, cache)
                    record.append({
                        "rule": rule, "schedule": schedule, "cache": cache,
                        "draft_threshold": guess, "problems": count,
                        "forwards": sum(plain["kinds"].values()) / count,
                        "forwards_with_drafts": sum(with_drafts["kinds"].values()) / count,
                        "run": with_drafts["run"] / count,
                        "accepted": with_drafts["accepted"] / count,
                        "cpu_time_ratio": with_drafts["cpu_seconds"] / plain["cpu_seconds"],
                        "computed_speedup": floor / computed_ms(with_drafts, kind, ms),
                        "computed_tokens_per_second": 1e3 * plain["tokens"] / floor,
                    })  # fmt: skip
    return record


def table(record: list[dict[str, Any]]) -> Table:
    lines = []
    for s in record:
        guess = "" if s["draft_threshold"] is None else f"{s['draft_threshold']:g}"
        rate, ratio = s["computed_tokens_per_second"], s["computed_speedup"]
        right = s["accepted"] / s["run"] if s["run"] else 0.0
        lines.append([
            s["rule"], s["schedule"], s["cache"], guess, f"{s['forwards']:.2f}",
            f"{s['forwards_with_drafts']:.2f}", f"{right:.0%}", f"{s['cpu_time_ratio']:.2f}",
            f"{ratio:.2f}", f"{rate:.0f} → {rate * ratio:.0f}",
        ])  # fmt: skip
    return table_of(
        ["rule", "schedule", "cache", "guess from", "forwards", "with drafts", "guess right",
         "CPU time", "H100 speed-up\n(computed)", "H100 tokens/s\n(computed)"],
        lines, left=(0, 1, 2),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(prog="drafts", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--task", choices=TASKS, default="words", help="whose embedded model decodes (words)")
    add("--problems", type=int, default=25, help="how many are decoded (25)")
    add("--batch", type=int, default=25, help="decoded together (25)")
    add("--block-length", type=int, help="of the block (the task's)")
    add("--threshold", type=float, nargs="+", default=[0.9, 0.99], help="values of the rule")
    add("--draft-threshold", type=float, nargs="+", help="values of the setting (its default)")
    add("--json", type=Path, help="write the figures here")
    add("--from", type=Path, dest="source", help="print the figures of such a file again")
    args = parser.parse_args(argv)
    if args.source is not None:
        record = read_json(args.source, "--from")["runs"]
    else:
        torch.set_num_threads(1)
        task = TASKS[args.task]
        model, tokenizer = (
            dsb.load_model(task.folder, device="cpu"),
            dsb.load_tokenizer(task.folder),
        )
        args.gen_length = task.gen_length
        args.block_length = args.block_length or task.compared[0]
        problems = task.heldout(args.problems, 0)
        batches = encode_batches(tokenizer, problems, args.batch)
        record = measure(model, batches, args)
        if args.json:
            settings = {k: v for k, v in vars(args).items() if k not in ("json", "source")}
            write_json(args.json, {"settings": settings, "step_ms": step_ms(), "runs": record})
    wide_console().print(table(record))


if __name__ == "__main__":
    sys.exit(run_process("drafts", main))
