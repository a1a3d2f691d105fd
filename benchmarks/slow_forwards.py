"""Forwards that commit one token, and forwards that commit nothing but EOS, by schedule.

    python -m benchmarks.slow_forwards --problems 500 --json benchmarks/slow_forwards.json

A greedy window grows with the tokens that are committed in it. Masks of which the model is not sure
may then fill it, so that a forward commits the surest of them and no other. How often that is at
threshold 0.99, and how often a forward is spent on the EOS behind the answer, is counted here.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

import dsb_runtime as dsb
from benchmarks import batches_of, print_lines, problems_parser, record_of
from benchmarks.drafts import schedules_of
from dsb_runtime.cli.process import run_process
from dsb_runtime.demo.tasks import TASKS

THRESHOLD = 0.99  # lower ones leave few masks of which the model is not sure
NAMES = {"task": "left", "block": "right", "schedule": "left"}
KINDS = ("forwards", "one token", "nothing but EOS")


def count(model: PreTrainedModel, batches: list[Any], config: dsb.DecodingConfig) -> Counter[str]:
    """The forwards of all problems by what they commit."""
    eos = torch.tensor(model.dsb.eos_ids)
    counts: Counter[str] = Counter()
    for _, ids, mask in batches:
        out = dsb.generate(model, ids, config, attention_mask=mask, record=True)
        is_eos = torch.isin(out.sequences[:, ids.shape[1] :], eos)
        for row, steps in enumerate(out.step_map):
            in_step = steps == torch.arange(out.row_nfe[row])[:, None]  # (forwards, positions)
            counts["forwards"] += out.row_nfe[row]
            counts["one token"] += int((in_step.sum(-1) == 1).sum())
            counts["nothing but EOS"] += int((~(in_step & ~is_eos[row]).any(-1)).sum())
    return counts


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line for each task and setting."""
    lines = []
    for task in TASKS.values():
        model, _, batches = batches_of(task, args)
        for block in dict.fromkeys((min(task.block_lengths), *task.compared)):
            for schedule, how in schedules_of(block).items():
                config = dsb.DecodingConfig(
                    gen_length=task.gen_length, stop_at_eos=True, cache="none",
                    threshold=THRESHOLD, **how,
                )  # fmt: skip
                counts = count(model, batches, config)
                name = dict(zip(NAMES, (task.name, block, schedule), strict=True))
                lines.append(name | {"problems": args.problems} | dict(counts))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    args, lines = record_of(problems_parser("slow_forwards", __doc__), argv, measure)
    print_lines(
        NAMES | dict.fromkeys(KINDS, "right"),
        [
            [*(str(line[name]) for name in NAMES), f"{line['forwards'] / line['problems']:.2f}",
             *(f"{line[kind] / line['forwards']:.1%}" for kind in KINDS[1:])]
            for line in lines
        ],
        args.markdown,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_process("slow_forwards", main))
