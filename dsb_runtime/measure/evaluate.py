"""`dsb eval`: the embedded model on held-out problems, for every schedule, cache and rule.

Exact answers, forwards and tokens per forward, by one counting rule: a row's tokens are the
response positions up to and including its first EOS.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_kernels.rules import RULES
from dsb_runtime.config import DecodingConfig, check_int
from dsb_runtime.demo.problems import Problem, heldout, is_exact
from dsb_runtime.engine.engine import generate
from dsb_runtime.files import check_writable, read_json, write_json
from dsb_runtime.measure.plots import check_picture, draw_scores

SCHEDULES: dict[str, dict[str, Any]] = {
    "naive": {"schedule": "naive"},
    "DSB const": {"schedule": "dsb", "max_block_length": -1},  # -1: equal to block_length
    "DSB greedy": {"schedule": "dsb"},
}
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.7, 0.95, 0.99)
FACTORS = (0.25, 1.0, 4.0, 8.0)
FRECHETS = (-0.9, -0.5, 0.0, 0.25, 0.9)
# Thresholds and quotas are measured apart; of a rule that is not here, its lowest value is.
SWEEPS = {"threshold": (), "quota": (), "factor": FACTORS, "frechet": FRECHETS}
# Of how many refreshes one is full; None is refresh_policy="full".
FULL_EVERY = (None, 4, 99)
SMALL_BLOCK = 4  # for many refreshes


@dataclass(frozen=True)
class Setting:
    """One line of the report."""

    rule: str  # "threshold 0.9", ...
    schedule: str
    cache: str
    config: DecodingConfig


@dataclass(frozen=True)
class Score:
    """What one setting measured over all problems."""

    rule: str
    schedule: str
    cache: str
    problems: int
    exact: float  # share of exact answers
    forwards: float  # per problem
    tokens: float  # per problem
    tokens_per_forward: float
    tokens_per_second: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", type=int, default=500, help="held-out (default: 500)")
    parser.add_argument("--gen-length", type=int, default=64, help="default: 64")
    parser.add_argument("--block-length", type=int, default=16, help="default: 16")
    parser.add_argument("--batch", type=int, default=25, help="decoded together (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the problems (default: 0)")
    parser.add_argument("--quick", action="store_true", help="threshold 0.9 only, no sweeps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the scores")
    parser.add_argument("--from", dest="kept", type=Path, metavar="FILE",
                        help="measure nothing: print and draw what --json kept")  # fmt: skip


def build_settings(gen_length: int, block_length: int, quick: bool) -> list[Setting]:
    """One token a step first; every schedule × cache at 0.9; then each rule's sweep, and refreshes
    that leave the prompt's K/V as they are."""
    shape = {"gen_length": gen_length, "block_length": block_length, "stop_at_eos": True}

    def make(rule: str, schedule: str, cache: str, **values: Any) -> Setting:
        settings = {**shape, **SCHEDULES[schedule], "cache": cache.split("/")[0], **values}
        if settings.get("max_block_length") == -1:
            settings["max_block_length"] = block_length
        return Setting(rule, schedule, cache, DecodingConfig(**settings))

    made = [make("one token a step", "DSB greedy", "none", steps=gen_length)]
    made += [
        make("threshold 0.9", schedule, cache, threshold=0.9)
        for schedule in SCHEDULES
        for cache in ("none", "dual", "dsb")
    ]
    if not quick:
        for schedule, cache in (("naive", "dual"), ("DSB greedy", "dsb")):
            made += [make(f"threshold {v:g}", schedule, cache, threshold=v) for v in THRESHOLDS]
        made += [
            make(f"{rule.name} {v:g}", "DSB greedy", "dsb", **{rule.setting: rule.kind(v)})
            for rule in RULES.values()
            for v in SWEEPS.get(rule.name, (rule.low,))
        ]
        small = min(SMALL_BLOCK, block_length)
        for every in FULL_EVERY:
            policy: dict[str, Any] = {"steps": gen_length, "block_length": small}
            label = "dsb"
            if every is not None:
                policy |= {"refresh_policy": "response", "full_refresh_every": every}
                label = f"dsb/{every}"  # response refreshes, one in so many full
            made.append(make(f"1 token, block {small}", "DSB greedy", label, **policy))
    return made


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: list[tuple[list[Problem], torch.Tensor, torch.Tensor]],
    setting: Setting,
) -> Score:
    """Decode every batch with one setting."""
    exact = forwards = tokens = count = 0
    began = time.perf_counter()
    for problems, input_ids, mask in batches:
        out = generate(model, input_ids, setting.config, attention_mask=mask)
        prompt = input_ids.shape[1]
        for row, problem in enumerate(problems):
            ids = out.sequences[row, prompt : prompt + out.row_tokens[row]]
            exact += is_exact(problem, tokenizer.decode(ids, skip_special_tokens=True))
        forwards += sum(out.row_nfe)
        tokens += sum(out.row_tokens)
        count += len(problems)
    seconds = time.perf_counter() - began
    return Score(
        setting.rule, setting.schedule, setting.cache, count, exact / count, forwards / count,
        tokens / count, tokens / forwards, tokens / seconds,
    )  # fmt: skip


def encode_batches(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem], size: int, device: torch.device
) -> list[tuple[list[Problem], torch.Tensor, torch.Tensor]]:
    """Problems with their left-padded prompts, in order of length so that little is padding."""
    texts = {
        p: tokenizer.apply_chat_template(
            [{"role": "user", "content": p.prompt}], add_generation_prompt=True, tokenize=False
        )
        for p in problems
    }
    order = sorted(problems, key=lambda p: len(texts[p]))
    batches = []
    for at in range(0, len(order), size):
        part = order[at : at + size]
        encoded = tokenizer(
            [texts[p] for p in part],
            add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt",
        ).to(device)  # fmt: skip
        batches.append((part, encoded.input_ids, encoded.attention_mask))
    return batches


def print_table(title: str, scores: list[Score]) -> None:
    # Narrow enough for 80 columns, in which a box would cut the figures.
    table = Table(
        title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True
    )
    for column in ("rule", "schedule", "cache"):
        table.add_column(column, no_wrap=True)
    for column in ("exact", "forwards", "tokens", "tokens/\nforward", "tokens/\ns"):
        table.add_column(column, justify="right", no_wrap=True)
    for s in scores:
        table.add_row(
            s.rule, s.schedule, s.cache, f"{100 * s.exact:.1f}%", f"{s.forwards:.1f}",
            f"{s.tokens:.1f}", f"{s.tokens_per_forward:.2f}", f"{s.tokens_per_second:.0f}",
        )  # fmt: skip
    Console().print(table)


def show(title: str, scores: list[Score], plot: Path | None) -> None:
    print_table(title, scores)
    if plot is not None:
        # The refresh policies are compared in the table; in the picture they would lie on one spot.
        draw_scores([asdict(s) for s in scores if "block" not in s.rule], plot)


def run_kept(path: Path, plot: Path | None) -> int:
    """`dsb eval --from`: the table and the picture of what was measured before."""
    check_picture("--plot", plot)
    kept = read_json(path)
    try:
        scores = [Score(**item) for item in kept]
        show(f"{scores[0].problems} held-out problems", scores, plot)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"--from {path}: expected what dsb eval --json writes") from error
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raise for a wrong argument; asked before a checkpoint is read."""
    check_int("--problems", args.problems, 1)
    check_int("--batch", args.batch, 1)
    check_int("--seed", args.seed, 0)
    check_writable("--json", args.json)
    check_picture("--plot", args.plot)
    build_settings(args.gen_length, args.block_length, args.quick)


def run(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> int:
    """The command: a table, and the files asked for."""
    problems = heldout(args.problems, seed=args.seed)
    batches = encode_batches(tokenizer, problems, args.batch, model.device)
    settings = build_settings(args.gen_length, args.block_length, args.quick)
    scores = []
    for setting in tqdm(settings, desc="settings", disable=None):
        scores.append(score(model, tokenizer, batches, setting))
        if args.json:  # kept as it grows: an interrupt loses nothing that was measured
            write_json(args.json, [asdict(s) for s in scores])
    title = f"{args.problems} held-out problems, gen {args.gen_length}, block {args.block_length}"
    show(title, scores, args.plot)
    return 0
