"""What a sparse context costs and saves: `context_masks` and `eos_bound`, by the embedded models.

    python -m benchmarks.sparse_context --problems 500 --json sparse.json
    python -m benchmarks.sparse_context --task sudoku --block-length 6 --context-masks 6

The word problems get a response of four times the length that an answer needs on average; a Sudoku
needs every position. Each line has exact answers with their Wilson 95% interval, forwards of a
problem, the positions that these forwards computed (those of the padding included), and seconds.
The settings take turns, batch by batch, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import describe_benchmark, encode_batches
from dsb_runtime import load_model, load_tokenizer
from dsb_runtime.cli.process import OneLineParser, run_process
from dsb_runtime.config import DecodingConfig
from dsb_runtime.demo.tasks import TASKS
from dsb_runtime.engine.engine import Engine
from dsb_runtime.engine.loop import Launched, Loop
from dsb_runtime.engine.session import Session
from dsb_runtime.engine.step import StepShape
from dsb_runtime.files import write_json
from dsb_runtime.measure.command import check_arguments
from dsb_runtime.measure.scores import wilson

# The cache, whether the block is the whole response, and whether `context_masks` and `eos_bound`
# are set.
SETTINGS: tuple[tuple[str, bool, bool, bool], ...] = (
    ("dsb", False, False, False), ("dsb", False, True, False), ("dsb", False, True, True),
    ("none", False, False, False), ("none", False, True, False),
    ("none", True, False, False), ("none", True, False, True),
)  # fmt: skip
CACHES = tuple(dict.fromkeys(cache for cache, *_ in SETTINGS))
RESPONSE = {"words": 120}  # an answer has 29 tokens on average


class CountingLoop(Loop):
    """A loop that counts the positions of its steps."""

    positions = 0

    def launch(self, session: Session, shape: StepShape) -> Launched:
        self.positions += shape.num_rows * shape.width
        return super().launch(session, shape)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Decode every problem with every setting. Returns a line for each setting."""
    lines: list[dict[str, Any]] = []
    task = TASKS[args.task]
    length = args.gen_length or RESPONSE.get(task.name, task.gen_length)
    shape = {"gen_length": length, "stop_at_eos": True, "threshold": args.threshold}
    for cache, whole, masks, bound in SETTINGS:
        if cache not in args.cache:
            continue
        block = length if whole else args.block_length
        context = {"context_masks": args.context_masks} if masks else {}
        context |= {"eos_bound": True} if bound else {}
        config = DecodingConfig(**shape, cache=cache, block_length=block, **context)
        line = {"cache": cache, "block": block, "context": context}
        line |= {"exact": 0, "forwards": 0, "seconds": 0.0}
        lines.append(line | {"config": config, "engine": Engine(model)})
        lines[-1]["engine"].loop = CountingLoop(model)
    problems = task.heldout(args.problems, args.seed)
    for part, ids, mask in encode_batches(tokenizer, problems, args.batch):
        for line in lines:
            began = time.perf_counter()
            out = line["engine"].generate(ids, line["config"], attention_mask=mask)
            line["seconds"] += time.perf_counter() - began
            line["forwards"] += sum(out.row_nfe)
            for row, problem in enumerate(part):
                answer = out.sequences[row, ids.shape[1] :][: out.row_tokens[row]]
                text = str(tokenizer.decode(answer, skip_special_tokens=True))
                line["exact"] += task.is_exact(problem, text)
    for line in lines:
        del line["config"]
        line["positions"] = line.pop("engine").loop.positions
        line["interval"] = wilson(line["exact"], args.problems)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="sparse_context", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--task", choices=TASKS, default="words", help="default: words")
    add("--problems", type=int, default=500, help="held-out (default: 500)")
    add("--gen-length", type=int, metavar="N", help="default: 120, or a grid")
    add("--block-length", type=int, default=8, help="default: 8")
    add("--context-masks", type=int, default=8, metavar="N", help="default: 8")
    add("--threshold", type=float, default=0.9, help="default: 0.9")
    add("--cache", nargs="+", choices=CACHES, default=list(CACHES), help="default: both")
    add("--batch", type=int, default=1, help="decoded together (default: 1)")
    add("--seed", type=int, default=0, help="of the problems (default: 0)")
    add("--json", type=Path, metavar="FILE", help="the figures")
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    folder = TASKS[args.task].folder
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    lines = measure(model, tokenizer, args)
    for line in lines:
        low, high = line["interval"]
        words = " ".join(f"{name}={value}" for name, value in line["context"].items())
        print(
            f"{line['cache']:5} block {line['block']:3} {words or 'all':30}"
            f" exact {line['exact'] / args.problems:6.1%}"
            f" ({low:.1%} to {high:.1%}) forwards {line['forwards'] / args.problems:5.2f}"
            f" positions {line['positions'] / args.problems:6.0f}"
            f" ms {1000 * line['seconds'] / args.problems:6.1f}"
        )
    if args.json:
        write_json(args.json, {**describe_benchmark("sparse_context", argv, model.device),
                               "lines": lines})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(run_process("sparse_context", main))
