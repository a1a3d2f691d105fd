"""`dsb bench`: time per step against its limit, and tokens/s by batch, of any checkpoint.

The limit of a step is its matrix products alone: every linear layer of the decoder multiplied with
the positions that the step computes, with nothing between them, and the LM head with those that it
scores. It is measured in the same run, in turn with the decoding. A GPU has a second limit: the
time in which the weights can be read at the bandwidth of a large copy.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_runtime.config import DecodingConfig
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.engine.output import GenerationOutput
from dsb_runtime.files import check_replaced, sole_writer
from dsb_runtime.measure import requests
from dsb_runtime.measure.command import PlainConsole, add_output, table_of
from dsb_runtime.measure.machine import describe_run
from dsb_runtime.measure.models import add_preset, check_room, random_prompts
from dsb_runtime.measure.plots import draw_runs
from dsb_runtime.measure.steps import LinearLayers, StepRecorder, StepWork, TimedEngine
from dsb_runtime.measure.timing import copy_bandwidth, timed

BATCHES = (1, 2, 4, 8)
KINDS = ("window", "response", "refresh")
LIMITS = {"linear_ms": "linear layers alone", "weights_ms": "weights at copy bandwidth"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    add_preset(group)
    add = group.add_argument
    add("--batch", type=int, nargs="+", metavar="N",
        help=f"batch sizes (default: {' '.join(map(str, BATCHES))})")  # fmt: skip
    add("--rounds", type=int, default=5, help="timed rounds after one that warms up (default: 5)")
    requests.add_arguments(parser.add_argument_group("many prompts"))
    add_output(parser.add_argument_group("output"))


@dataclass(frozen=True)
class Round:
    """One round at one batch size."""

    out: GenerationOutput
    seconds: float  # of the whole call, without an `on_step`
    steps: list[StepWork]
    step_seconds: list[float]  # of the steps of a second call, with an `on_step`
    linear_seconds: list[float]  # of the same steps' linear layers


def one_round(
    engine: TimedEngine, input_ids: Tensor, config: DecodingConfig, seed: int, limit: LinearLayers
) -> Round:
    """Decode without and then with an `on_step`, and run the same steps' linear layers."""
    device = input_ids.device

    def decode(watch: StepRecorder | None = None) -> GenerationOutput:
        generator = torch.Generator(device).manual_seed(seed)
        return engine.generate(input_ids, config, generator=generator, on_step=watch)

    def watched() -> list[StepWork]:
        engine.take()
        recorder = StepRecorder(engine.model, input_ids.shape[1], config.gen_length)
        with engine.without_host_time():
            decode(recorder)
        return recorder.steps

    # On a GPU, this batch's captured steps may have been freed since the last round.
    warm = device.type == "cuda"
    if warm:
        decode()
    out, seconds = timed(decode, device)
    if warm:
        watched()
    steps = watched()
    step_seconds = [took for _, took in engine.take()]
    linear_seconds = [
        timed(functools.partial(limit.run, step.num_tokens, step.scored), device)[1]
        for step in steps
    ]
    return Round(out, seconds, steps, step_seconds, linear_seconds)


def summarize_steps(
    rounds: list[Round], kind: str, weights_seconds: float | None
) -> dict[str, Any] | None:
    """Medians over all steps of a kind; None where there was none. A call's first step also
    allocates the call's tensors, so that it is left out where there are other steps. The key "rows"
    stands for the positions of a step."""
    steps = [
        (index, *step)
        for r in rounds
        for index, step in enumerate(zip(r.steps, r.step_seconds, r.linear_seconds, strict=True))
        if step[0].kind == kind
    ]
    steps = [step for step in steps if step[0] > 0] or steps
    if not steps:
        return None
    _, works, seconds, linear = zip(*steps, strict=True)
    summary = {
        "steps": len(works),
        "rows": statistics.median(work.num_tokens for work in works),
        "scored": statistics.median(work.scored for work in works),
        "ms": 1e3 * statistics.median(seconds),
        "linear_ms": 1e3 * statistics.median(linear),
        # The ratio of each step is taken first, so that a drift of the machine cancels.
        "linear_share": statistics.median(b / a for a, b in zip(seconds, linear, strict=True)),
        "weights_ms": None,
        "weights_share": None,
    }
    if weights_seconds is not None:
        summary["weights_ms"] = 1e3 * weights_seconds
        summary["weights_share"] = statistics.median(weights_seconds / s for s in seconds)
    return summary


def summarize(
    rounds: list[Round], config: DecodingConfig, weights_seconds: float | None
) -> dict[str, Any]:
    """Figures of one batch size. Random prompts have no answers that end: without `stop_at_eos`
    each batch row has `gen_length` tokens, whatever its ids."""
    out = rounds[0].out
    batch = len(out.row_tokens)
    tokens = sum(out.row_tokens) if config.stop_at_eos else batch * config.gen_length
    seconds = statistics.median(r.seconds for r in rounds)
    steps = {kind: summarize_steps(rounds, kind, weights_seconds) for kind in KINDS}
    return {
        "batch": batch,
        "seconds": seconds,
        "tokens": tokens,
        "forwards": out.nfe,
        "tokens_per_forward": tokens / sum(out.row_nfe),
        "tokens_per_second": tokens / seconds,
        "steps": {kind: summary for kind, summary in steps.items() if summary is not None},
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
    """Run every batch size in each round, so that a drift of the machine meets all of them, and
    yield after each round the figures so far. A batch takes the first of the prompts (B, P); one
    round more runs before those that count, to warm up."""
    engine = TimedEngine(model)
    limit = LinearLayers(model, max(batches) * (prompts.shape[1] + config.gen_length))
    bandwidth = copy_bandwidth(model.device) if model.device.type == "cuda" else None
    weights_seconds = None if bandwidth is None else limit.bytes / bandwidth
    done: dict[int, list[Round]] = {batch: [] for batch in batches}
    with tqdm(total=(rounds + 1) * len(batches), desc="rounds", disable=None) as bar:
        for index in range(rounds + 1):
            for batch in batches:
                one = one_round(engine, prompts[:batch], config, seed, limit)
                if index > 0:
                    done[batch].append(one)
                bar.update()
            if index > 0:
                yield {
                    "rounds": index,
                    "weight_bytes": limit.bytes,
                    "copy_bandwidth": bandwidth,
                    "batches": [summarize(done[b], config, weights_seconds) for b in batches],
                }


def is_record(written: Any) -> bool:
    """Whether JSON is what this command writes."""
    return isinstance(written, dict) and ("batches" in written or "requests" in written)


def show(record: dict[str, Any], plot: Path | None) -> None:
    """Print the table of a record, and draw its picture where `plot` names a file."""
    if "requests" in record:
        requests.show(record, plot)
        return
    settings = record["settings"]
    on_gpu = record["copy_bandwidth"] is not None
    columns = ["batch", "tokens/s", "tokens/\nforward", "step", "positions", "ms", "limit\nms",
               "reached"]  # fmt: skip
    lines = []
    for batch in record["batches"]:
        head = [str(batch["batch"]), f"{batch['tokens_per_second']:.1f}"]
        head.append(f"{batch['tokens_per_forward']:.2f}")
        for kind, step in batch["steps"].items():
            cells = [
                kind, f"{step['rows']:g}", f"{step['ms']:.2f}", f"{step['linear_ms']:.2f}",
                f"{100 * step['linear_share']:.0f}%",
            ]  # fmt: skip
            if on_gpu:
                cells += [f"{step['weights_ms']:.2f}", f"{100 * step['weights_share']:.0f}%"]
            lines.append([*head, *cells])
            head = ["", "", ""]
    table = table_of(
        columns + ["weights\nms", "reached"] * on_gpu, lines, left=[columns.index("step")],
        title=f"{record['model']} on {record['machine']['device']}, {record['dtype']}: prompt "
        f"{record['prompt_length']}, gen {settings['gen_length']}, block "
        f"{settings['block_length']}, medians of {record['rounds']} rounds",
        caption="limit: the step's linear layers alone"
        + ("; weights: reading them at copy bandwidth" if on_gpu else ""),
    )  # fmt: skip
    PlainConsole().print(table)
    if plot is not None:
        draw_runs(
            record["batches"], LIMITS, {"tokens_per_second": record["model"]},
            f"{record['model']}, {record['machine']['device']}: prompt {record['prompt_length']}, "
            f"gen {settings['gen_length']}", plot,
        )  # fmt: skip


def run(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: DecodingConfig,
    command: str,
) -> int:
    """Measure, print the table, and write the files that the options name."""
    seed = args.seed or 0
    embedded = args.preset is None and args.model == str(MODEL_DIR)
    name = requests.EMBEDDED if embedded else args.model
    if args.adapter is not None:
        name += f" with {args.adapter}"
    about = {
        "model": args.preset or name,
        "dtype": str(model.dtype).removeprefix("torch."),
        **describe_run(command, model.device),
        "prompt_length": args.prompt_length,
        "settings": asdict(config),
        "seed": seed,
    }
    check_replaced("--json", args.json, is_record)
    with sole_writer("--json", args.json) as write:
        if args.requests is not None:
            record = requests.run(args, model, tokenizer, config, about)
            write(record)
        else:
            batches = list(dict.fromkeys(args.batch or BATCHES))
            check_room(model, max(batches), args.prompt_length, config)
            prompts = random_prompts(model, tokenizer, max(batches), args.prompt_length, seed)
            for figures in measure(model, prompts, config, batches, rounds=args.rounds, seed=seed):
                record = {**about, **figures}
                write(record)  # after each round, so that an interrupt loses one round only
    show(record, args.plot)
    return 0
