"""`dsb eval`: the embedded model on held-out problems, for every schedule, cache and rule.

It counts exact answers, forwards and tokens per forward by one rule: a row's tokens are the
response positions up to and including its first EOS.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_kernels.rows import CACHES
from dsb_kernels.rules import RULES, Rule
from dsb_runtime.config import DecodingConfig
from dsb_runtime.demo.problems import Problem, heldout, is_exact
from dsb_runtime.engine.engine import generate
from dsb_runtime.files import write_json
from dsb_runtime.measure.command import PlainConsole, add_output, table_of
from dsb_runtime.measure.plots import draw_scores

THRESHOLD = 0.9  # at which schedules and caches are compared
# The values at which each rule is measured; for any other rule they are taken from its range.
SWEEPS: dict[str, tuple[float, ...]] = {
    "threshold": (0.2, 0.3, 0.4, 0.5, 0.7, 0.95, 0.99),
    "factor": (0.25, 1.0, 4.0, 8.0),
    "frechet": (-0.9, -0.5, 0.0, 0.25, 0.9),
    "entropy": (0.1, 0.4, 1.0),
    "eb": (0.1, 0.6, 2.0),
}
FULL_EVERY = (4, 99)  # with response refreshes, one refresh in so many is full
SMALL_BLOCK = 4  # so small a block makes many refreshes


@dataclass(frozen=True)
class Setting:
    """One line of the report: a decoding, and the words for it."""

    sweep: str  # what the line belongs to: "baseline", "schedules", "rules" or "refreshes"
    rule: str
    value: float | None  # of the rule's setting; None where `rule` says it in words
    schedule: str
    cache: str
    config: DecodingConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", type=int, default=500, help="held-out (default: 500)")
    parser.add_argument("--gen-length", type=int, default=64, help="default: 64")
    parser.add_argument("--block-length", type=int, default=16, help="default: 16")
    parser.add_argument("--batch", type=int, default=25, help="decoded together (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the problems (default: 0)")
    parser.add_argument("--quick", action="store_true", help="threshold 0.9 only, no sweeps")
    add_output(parser)


def sweep_values(rule: Rule) -> tuple[float, ...]:
    """The values at which a rule is measured; a fixed number of steps has none."""
    if rule.kind is int or rule.high is None:
        return ()
    inside = tuple(rule.low + share * (rule.high - rule.low) for share in (0.25, 0.5, 0.75))
    return SWEEPS.get(rule.setting, inside)


def build_settings(gen_length: int, block_length: int, quick: bool) -> list[Setting]:
    """The settings of the report: one token a step, every schedule with every cache at threshold
    0.9, each rule's sweep, and refreshes that leave the prompt's K/V as they are."""
    shape = {"gen_length": gen_length, "block_length": block_length, "stop_at_eos": True}
    schedules: dict[str, dict[str, Any]] = {
        "naive": {"schedule": "naive"},
        "DSB const": {"schedule": "dsb", "max_block_length": block_length},
        "DSB greedy": {"schedule": "dsb"},
    }

    def setting(
        sweep: str, rule: str, value: float | None = None, schedule: str = "DSB greedy",
        cache: str = "dsb", **settings: Any,
    ) -> Setting:  # fmt: skip
        config = DecodingConfig(**{**shape, **schedules[schedule], "cache": cache, **settings})
        name = cache if config.refresh_policy == "full" else f"{cache}/{config.full_every}"
        return Setting(sweep, rule, value, schedule, name, config)

    lines = [setting("baseline", "one token a step", cache="none", steps=gen_length)]
    lines += [
        setting("schedules", "threshold", THRESHOLD, schedule, cache, threshold=THRESHOLD)
        for schedule in schedules
        for cache in reversed(CACHES)
    ]
    if quick:
        return lines
    for rule in RULES.values():
        places = [("DSB greedy", "dsb")]
        if rule.setting == "threshold":
            places.insert(0, ("naive", "dual"))
        lines += [
            setting("rules", rule.name, value, schedule, cache, **{rule.setting: value})
            for schedule, cache in places
            for value in sweep_values(rule)
        ]
    small = min(SMALL_BLOCK, block_length)
    policies: list[dict[str, Any]] = [{}]
    policies += [{"refresh_policy": "response", "full_refresh_every": n} for n in FULL_EVERY]
    shape |= {"steps": gen_length, "block_length": small}
    return lines + [setting("refreshes", f"1 token, block {small}", **each) for each in policies]


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: list[tuple[list[Problem], torch.Tensor, torch.Tensor]],
    setting: Setting,
) -> dict[str, Any]:
    """Decode every batch with one setting. Returns the setting's words, the number of problems, the
    share of exact answers, forwards and tokens per problem, and tokens per forward and second."""
    exact = forwards = tokens = count = 0
    began = time.perf_counter()
    for problems, input_ids, mask in batches:
        out = generate(model, input_ids, setting.config, attention_mask=mask)
        prompt = input_ids.shape[1]
        for row, problem in enumerate(problems):
            ids = out.sequences[row, prompt : prompt + out.row_tokens[row]]
            exact += is_exact(problem, str(tokenizer.decode(ids, skip_special_tokens=True)))
        forwards += sum(out.row_nfe)
        tokens += sum(out.row_tokens)
        count += len(problems)
    seconds = time.perf_counter() - began
    words = {name: value for name, value in vars(setting).items() if name != "config"}
    return words | {
        "problems": count, "exact": exact / count, "forwards": forwards / count,
        "tokens": tokens / count, "tokens_per_forward": tokens / forwards,
        "tokens_per_second": tokens / seconds,
    }  # fmt: skip


def encode_batches(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem], size: int, device: torch.device
) -> list[tuple[list[Problem], torch.Tensor, torch.Tensor]]:
    """Batches of problems and their left-padded prompts, by length so that padding is short."""
    order = sorted(problems, key=lambda p: len(p.prompt))
    batches = []
    for first in range(0, len(order), size):
        part = order[first : first + size]
        encoded: Any = tokenizer.apply_chat_template(
            [[{"role": "user", "content": p.prompt}] for p in part], add_generation_prompt=True,
            padding=True, return_tensors="pt", tokenizer_kwargs={"padding_side": "left"},
        )  # fmt: skip
        batches.append((part, encoded.input_ids.to(device), encoded.attention_mask.to(device)))
    return batches


def show(record: list[dict[str, Any]], plot: Path | None, shape: str = "") -> None:
    """Print the table of a record, and draw its picture where `plot` names a file."""
    lines = []
    for s in record:
        value = "" if s["value"] is None else f" {s['value']:g}"
        lines.append([
            f"{s['rule']}{value}", s["schedule"], s["cache"], f"{100 * s['exact']:.1f}%",
            f"{s['forwards']:.1f}", f"{s['tokens']:.1f}", f"{s['tokens_per_forward']:.2f}",
            f"{s['tokens_per_second']:.0f}",
        ])  # fmt: skip
    # Without a box the table fits into 80 columns.
    table = table_of(
        ["rule", "schedule", "cache", "exact", "forwards", "tokens", "tokens/\nforward",
         "tokens/\ns"],
        lines, left=(0, 1, 2), no_wrap=True,
        title=f"{record[0]['problems']} held-out problems{shape}",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    PlainConsole().print(table)
    if plot is not None:
        # The refresh policies are compared in the table; in the picture they would lie on one spot.
        draw_scores([item for item in record if item["sweep"] != "refreshes"], plot)


def run(
    args: argparse.Namespace,
    settings: list[Setting],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Decode with every setting, print the table, and write the files that the options name."""
    problems = heldout(args.problems, seed=args.seed)
    batches = encode_batches(tokenizer, problems, args.batch, model.device)
    record: list[dict[str, Any]] = []
    for setting in tqdm(settings, desc="settings", disable=None):
        record.append(score(model, tokenizer, batches, setting))
        if args.json:  # written after each setting, so that an interrupt loses one setting only
            write_json(args.json, record)
    show(record, args.plot, f", gen {args.gen_length}, block {args.block_length}")
    return 0
