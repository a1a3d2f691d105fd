"""Benchmarks, which compare with a plain reference in the same run and check before they time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_runtime import load_model, load_tokenizer
from dsb_runtime.cli.process import OneLineParser
from dsb_runtime.demo.tasks import Task
from dsb_runtime.files import check_replaced, read_json, write_json
from dsb_runtime.measure.command import (
    check_arguments,
    markdown_table,
    table_of,
    wide_console,
)
from dsb_runtime.measure.evaluate import encode_prompts
from dsb_runtime.measure.machine import describe_run

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib


def read_toml(name: str) -> dict[str, Any]:
    """The content of a TOML file beside this one."""
    return tomllib.loads((Path(__file__).parent / name).read_text("utf-8"))


def benchmark_parser(name: str, description: str | None, **how: Any) -> OneLineParser:
    """The parser of `python -m benchmarks.NAME`, which is described by its first line."""
    first = (description or "").split("\n")[0]
    return OneLineParser(prog=f"python -m benchmarks.{name}", description=first, **how)


def describe_benchmark(
    name: str, argv: Sequence[str] | None, device: torch.device
) -> dict[str, Any]:
    """The fields at the head of a benchmark's file of results."""
    words = sys.argv[1:] if argv is None else argv
    command = " ".join([f"python -m benchmarks.{name}", *words])
    return {"benchmark": name, **describe_run(command, device)}


def encode_batches(
    tokenizer: PreTrainedTokenizerBase, problems: list[Any], size: int
) -> list[tuple[list[Any], Tensor, Tensor]]:
    """Batches of problems, their left-padded prompts (size, P) and which positions are no padding,
    by length so that padding is short."""
    order = sorted(problems, key=lambda p: len(p.prompt))
    batches = []
    for first in range(0, len(order), size):
        part = order[first : first + size]
        prompts = [torch.tensor(ids) for ids in encode_prompts(tokenizer, part)]
        ids = pad_sequence(prompts, True, padding_side="left")
        mask = pad_sequence([torch.ones_like(p) for p in prompts], True, padding_side="left")
        batches.append((part, ids, mask))
    return batches


# --- figures of the embedded models, which are kept and printed again ----------------------------


def problems_parser(name: str, description: str | None) -> OneLineParser:
    """A parser with the options of `batches_of`, `record_of` and `print_lines`."""
    parser = benchmark_parser(name, description)
    add = parser.add_argument
    add("--problems", type=int, default=100, help="held-out (default: 100)")
    add("--batch", type=int, default=50, help="decoded together (default: 50)")
    add("--seed", type=int, default=0, help="of the problems (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write the figures here")
    add("--from", type=Path, dest="source", metavar="FILE",
        help="measure nothing: print what --json wrote")  # fmt: skip
    add("--markdown", action="store_true", help="print the table as Markdown")
    return parser


def batches_of(
    task: Task, args: argparse.Namespace
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[tuple[list[Any], Tensor, Tensor]]]:
    """The embedded model of a task on the CPU, its tokenizer, and the problems as `encode_batches`
    returns them."""
    model, tokenizer = load_model(task.folder, device="cpu"), load_tokenizer(task.folder)
    problems = task.heldout(args.problems, args.seed)
    return model, tokenizer, encode_batches(tokenizer, problems, args.batch)


def is_record(written: Any, name: str) -> bool:
    """Whether JSON is what a benchmark of this name writes."""
    return isinstance(written, dict) and written.get("benchmark") == name


def record_of(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    measure: Callable[[argparse.Namespace], list[dict[str, Any]]],
) -> tuple[argparse.Namespace, list[dict[str, Any]]]:
    """The lines of a benchmark: measured, and written where --json says, or those of --from.

    Raises:
        ValueError: the file of --from is none that this benchmark's --json writes.
    """
    args, name = parser.parse_args(argv), parser.prog.rpartition(".")[2]
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    if args.source is None:
        check_replaced("--json", args.json, lambda written: is_record(written, name))
        record = {**describe_benchmark(name, argv, torch.device("cpu")), "lines": measure(args)}
        if args.json:
            write_json(args.json, record)
        return args, record["lines"]
    record = read_json(args.source)
    if not is_record(record, name):
        raise ValueError(
            f"--from {args.source}: expected what python -m benchmarks.{name} --json writes"
        )
    return args, record["lines"]


def print_lines(columns: dict[str, str], lines: Iterable[Sequence[str]], markdown: bool) -> None:
    """Print a table. `columns` has the alignment of each column, "left" or "right"."""
    if markdown:
        print(markdown_table(columns, lines))
        return
    left = [index for index, side in enumerate(columns.values()) if side == "left"]
    wide_console().print(table_of(list(columns), lines, left=left))
