"""`dsb eval`: an embedded model on held-out problems, for every schedule, cache and rule.

It counts exact answers, forwards and tokens per forward by one rule: a row's tokens are the
response positions up to and including its first EOS. It measures no time (`dsb bench` does), so
that two runs of a seed write the same file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_kernels.rows import CACHES
from dsb_kernels.rules import RULES, Rule
from dsb_runtime.config import DecodingConfig, check_int
from dsb_runtime.demo.tasks import TASKS, Task
from dsb_runtime.engine.batch import generate_batch
from dsb_runtime.engine.stops import decoded_text
from dsb_runtime.families import check_model
from dsb_runtime.files import sole_writer
from dsb_runtime.measure.command import add_output
from dsb_runtime.measure.scores import Record, Score, show

POLICIES = ("none", *(cache for cache in CACHES if cache != "none"))
THRESHOLDS = (0.5, 0.7, 0.9, 0.99)
THRESHOLD = 0.9  # at which caches, progress, margins and refreshes are compared
# The values at which the other rules are published; a rule without any has the middle of its range.
PUBLISHED: dict[str, tuple[float, ...]] = {
    "threshold": (), "factor": (1.0,), "frechet": (0.25,), "entropy": (0.4,), "eb": (0.1, 0.6),
}  # fmt: skip
PROGRESS = (0.3, 0.6)
FULL_EVERY = (4, 99)  # with response refreshes, one refresh in so many is full


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(model=None)
    add = parser.add_argument
    add("--task", choices=TASKS, default="words", help="default: words; its model is the default")
    add("--limit", type=int, default=500, metavar="N", help="held-out problems (default: 500)")
    add("--gen-length", type=int, metavar="N", help="default: the task's")
    add("--block-length", type=int, nargs="+", metavar="N",
        help="default: the task's; with --from, show these only")  # fmt: skip
    add("--batch", type=int, default=100, help="decoded together (default: 100)")
    add("--seed", type=int, default=0, help="of the problems (default: 0)")
    add("--quick", action="store_true", help="threshold 0.9 and one block length only")
    add_output(parser)
    add("--markdown", action="store_true", help="print the table as Markdown, by schedule")


def rule_values(rule: Rule) -> tuple[float, ...]:
    """The values at which a rule is measured beside thresholds; a number of steps has none."""
    if rule.kind is int or rule.high is None:
        return ()
    return PUBLISHED.get(rule.setting, ((rule.low + rule.high) / 2,))


def build_settings(
    task: Task, gen_length: int | None = None, block_lengths: Sequence[int] = (),
    quick: bool = False,
) -> list[DecodingConfig]:  # fmt: skip
    """The settings that are measured, the telling ones first: one token a step over the whole
    canvas and every schedule with every cache at threshold 0.9 (with `quick` no others), then
    every threshold, then confidences and refreshes that leave the prompt's K/V as they are, and
    then every other rule; thresholds and rules with every cache and block length."""
    length = task.gen_length if gen_length is None else gen_length
    if length != task.gen_length and not task.any_length:
        raise ValueError(
            f"--gen-length {length}: expected {task.gen_length}, which every answer of "
            f"{task.name} has"
        )
    check_int("--gen-length", length, 1)
    # Of the task's own block lengths those are measured that fit in.
    blocks = tuple(block_lengths) or tuple(b for b in task.block_lengths if b < length)
    compared = tuple(block_lengths) or tuple(b for b in task.compared if b < length) or (length,)
    for block in blocks:
        DecodingConfig(gen_length=length, block_length=block)  # raises for a wrong one
    configs: dict[DecodingConfig, None] = {}  # in order, each of them once

    def add(schedule: str, block: int, cache: str = "none", **settings: Any) -> None:
        if schedule == "const":
            settings["max_block_length"] = block
        config = DecodingConfig(
            gen_length=length, block_length=block, cache=cache, stop_at_eos=True,
            schedule="naive" if schedule == "naive" else "dsb", **settings,
        )  # fmt: skip
        configs.setdefault(config)

    def add_schedules(block: int, cache: str = "none", **settings: Any) -> None:
        """One setting with every schedule. Over the whole canvas they are the same without a cache,
        and const is greedy with one."""
        if block < length:
            names: tuple[str, ...] = ("naive", "const", "greedy")
        else:
            names = ("naive",) if cache == "none" else ("naive", "greedy")
        for name in names:
            # naive spreads its steps evenly over its blocks
            if name != "naive" or "steps" not in settings or length % block == 0:
                add(name, block, cache, **settings)

    add("naive", length, steps=length)
    for cache in POLICIES:
        add_schedules(compared[0], cache, threshold=THRESHOLD)
    if quick:
        return list(configs)
    for block in compared:
        add_schedules(block, steps=length)
    for cache in POLICIES:
        for block in (*blocks, length):
            for threshold in THRESHOLDS:
                add_schedules(block, cache, threshold=threshold)
    for block in compared:
        for every in FULL_EVERY:
            add("greedy", block, "dsb", threshold=THRESHOLD, refresh_policy="response",
                full_refresh_every=every)  # fmt: skip
    for confidence in ("margin", "entropy"):
        add("naive", length, steps=length, confidence=confidence)
        add("greedy", compared[0], steps=length, confidence=confidence)
    # So small a block makes many refreshes, and one token a step even more.
    small: dict[str, Any] = {"block": min(blocks, default=length), "cache": "dsb", "steps": length}
    add("greedy", **small)
    for every in FULL_EVERY:
        add("greedy", **small, refresh_policy="response", full_refresh_every=every)
    for cache in POLICIES:
        for block in (*compared, *blocks, length):
            for rule in RULES.values():
                for value in rule_values(rule):
                    add_schedules(block, cache, **{rule.setting: value})
            for share in PROGRESS:
                add_schedules(block, cache, threshold=THRESHOLD, progress=share)
            add_schedules(block, cache, threshold=THRESHOLD, confidence="margin")
    return list(configs)


def measure(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Any],
    config: DecodingConfig,
    max_rows: int,
    each: Callable[[], object] = lambda: None,
) -> Score:
    """Decode every problem with one setting, `max_rows` at a time, and call `each` after it."""
    exact = forwards = tokens = 0
    prompts = encode_prompts(tokenizer, problems)
    for index, out in generate_batch(model, prompts, config, max_rows=max_rows):
        length, response = out.row_tokens[0], out.sequences[0, len(prompts[index]) :]
        answer = decoded_text(tokenizer, response[:length])
        exact += task.is_exact(problems[index], answer)
        forwards += out.nfe
        tokens += length
        each()
    return Score(config, len(problems), exact, forwards / len(problems), tokens / len(problems))


def encode_prompts(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Any]) -> list[list[int]]:
    """The ids of the problems' prompts, in the chat template."""
    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    encoded: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True)
    return encoded["input_ids"]


def digest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> str:
    """Twelve digits that change with whatever the answers depend on: the weights, what they are
    taken for, what the tokens stand for, and how a prompt of the task becomes tokens."""
    code = hashlib.sha256()
    for weight in model.parameters():
        code.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    info, config = check_model(model), model.config
    heads = (config.num_attention_heads, config.num_key_value_heads)
    read_as = [info.family.name, info.mask_id, info.eos_ids, heads, config.rms_norm_eps]
    read_as += [config.rope_parameters, sorted(tokenizer.get_vocab().items())]
    read_as += encode_prompts(tokenizer, task.heldout(1, 0))
    code.update(json.dumps(read_as, sort_keys=True).encode())
    return code.hexdigest()[:12]


def run(
    args: argparse.Namespace,
    configs: list[DecodingConfig],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Decode with every setting that the file of `--json` has not, show all, and write the files
    that the options name."""
    task, length = TASKS[args.task], configs[0].gen_length
    with sole_writer("--json", args.json) as write:
        # Rows are as wide as the widest beside them, so that neighbours should be of one length.
        problems = sorted(task.heldout(args.limit, args.seed), key=lambda p: len(p.prompt))
        name = digest(model, tokenizer, task)
        record = Record(task.name, name, args.limit, args.seed, length, []).continued(args.json)
        known = {score.config for score in record.scores}
        missing = [config for config in configs if config not in known]
        with tqdm(total=len(missing) * len(problems), unit="problem", disable=None) as bar:
            try:
                for number, config in enumerate(missing, 1):
                    bar.set_description(f"setting {number} of {len(missing)}")
                    record.scores.append(
                        measure(task, model, tokenizer, problems, config, args.batch, bar.update)
                    )
                    write(record.as_json())  # so that an interrupt loses one setting only
            finally:
                bar.close()
                record = record.only(configs)
                if record.scores:  # an interrupt leaves the settings that are done
                    show(record, args.plot, args.markdown)
    return 0


def show_part(record: Record, args: argparse.Namespace) -> None:
    """Show what `--json` wrote; with `--quick` only the settings that it would measure, with
    `--block-length` only those of the lengths that it names."""
    part = record
    if args.quick:
        task, length = TASKS[record.task], record.gen_length
        configs = build_settings(task, length, args.block_length or (), quick=True)
        part = record.only(configs)
    elif args.block_length:
        part = record.only(
            [s.config for s in record.scores if s.config.block_length in args.block_length]
        )
    if not part.scores:
        lengths = sorted({score.config.block_length for score in record.scores})
        named = ["--quick"] if args.quick else []
        named += ["--block-length", *map(str, args.block_length)] if args.block_length else []
        raise ValueError(
            f"{' '.join(named)}: {args.source} has no such score; its block lengths are "
            f"{', '.join(map(str, lengths))}"
        )
    show(part, args.plot, args.markdown)
