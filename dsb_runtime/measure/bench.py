"""`dsb bench`: time per step against its limit, and tokens/s by batch, of any checkpoint.

The limit of a step is its matrices alone: every linear layer of the decoder multiplied with the
rows that the step needs, with nothing between them, and the LM head with the rows that it scores.
It is measured in the same run, in turn with the decoding. On a GPU there is a second one: the time
in which the weights can be read at the bandwidth of a large copy.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_runtime.config import DecodingConfig, check_int
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.engine.engine import GenerationOutput, StepEvent, generate
from dsb_runtime.files import check_writable, read_json, write_json
from dsb_runtime.measure.limits import LinearLayers, StepRows, copy_bandwidth, synchronize, timed
from dsb_runtime.measure.plots import check_picture, draw_bench

BATCHES = (1, 2, 4, 8)
KINDS = ("window", "response", "refresh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), metavar="N",
                       help=f"batch sizes (default: {' '.join(map(str, BATCHES))})")  # fmt: skip
    group.add_argument("--prompt-length", type=int, default=128,
                       help="random tokens a prompt (default: 128)")  # fmt: skip
    group.add_argument("--rounds", type=int, default=5,
                       help="timed rounds after one that warms up (default: 5)")  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    output.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    output.add_argument("--from", dest="kept", type=Path, metavar="FILE",
                        help="measure nothing: print and draw what --json kept")  # fmt: skip


@dataclass(frozen=True)
class Round:
    """One round at one batch size."""

    out: GenerationOutput
    seconds: float  # of the whole call, which nothing watched
    steps: list[StepRows]
    step_seconds: list[float]  # of a second call's steps
    linear_seconds: list[float]  # of the same steps' linear layers


class StepClock:
    """An `on_step` callback: every forward's kind, rows and seconds since the one before it."""

    def __init__(self, model: PreTrainedModel, prompt_length: int, gen_length: int) -> None:
        # Positions of the forwards whose size no window says. Where a token is predicted from the
        # row before it, the response needs the prompt's last row.
        shift = int(model.dsb.family.shift)
        self.whole = {"refresh": prompt_length + gen_length, "response": gen_length + shift}
        self.device = model.device
        self.steps: list[StepRows] = []
        self.seconds: list[float] = []
        synchronize(self.device)
        self.began = time.perf_counter()

    def __call__(self, event: StepEvent) -> None:
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.began)
        rows = sum(
            self.whole.get(event.kind, end - start + prefix) for start, end, prefix in event.before
        )
        scored = int((event.position[event.rows] >= 0).sum())
        self.steps.append(StepRows(event.kind, rows, scored))
        self.began = time.perf_counter()  # the lines above are not the step's


def random_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int, length: int, seed: int
) -> Tensor:
    """(rows, length) ids drawn from the vocabulary without its special and added tokens."""
    known = min(model.config.vocab_size, len(tokenizer))
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    special |= {model.dsb.mask_id, *model.dsb.eos_ids}
    ids = torch.tensor([i for i in range(known) if i not in special])
    if len(ids) == 0:
        raise ValueError(f"vocabulary of {known}: only special tokens; expected others to draw")
    generator = torch.Generator().manual_seed(seed)
    return ids[torch.randint(len(ids), (rows, length), generator=generator)].to(model.device)


def one_round(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: DecodingConfig,
    seed: int,
    limit: LinearLayers,
) -> Round:
    """Decode once unwatched and once with the clock, then run the same steps' linear layers."""
    device = model.device

    def decode(clock: StepClock | None = None) -> GenerationOutput:
        generator = torch.Generator(device).manual_seed(seed)
        return generate(model, input_ids, config, generator=generator, on_step=clock)

    # A GPU's captured steps may have made room for another batch's since the last round.
    warm = device.type == "cuda"
    if warm:
        decode()
    out, seconds = timed(decode, device)
    if warm:
        decode(StepClock(model, input_ids.shape[1], config.gen_length))
    clock = StepClock(model, input_ids.shape[1], config.gen_length)
    decode(clock)
    linear_seconds = [timed(lambda step=step: limit.run(step), device)[1] for step in clock.steps]
    return Round(out, seconds, clock.steps, clock.seconds, linear_seconds)


def summarize_steps(
    rounds: list[Round], kind: str, weights_seconds: float | None
) -> dict[str, Any] | None:
    """Medians over all steps of a kind; None where there was none.

    A call's first step also makes the call's tensors: it is left out where others are.
    """
    found = [
        (index, step, seconds, least)
        for r in rounds
        for index, (step, seconds, least) in enumerate(
            zip(r.steps, r.step_seconds, r.linear_seconds, strict=True)
        )
        if step.kind == kind
    ]
    found = [item for item in found if item[0] > 0] or found
    if not found:
        return None
    _, steps, seconds, least = zip(*found, strict=True)
    summary = {
        "steps": len(steps),
        "rows": statistics.median(s.rows for s in steps),
        "scored": statistics.median(s.scored for s in steps),
        "ms": 1e3 * statistics.median(seconds),
        "linear_ms": 1e3 * statistics.median(least),
        # Step by step, so that a machine that drifts cancels.
        "linear_share": statistics.median(b / a for a, b in zip(seconds, least, strict=True)),
        "weights_ms": None,
        "weights_share": None,
    }
    if weights_seconds is not None:
        summary["weights_ms"] = 1e3 * weights_seconds
        summary["weights_share"] = statistics.median(weights_seconds / s for s in seconds)
    return summary


def summarize(rounds: list[Round], weights_seconds: float | None) -> dict[str, Any]:
    """One batch size; a row's tokens end with its first EOS."""
    out = rounds[0].out
    seconds = statistics.median(r.seconds for r in rounds)
    steps = {kind: summarize_steps(rounds, kind, weights_seconds) for kind in KINDS}
    return {
        "batch": len(out.row_tokens),
        "seconds": seconds,
        "tokens": sum(out.row_tokens),
        "forwards": out.nfe,
        "tokens_per_forward": sum(out.row_tokens) / sum(out.row_nfe),
        "tokens_per_second": sum(out.row_tokens) / seconds,
        "steps": {kind: found for kind, found in steps.items() if found is not None},
    }


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    prompts: Tensor,
    config: DecodingConfig,
    batches: list[int],
    *,
    rounds: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Every batch size once a round, so that all see the same machine; yields the figures of the
    rounds so far after each.

    Args:
        prompts: (max(batches), P); a batch takes the first of them.
        rounds: those that count; one more before them warms up.
        seed: of the random numbers at temperature > 0.
    """
    limit = LinearLayers(model, max(batches) * (prompts.shape[1] + config.gen_length))
    bandwidth = copy_bandwidth(model.device)
    weights_seconds = None if bandwidth is None else limit.bytes / bandwidth
    kept: dict[int, list[Round]] = {batch: [] for batch in batches}
    with tqdm(total=(rounds + 1) * len(batches), desc="rounds", disable=None) as bar:
        for index in range(rounds + 1):
            for batch in batches:
                done = one_round(model, prompts[:batch], config, seed, limit)
                if index > 0:
                    kept[batch].append(done)
                bar.update()
            if index > 0:
                yield {
                    "rounds": index,
                    "weight_bytes": limit.bytes,
                    "copy_bandwidth": bandwidth,
                    "batches": [summarize(kept[batch], weights_seconds) for batch in batches],
                }


def describe_machine(device: torch.device) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((v.strip() for k, _, v in lines if k.strip() == "model name"), name)
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else name,
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def describe_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    # torch itself names its build (+cu130), which its CUDA wheels' metadata leaves out.
    versions["torch"] = str(torch.__version__)
    for name in ("triton", "transformers", "dsb-kernels"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # triton where it has no build, or a bare checkout
            versions[name] = None
    return versions


def print_table(record: dict[str, Any]) -> None:
    settings = record["settings"]
    table = Table(
        title=f"{record['model']} on {record['machine']['device']}, {record['dtype']}: prompt "
        f"{record['prompt_length']}, gen {settings['gen_length']}, block "
        f"{settings['block_length']}, medians of {record['rounds']} rounds",
        caption="limit: the step's linear layers alone"
        + ("; weights: reading them at copy bandwidth" if record["copy_bandwidth"] else ""),
    )
    columns = [
        "batch",
        "tokens/s",
        "tokens/\nforward",
        "step",
        "rows",
        "ms",
        "limit\nms",
        "reached",
    ]
    if record["copy_bandwidth"]:
        columns += ["weights\nms", "reached"]
    for column in columns:
        table.add_column(column, justify="left" if column == "step" else "right")
    for batch in record["batches"]:
        head = [
            str(batch["batch"]), f"{batch['tokens_per_second']:.1f}",
            f"{batch['tokens_per_forward']:.2f}",
        ]  # fmt: skip
        for kind, step in batch["steps"].items():
            cells = [
                kind, f"{step['rows']:g}", f"{step['ms']:.2f}", f"{step['linear_ms']:.2f}",
                f"{100 * step['linear_share']:.0f}%",
            ]  # fmt: skip
            if record["copy_bandwidth"]:
                cells += [f"{step['weights_ms']:.2f}", f"{100 * step['weights_share']:.0f}%"]
            table.add_row(*head, *cells)
            head = ["", "", ""]
    Console().print(table)


def show(record: dict[str, Any], plot: Path | None) -> None:
    print_table(record)
    if plot is not None:
        draw_bench(record, plot)


def run_kept(path: Path, plot: Path | None) -> int:
    """`dsb bench --from`: the table and the picture of what was measured before."""
    check_picture("--plot", plot)
    record = read_json(path)
    try:
        show(record, plot)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"--from {path}: expected what dsb bench --json writes") from error
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raise for a wrong argument; asked before a checkpoint is read."""
    for batch in args.batch:
        check_int("--batch", batch, 1)
    check_int("--prompt-length", args.prompt_length, 1)
    check_int("--rounds", args.rounds, 1)
    if args.seed is not None:
        check_int("--seed", args.seed, 0, 2**63 - 1)
    check_writable("--json", args.json)
    check_picture("--plot", args.plot)


def run(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: DecodingConfig,
    command: str,
) -> int:
    """The command: a table, and the files asked for.

    Random prompts have no answers that end: without `stop_at_eos` no id counts as an EOS, and each
    row has `gen_length` tokens.
    """
    batches, seed = list(dict.fromkeys(args.batch)), args.seed or 0
    prompts = random_prompts(model, tokenizer, max(batches), args.prompt_length, seed)
    if not config.stop_at_eos:
        model.dsb = replace(model.dsb, eos_ids=())
    about = {
        "model": "embedded model" if args.model == str(MODEL_DIR) else args.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": describe_machine(model.device),
        "versions": describe_versions(),
        "prompt_length": args.prompt_length,
        "settings": asdict(config),
        "seed": seed,
    }
    record = about
    for measured in measure(model, prompts, config, batches, rounds=args.rounds, seed=seed):
        record = {**about, **measured}
        if args.json:  # kept as it grows: an interrupt loses nothing but the round that runs
            write_json(args.json, record)
    show(record, args.plot)
    return 0
