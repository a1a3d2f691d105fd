"""Continuous batching beside static batches, on the embedded model's problems of 1 to 6 steps.

    python -m benchmarks.continuous --problems 96 --rows 16 --rounds 3

Every problem has its own `gen_length`, one of `--gen-lengths`. A static batch takes problems of one
`gen_length` in the order in which they come, and waits for its slowest row; continuous batching
fills each row again. Both decode the same tokens, which is checked. The two alternate, and a
round's ratio is that of its own two runs. Seconds are the process's own CPU time with one thread,
which a busy machine changes less. Where a step waits for the model's weights, as on a GPU, its time
hardly depends on its rows: there the number of steps says what to expect.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

import dsb_runtime as dsb
from dsb_runtime.cli.process import OneLineParser, run_process
from dsb_runtime.config import check_int
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.demo.problems import heldout

Problem = tuple[Tensor, dict[str, Any]]  # a prompt and its settings
Result = tuple[list[int], int]  # how many tokens each problem gets, and how many steps that took
# What decides how many steps a response has: from few with many tokens to many with one.
RULES: dict[str, dict[str, Any]] = {
    "blocks of 16": {"block_length": 16},
    "blocks of 4": {"block_length": 4, "max_block_length": 4},
    "one token a step": {"block_length": 4, "max_block_length": 4, "steps": None},
}


def problems_of(number: int, gen_lengths: Sequence[int], rule: dict[str, Any]) -> list[Problem]:
    tokenizer = dsb.load_tokenizer(str(MODEL_DIR))
    problems = heldout(number)
    random.Random(0).shuffle(problems)
    result = []
    for i, problem in enumerate(problems):
        chat = [{"role": "user", "content": problem.prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        length = gen_lengths[i % len(gen_lengths)]
        settings = {**rule, "gen_length": length}
        if "steps" in rule:
            settings["steps"] = length
        result.append((tokenizer(text, return_tensors="pt").input_ids[0], settings))
    return result


def static(model: PreTrainedModel, problems: list[Problem], rows: int) -> Result:
    """Decode batches of problems with the same settings."""
    tokens, steps = [0] * len(problems), 0
    lengths = dict.fromkeys(settings["gen_length"] for _, settings in problems)
    for length in lengths:
        mine = [i for i, (_, each) in enumerate(problems) if each["gen_length"] == length]
        for first in range(0, len(mine), rows):
            part = mine[first : first + rows]
            ids = [problems[i][0] for i in part]
            padded, mask = (
                pad_sequence(x, batch_first=True, padding_side="left")
                for x in (ids, [torch.ones_like(row) for row in ids])
            )
            out = dsb.generate(model, padded, attention_mask=mask, **problems[part[0]][1])
            steps += out.nfe
            for i, count in zip(part, out.row_tokens, strict=True):
                tokens[i] = count
    return tokens, steps


def continuous(model: PreTrainedModel, problems: list[Problem], rows: int) -> Result:
    """The same by continuous batching."""
    engine = dsb.BatchEngine(model, max_rows=rows)
    requests = [engine.submit(ids, **settings) for ids, settings in problems]
    return [request.result().row_tokens[0] for request in requests], engine.batcher.steps


def timed(work: Callable[..., Result], *arguments: Any) -> tuple[list[int], int, float]:
    """What the work returns, and tokens per second of CPU time."""
    began = time.process_time()
    tokens, steps = work(*arguments)
    return tokens, steps, sum(tokens) / (time.process_time() - began)


def run(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="benchmarks.continuous", description=__doc__)
    parser.add_argument("--problems", type=int, default=96)
    parser.add_argument("--gen-lengths", type=int, nargs="+", default=[64])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    for name in ("problems", "rows", "rounds"):
        check_int(f"--{name}", getattr(args, name), 1)
    torch.set_num_threads(1)
    model = dsb.load_model(str(MODEL_DIR), dtype="float32", device="cpu")
    for name, rule in RULES.items():
        problems = problems_of(args.problems, args.gen_lengths, rule)
        speeds = []
        for _ in range(args.rounds + 1):  # the first one makes buffers
            tokens, steps, before = timed(static, model, problems, args.rows)
            same, fewer, after = timed(continuous, model, problems, args.rows)
            if tokens != same:
                raise SystemExit("continuous: other tokens than static batches: nothing is timed")
            speeds.append((before, after))
        before, after = (statistics.median(column) for column in zip(*speeds[1:], strict=True))
        ratio = statistics.median(b / a for a, b in speeds[1:])
        print(
            f"{name}: {sum(tokens)} tokens; {before:.0f} tokens/s static, {after:.0f} continuous: "
            f"{ratio:.2f}; {steps} steps static, {fewer} continuous: {steps / fewer:.2f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_process("benchmarks.continuous", run))
