"""What a sparse context costs and saves: `context_masks` and `eos_bound`, by the embedded models.

    python -m benchmarks.sparse_context --problems 500 --json sparse.json
    python -m benchmarks.sparse_context --task sudoku --block-length 6 --context-masks 6
    python -m benchmarks.sparse_context --from sparse.json

The word problems get a response of three and of four times the length that an answer has on
average. The first is within the lengths that the model was trained with, the second beyond them. A
Sudoku needs every position. Each line has exact answers with their Wilson 95% interval, and what a
problem took: forwards, the positions that these computed (those of the padding included), and
processor time, of all threads together. A busy machine lengthens that less than the time that
passes, and the settings take turns, batch by batch, so that it does so for all of them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import batches_of, print_lines, problems_parser, record_of
from dsb_runtime.cli.process import run_process
from dsb_runtime.config import DecodingConfig
from dsb_runtime.demo.tasks import TASKS
from dsb_runtime.engine.engine import Engine
from dsb_runtime.engine.loop import LaunchedStep, Loop
from dsb_runtime.engine.session import Session
from dsb_runtime.engine.step import StepShape
from dsb_runtime.engine.stops import decoded_text
from dsb_runtime.measure.scores import wilson

# The cache, whether the block is the whole response, and whether `context_masks` and `eos_bound`
# are set.
SETTINGS: tuple[tuple[str, bool, bool, bool], ...] = (
    ("dsb", False, False, False), ("dsb", False, True, False),
    ("dsb", False, False, True), ("dsb", False, True, True),
    ("none", False, False, False), ("none", False, True, False), ("none", False, False, True),
    ("none", True, False, False), ("none", True, False, True),
)  # fmt: skip
CACHES = tuple(dict.fromkeys(cache for cache, *_ in SETTINGS))
RESPONSE = {"words": [96, 120]}  # an answer has 28 tokens on average, its EOS included


class CountingLoop(Loop):
    """A loop that counts the positions of its steps."""

    positions = 0

    def launch(self, session: Session, shape: StepShape) -> LaunchedStep:
        self.positions += shape.num_rows * shape.width
        return super().launch(session, shape)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Decode every problem with every length of the response and every setting. Returns a line for
    each of both."""
    lines: list[dict[str, Any]] = []
    task = TASKS[args.task]
    model, tokenizer, batches = batches_of(task, args)
    lengths = args.gen_length or RESPONSE.get(task.name, [task.gen_length])
    shape = {"stop_at_eos": True, "threshold": args.threshold}
    for length, (cache, whole, masks, bound) in itertools.product(lengths, SETTINGS):
        if cache not in args.cache:
            continue
        block = length if whole else args.block_length
        context = {"context_masks": args.context_masks} if masks else {}
        context |= {"eos_bound": True} if bound else {}
        shape |= {"gen_length": length, "block_length": block}
        config = DecodingConfig(**shape, cache=cache, **context)
        line = {"task": task.name, "response": length, "cache": cache, "block": block}
        line |= {"context": context, "problems": args.problems}
        line |= {"exact": 0, "forwards": 0, "seconds": 0.0}
        lines.append(line | {"config": config, "engine": Engine(model)})
        lines[-1]["engine"].loop = CountingLoop(model)
    for part, ids, mask in batches:
        for line in lines:
            began = time.process_time()
            out = line["engine"].generate(ids, line["config"], attention_mask=mask)
            line["seconds"] += time.process_time() - began
            line["forwards"] += sum(out.row_nfe)
            for row, problem in enumerate(part):
                answer = out.sequences[row, ids.shape[1] :][: out.row_tokens[row]]
                line["exact"] += task.is_exact(problem, decoded_text(tokenizer, answer))
    for line in lines:
        del line["config"]
        line["positions"] = line.pop("engine").loop.positions
        line["interval"] = wilson(line["exact"], args.problems)
    return lines


def shown(line: dict[str, Any]) -> list[str]:
    """The cells of a line of the table."""
    count, (low, high) = line["problems"], line["interval"]
    words = [f"`{k}`" if v is True else f"`{k}={v}`" for k, v in line["context"].items()]
    return [
        line["task"], str(line["response"]), f"`{line['cache']}`", str(line["block"]),
        " and ".join(words) or "nothing",
        f"{line['exact'] / count:.1%} ({100 * low:.1f} to {100 * high:.1f})",
        f"{line['forwards'] / count:.2f}", f"{line['positions'] / count:.0f}",
        f"{1000 * line['seconds'] / count:.0f}",
    ]  # fmt: skip


COLUMNS = {
    "task": "left", "response": "right", "cache": "left", "block": "right", "left out": "left",
    "exact": "left", "forwards": "right", "positions": "right", "milliseconds": "right",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = problems_parser("sparse_context", __doc__)
    add = parser.add_argument
    add("--task", choices=TASKS, default="words", help="default: words")
    add("--gen-length", type=int, nargs="+", metavar="N", help="default: 96 and 120, or a grid")
    add("--block-length", type=int, default=8, help="default: 8")
    add("--context-masks", type=int, default=8, metavar="N", help="default: 8")
    add("--threshold", type=float, default=0.9, help="default: 0.9")
    add("--cache", nargs="+", choices=CACHES, default=list(CACHES), help="default: both")
    args, lines = record_of(parser, argv, measure)
    print_lines(COLUMNS, map(shown, lines), args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(run_process("sparse_context", main))
