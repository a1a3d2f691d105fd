"""Profile the steps of a decoding at real shapes, with random weights.

    python -m benchmarks.profile_step --preset llada-8b --device cuda --rows 64
    python -m benchmarks.profile_step --preset tiny --torch trace.json

is `dsb profile` on a model of `presets.py`: warm-up, then some steps under CUDA's profiler or
torch's, and the lines for Nsight. The decoding commits `--tokens-per-forward` under the quota rule,
since a random model is never sure of a token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

import dsb_runtime as dsb
from benchmarks.presets import (
    PRESETS,
    Preset,
    check_device,
    check_prompt_length,
    check_tokens,
    random_model,
    random_prompt,
)
from benchmarks.roofline import positive
from dsb_runtime.cli.main import OneLineParser
from dsb_runtime.config import check_int
from dsb_runtime.measure import profile

DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> argparse.ArgumentParser:
    # No abbreviations: the command line is printed again without --torch.
    parser = OneLineParser(
        prog="profile_step", description=__doc__.split("\n")[0], epilog=profile.NOTE,
        allow_abbrev=False,
    )  # fmt: skip
    add, above = parser.add_argument, positive(int)
    add("--preset", choices=PRESETS, default="tiny", help="model shapes (tiny)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=DTYPES, help="bfloat16 on cuda, float32 on cpu")
    add("--batch", type=above, default=1, metavar="N", help="prompts")
    add("--prompt", type=above, default=512, help="prompt tokens (512)")
    add("--gen", type=above, default=128, help="response positions (128)")
    add("--block", type=above, default=32, help="block length (32)")
    add("--rows", type=above, help="of a window step and a prompt: a block of --block that does "
        "not grow, and a prefix window of the rest; without it blocks grow")  # fmt: skip
    add("--tokens-per-forward", type=positive(float), default=3.5, help="committed by a step (3.5)")
    add("--seed", type=int, default=0)
    profile.add_arguments(parser)
    return parser


def settings_of(args: argparse.Namespace, preset: Preset) -> dict[str, Any]:
    """The decoding's settings; ValueError for what cannot be."""
    check_device(args.device)
    if args.device == "cpu" and args.graphs:
        raise ValueError("--graphs: a CPU has none; expected it with --device cuda")
    check_tokens(args.tokens_per_forward, args.block)
    check_int("--seed", args.seed, 0, 2**63 - 1)
    check_prompt_length(args.prompt, args.gen)
    if args.rows is not None and args.rows < args.block:
        raise ValueError(f"--rows {args.rows}: expected at least --block, {args.block}")
    profile.check_arguments(args)
    fixed = args.rows is not None
    return {
        "gen_length": args.gen,
        "block_length": args.block,
        "max_block_length": args.block if fixed else None,
        "prefix_window": args.rows - args.block if fixed else preset.family.prefix_window,
        "steps": max(1, round(args.gen / args.tokens_per_forward)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    command = sys.orig_argv if argv is None else ["python", "-m", "benchmarks.profile_step", *argv]
    try:
        config = dsb.DecodingConfig(**settings_of(args, preset))
        dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
        model = random_model(preset, getattr(torch, dtype), args.device, args.seed)
        prompts = random_prompt(preset, args.batch, args.prompt, args.seed).to(args.device)
        profile.run(args, model, prompts, config, command)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
