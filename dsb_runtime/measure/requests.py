"""`dsb bench --requests N`: many prompts, decoded by continuous and by static batching, in turn.

A static batch takes the prompts in the order in which they came, as many as there are rows or as
have come, and gives its rows back when all of them are done. Its rows share one `gen_length`, the
longest that one of them asks for.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_runtime.config import DecodingConfig, check_real, settings
from dsb_runtime.defaults import fitted
from dsb_runtime.demo import problems
from dsb_runtime.engine.batch import BatchEngine
from dsb_runtime.engine.engine import Engine
from dsb_runtime.families import check_model
from dsb_runtime.measure.command import PlainConsole, table_of
from dsb_runtime.measure.models import check_room, random_prompts
from dsb_runtime.measure.plots import draw_rows

SHORTEST = 4  # a random prompt and its response have at least this part of the longest's length
MAX_ROWS = 16  # where --max-rows is not named
EMBEDDED = "embedded model"  # its name in a record
TICK = 0.005  # seconds between two looks at the rows in use


def add_arguments(group: Any) -> None:
    add = group.add_argument
    add("--requests", type=int, metavar="N",
        help="instead of batches: so many prompts, by continuous and by static batching; the "
        "embedded model gets word problems, others random prompts of uneven lengths")  # fmt: skip
    add("--rate", type=float, metavar="X", help="prompts a second, as independent users send them "
        "(default: all come at once)")  # fmt: skip
    add("--max-rows", type=int, metavar="N", help=f"decoded at a time (default: {MAX_ROWS})")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise TypeError or ValueError for a wrong combination of options."""
    if args.requests is None:
        for name in ("rate", "max_rows"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: expected it with --requests")
    elif args.batch is not None:
        raise ValueError("--batch and --requests: expected one of the two (--max-rows with it)")
    if args.rate is not None:
        check_real("--rate", args.rate, 0.0, 1e6, open_low=True)


@dataclass(frozen=True)
class Job:
    """A prompt, the settings of its response, and when it comes, in seconds after the start."""

    ids: list[int]
    config: DecodingConfig
    arrival: float


@dataclass
class Run:
    """One way through all jobs, in seconds after the start."""

    tokens: int = 0
    forwards: int = 0  # how many each row took part in, over all rows
    first: list[float] = field(default_factory=list)  # from a job's arrival to its first tokens
    last: list[float] = field(default_factory=list)  # to its last
    rows: list[tuple[float, int]] = field(default_factory=list)  # when so many rows were in use
    answers: dict[int, list[int]] = field(default_factory=dict)  # the tokens of each job

    @property
    def seconds(self) -> float:
        return self.rows[-1][0]

    @property
    def mean_rows(self) -> float:
        """The rows in use, averaged over the time until the last job was done."""
        spans = zip(self.rows, self.rows[1:], strict=False)
        return sum((after[0] - now[0]) * now[1] for now, after in spans) / self.seconds


def make_jobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: DecodingConfig,
    count: int,
    *,
    word_problems: bool,
    prompt_length: int,
    rate: float | None,
    seed: int,
) -> list[Job]:
    """Jobs of uneven lengths: held-out word problems, whose answers end where they end, or random
    prompts and responses of a quarter to the whole of the named lengths. Without a rate, all come
    at once; with it, so many a second on average, as independent users come."""
    rng = random.Random(seed)
    lengths: Iterable[tuple[list[int], int]]
    if word_problems:
        assert tokenizer is not None
        messages = [[{"role": "user", "content": p.prompt}] for p in problems.heldout(count, seed)]
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        lengths = [(ids, config.gen_length) for ids in encoded["input_ids"]]
    else:
        prompts = random_prompts(model, tokenizer, count, prompt_length, seed).tolist()
        lengths = [
            (ids[: rng.randint(-(-prompt_length // SHORTEST), prompt_length)],
             rng.randint(-(-config.gen_length // SHORTEST), config.gen_length))
            for ids in prompts
        ]  # fmt: skip
    jobs, now = [], 0.0
    for ids, gen_length in lengths:
        now += rng.expovariate(rate) if rate else 0.0
        jobs.append(Job(ids, with_length(config, gen_length), now))
    return jobs


def with_length(config: DecodingConfig, gen_length: int) -> DecodingConfig:
    """The settings for another length."""
    own = {name: getattr(config, name) for name in settings()}
    return replace(config, gen_length=gen_length, **fitted(own, config.gen_length, gen_length))


def wanted(job: Job, ids: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    """The tokens of a response that count: to its first EOS inclusive where an EOS ends it."""
    ids = ids[: job.config.gen_length]
    ends = [i for i, token in enumerate(ids) if token in eos_ids]
    return ids[: ends[0] + 1] if ends and job.config.stop_at_eos else ids


def run_continuous(engine: BatchEngine, jobs: list[Job], eos_ids: tuple[int, ...]) -> Run:
    """Submit every job when it comes."""
    run, began = Run(), time.perf_counter()
    began_to_answer = [False] * len(jobs)

    def look() -> None:
        run.rows.append((time.perf_counter() - began, engine.running))

    def submit(index: int, job: Job) -> Any:
        def first(_: list[int]) -> None:
            if not began_to_answer[index]:
                began_to_answer[index] = True
                run.first.append(time.perf_counter() - began - job.arrival)

        request = engine.submit(job.ids, job.config, on_tokens=first)
        request.add_done_callback(
            lambda _: run.last.append(time.perf_counter() - began - job.arrival)
        )
        return request

    requests = []
    for index, job in enumerate(jobs):
        while time.perf_counter() - began < job.arrival:
            time.sleep(min(TICK, max(0.0, job.arrival - (time.perf_counter() - began))))
            look()
        requests.append(submit(index, job))
    while not all(request.done() for request in requests):
        time.sleep(TICK)
        look()
    for index, (job, request) in enumerate(zip(jobs, requests, strict=True)):
        out = request.result()
        run.answers[index] = wanted(job, out.sequences[0, len(job.ids) :].tolist(), eos_ids)
        run.tokens += len(run.answers[index])
        run.forwards += sum(out.row_nfe)
    look()
    return run


def run_static(engine: Engine, jobs: list[Job], eos_ids: tuple[int, ...], max_rows: int) -> Run:
    """Decode the jobs that have come in batches, each to its end. When a row ended is reckoned from
    the number of its forwards, since a batch gives back all its rows at once."""
    run, began, next_job = Run(), time.perf_counter(), 0
    while next_job < len(jobs):
        now = time.perf_counter() - began
        if jobs[next_job].arrival > now:
            time.sleep(jobs[next_job].arrival - now)
            continue
        come = [job for job in jobs[next_job : next_job + max_rows] if job.arrival <= now]
        longest = max(len(job.ids) for job in come)
        ids = torch.tensor([[0] * (longest - len(job.ids)) + job.ids for job in come])
        mask = torch.tensor([[0] * (longest - len(j.ids)) + [1] * len(j.ids) for j in come])
        config = max((job.config for job in come), key=lambda config: config.gen_length)
        device = engine.device
        out = engine.generate(ids.to(device), config, attention_mask=mask.to(device))
        responses = out.sequences[:, longest:].tolist()
        done = time.perf_counter() - began
        run.rows.append((now, len(come)))
        for left, forwards in enumerate(sorted(out.row_nfe), 1):
            run.rows.append((now + (done - now) * forwards / out.nfe, len(come) - left))
        for index, (job, response) in enumerate(zip(come, responses, strict=True), next_job):
            run.answers[index] = wanted(job, response, eos_ids)
            run.tokens += len(run.answers[index])
            run.first.append(done - job.arrival)
            run.last.append(done - job.arrival)
        run.forwards += sum(out.row_nfe)
        next_job += len(come)
    return run


def percentile(values: list[float], share: float) -> float:
    """The smallest value that so large a share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def summarize(runs: list[Run]) -> dict[str, Any]:
    """Medians over the rounds; latencies of all rounds together, in seconds."""
    figures: dict[str, Any] = {
        "tokens": runs[0].tokens,
        "seconds": statistics.median(run.seconds for run in runs),
        "tokens_per_second": statistics.median(run.tokens / run.seconds for run in runs),
        "mean_rows": statistics.median(run.mean_rows for run in runs),
        "rows": runs[-1].rows,
    }
    for name in ("first", "last"):
        values = [seconds for run in runs for seconds in getattr(run, name)]
        figures[f"{name}_median"] = statistics.median(values)
        figures[f"{name}_p99"] = percentile(values, 0.99)
    return figures


def measure(
    model: PreTrainedModel, jobs: list[Job], max_rows: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Run both ways in turn, after one round that warms up."""
    eos_ids = check_model(model).eos_ids
    batch_engine, engine = BatchEngine(model, max_rows), Engine(model)
    ways: dict[str, Callable[[], Run]] = {
        "continuous": lambda: run_continuous(batch_engine, jobs, eos_ids),
        "static": lambda: run_static(engine, jobs, eos_ids, max_rows),
    }
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    with tqdm(total=(rounds + 1) * len(ways), desc="rounds", disable=None) as bar:
        for index in range(rounds + 1):
            for name, way in ways.items():
                run = way()
                if index > 0:
                    runs[name].append(run)
                bar.update()
    same_length = len({job.config.gen_length for job in jobs}) == 1
    if same_length and not jobs[0].config.draws:
        answers = [run.answers for each in runs.values() for run in each]
        if any(other != answers[0] for other in answers):
            raise RuntimeError("both ways must give every prompt the same tokens, and did not")
    ratios = [
        (a.tokens / a.seconds) / (b.tokens / b.seconds)
        for a, b in zip(runs["continuous"], runs["static"], strict=True)
    ]
    figures = {name: summarize(each) for name, each in runs.items()}
    figures["continuous"]["ratio"] = statistics.median(ratios)
    return figures


def show(record: dict[str, Any], plot: Path | None) -> None:
    """Print the table of a record, and draw its picture where `plot` names a file."""
    ways = {name: record[name] for name in ("continuous", "static")}
    lines = [
        [
            f"{name} batching", f"{way['tokens_per_second']:.1f}", f"{way['mean_rows']:.1f}",
            *(f"{1e3 * way[f'{token}_{which}']:.0f}"
              for token in ("first", "last") for which in ("median", "p99")),
        ]
        for name, way in ways.items()
    ]  # fmt: skip
    rate = record["rate"]
    arrivals = "at once" if rate is None else f"at {rate:g} a second"
    table = table_of(
        ["", "tokens/s", "rows\nin use", "first token\nms, median", "\np99",
         "last token\nms, median", "\np99"],
        lines,
        title=f"{record['model']} on {record['machine']['device']}: {record['requests']} requests "
        f"{arrivals}, {record['max_rows']} rows, medians of {record['rounds']} rounds",
        caption=f"continuous over static: {ways['continuous']['ratio']:.2f} x the tokens/s",
    )  # fmt: skip
    PlainConsole().print(table)
    if plot is not None:
        draw_rows({name: way["rows"] for name, way in ways.items()}, record["max_rows"], plot)


def run(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: DecodingConfig,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Measure, and return the record. `about` is its head."""
    max_rows, embedded = args.max_rows or MAX_ROWS, about["model"] == EMBEDDED
    if embedded:  # whose answers end
        config = replace(config, stop_at_eos=True)
    else:
        check_room(model, max_rows, args.prompt_length, config)
    jobs = make_jobs(
        model, tokenizer, config, args.requests, word_problems=embedded,
        prompt_length=args.prompt_length, rate=args.rate, seed=about["seed"],
    )  # fmt: skip
    return {
        **about, "settings": asdict(config), "requests": args.requests, "rate": args.rate,
        "max_rows": max_rows, "rounds": args.rounds,
        **measure(model, jobs, max_rows, args.rounds),
    }  # fmt: skip
