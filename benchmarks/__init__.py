"""Benchmarks, which compare with a plain reference in the same run and check before they time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from dsb_runtime.measure.evaluate import encode_prompts
from dsb_runtime.measure.machine import describe_run

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib


def read_toml(name: str) -> dict[str, Any]:
    """The content of a TOML file beside this one."""
    return tomllib.loads((Path(__file__).parent / name).read_text("utf-8"))


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
