"""Benchmarks, which compare with a plain reference in the same run and check before they time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

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
