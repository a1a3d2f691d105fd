"""`python -m benchmarks.decode --against DIR`: this checkout and another one, in turn.

Each checkout runs the same program in a process of its own. The program uses nothing but the public
names `dsb_runtime.load_model` and `dsb_runtime.Engine`, so that the other checkout may be older.
The rounds alternate between the processes, and the ratio is that of their medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

HERE = Path(__file__).parents[1]
PROGRAM = """
import hashlib, json, sys, time
import torch
import dsb_runtime as dsb

job = json.loads(sys.stdin.readline())
model = dsb.load_model(job["model"], device=job["device"], family=job["family"],
                       mask_id=job["mask_id"])
engine = dsb.Engine(model, **job["engine"])
prompts = torch.tensor(job["prompts"], device=model.device)
wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
for line in sys.stdin:
    wait()
    began = time.perf_counter()
    out = engine.generate(prompts[: int(line)], **job["settings"])
    wait()
    seconds = time.perf_counter() - began
    tokens = hashlib.sha256(out.sequences.cpu().numpy().tobytes()).hexdigest()
    print(json.dumps({"seconds": seconds, "tokens": tokens, "forwards": out.nfe}), flush=True)
"""


def check(args: argparse.Namespace) -> None:
    """Raise ValueError unless `--against` names a checkout and goes with the other options."""
    if not (args.against / "dsb_runtime" / "__init__.py").is_file():
        raise ValueError(f"--against {args.against}: expected a checkout with dsb_runtime in it")
    for option in ("plot", "phases", "no-eager"):
        if getattr(args, option.replace("-", "_")):
            raise ValueError(f"--against and --{option}: expected one of the two")


class Checkout:
    """A process that runs the program over one checkout and waits for batch sizes."""

    def __init__(self, root: Path, job: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], cwd=root, text=True,
            env={**os.environ, "PYTHONPATH": str(root.absolute())},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        print(json.dumps(job), file=self.process.stdin, flush=True)

    def run(self, batch: int) -> dict[str, Any]:
        """Decode one batch. Returns seconds, forwards and a digest of the tokens."""
        print(batch, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("decode: a checkout's process ended; its error stands above")
        return json.loads(line)


def compare(
    args: argparse.Namespace, model: PreTrainedModel, prompts: Tensor, settings: dict[str, Any],
    batches: list[int],
) -> dict[str, Any]:  # fmt: skip
    """Time both checkouts on the same weights and prompts, and print and return the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        job = {
            "model": folder, "device": args.device, "family": model.dsb.family.name,
            "mask_id": model.dsb.mask_id, "prompts": prompts.tolist(),
            "settings": {**settings, "stop_at_eos": False},
            "engine": {"graphs": False} if args.no_graphs else {},
        }  # fmt: skip
        checkouts = {"ours": Checkout(HERE, job), "other": Checkout(args.against, job)}
        try:
            comparisons = [compare_batch(checkouts, batch, args) for batch in batches]
        finally:
            for checkout in checkouts.values():
                checkout.process.communicate()
    return {"against": str(args.against), "comparisons": comparisons}


def compare_batch(
    checkouts: dict[str, Checkout], batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    warm = {name: checkout.run(batch) for name, checkout in checkouts.items()}
    keys = ("forwards", "tokens") if args.dtype == "float32" else ("forwards",)
    for key in keys:
        if warm["ours"][key] != warm["other"][key]:
            raise SystemExit(f"decode: the checkouts differ in {key}: nothing is timed")
    seconds: dict[str, list[float]] = {name: [] for name in checkouts}
    for index in tqdm(range(args.rounds), desc=f"batch {batch}", disable=None):
        # The checkout that runs first alternates as well.
        for name in sorted(checkouts, reverse=bool(index % 2)):
            seconds[name].append(checkouts[name].run(batch)["seconds"])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["ours"] / medians["other"]
    print(
        f"batch {batch}: ours {1e3 * medians['ours']:.1f} ms, other {1e3 * medians['other']:.1f} "
        f"ms, ratio of medians {ratio:.3f} over {args.rounds} rounds"
    )
    return {"batch": batch, "seconds": seconds, "medians": medians, "ratio_of_medians": ratio}
