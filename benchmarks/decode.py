"""Decoding end to end against a plain eager loop and against the bare linear layers.

    python -m benchmarks.decode --preset 60m --device cpu

builds a random LLaDA-format model, scales its LM head so that several tokens commit per forward,
checks that both loops return the same tokens, then times them in turn with the bare linear layers
of the same forwards, and prints medians and ratios (pair by pair, so that a drifting machine
cancels). Two floors: the LM head on the rows that can be unmasked, as ours, or on all rows of a
forward, as published loops.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

import dsb_runtime as dsb
from benchmarks.eager import eager_generate
from benchmarks.floor import ForwardRows, LinearFloor
from benchmarks.presets import PRESETS, random_model, random_prompt
from dsb_runtime.families import LLADA


@torch.no_grad()
def scale_head(
    model: LlamaForCausalLM, prompt: torch.Tensor, settings: dict, target: float
) -> float:
    """Scale the LM head until about `target` tokens commit per forward; returns what commits.

    A random model is never sure; sharper logits stand in for a trained one's confidence.
    """
    low, high, original = 8.0, 512.0, model.lm_head.weight.clone()
    reached = 0.0
    for _ in range(8):
        scale = (low * high) ** 0.5
        model.lm_head.weight.copy_(original * scale)
        out = dsb.generate(model, prompt, **settings)
        reached = settings["gen_length"] / out.nfe
        if abs(reached - target) < 0.5:
            break
        low, high = (scale, high) if reached < target else (low, scale)
    return reached


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="60m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens")
    parser.add_argument("--gen", type=int, default=128, help="response positions")
    parser.add_argument("--block", type=int, default=32, help="block length")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--tokens-per-forward", type=float, default=3.5, help="aimed at")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device here; expected cpu")
    preset = PRESETS[args.preset]
    model = random_model(preset, torch.float32, args.device, args.seed)
    prompt = random_prompt(preset, 1, args.prompt, args.seed).to(args.device)
    settings = {
        "gen_length": args.gen, "block_length": args.block, "schedule": "dsb", "cache": "dsb",
        "threshold": args.threshold,
    }  # fmt: skip
    reached = scale_head(model, prompt, settings, args.tokens_per_forward)

    forwards: list[ForwardRows] = []

    def note(event: dsb.StepEvent) -> None:
        start, end, prefix = event.before[0]
        rows = args.prompt + args.gen if event.kind == "refresh" else end - start + prefix
        forwards.append(ForwardRows(rows, int((event.position >= 0).sum())))

    ours = dsb.generate(model, prompt, on_step=note, **settings)

    def run_eager() -> object:
        return eager_generate(
            model, prompt, mask_id=preset.mask_id, gen_length=args.gen, block_length=args.block,
            max_block_length=None, prefix_window=LLADA.prefix_window, threshold=args.threshold,
        )  # fmt: skip

    eager = run_eager()
    if not torch.equal(ours.sequences, eager.sequences):
        raise SystemExit("the two loops return different tokens: nothing is timed")
    if ours.tokens_per_forward != eager.tokens_per_forward:
        raise SystemExit("the two loops commit differently: nothing is timed")

    floor = LinearFloor(model)
    runs = {
        "ours": lambda: dsb.generate(model, prompt, **settings),
        "eager": run_eager,
        "floor": lambda: floor.run(forwards),
        "floor_all_rows": lambda: floor.run([ForwardRows(f.hidden, f.hidden) for f in forwards]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(args.rounds), desc="rounds", disable=None):
        for name, run in runs.items():
            seconds[name].append(timed(run))

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    result = {
        "preset": args.preset, "device": args.device, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "prompt": args.prompt, "gen": args.gen, "block": args.block,
        "forwards": ours.nfe, "tokens_per_forward": reached,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ours_over_floor": ratio("ours", "floor"),
        "ours_over_floor_all_rows": ratio("ours", "floor_all_rows"),
        "ours_over_eager": ratio("ours", "eager"),
        "floor_over_eager": ratio("floor", "eager"),
        "floor_all_rows_over_eager": ratio("floor_all_rows", "eager"),
    }  # fmt: skip
    for name, value in result["seconds"].items():
        print(f"{name:>14}  {value * 1e3:8.1f} ms  {args.gen / value:8.1f} tokens/s")
    print(f"forwards {ours.nfe}, tokens per forward {reached:.2f}, same tokens in both loops")
    for name in (n for n in result if "_over_" in n):
        print(f"{name.replace('_', ' ')}: {result[name]:.3f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
