"""Decoding end to end against a plain eager loop, the bare linear layers and the machine's limits.

    python -m benchmarks.decode --preset 60m --device cpu --json decode.json --plot decode.png
    python -m benchmarks.decode --preset llada-8b --device cuda --dtype bfloat16 --batch 1 8 32

A random model of published shapes decodes in this package and in the loop of `eager.py`. In float32
the logits are scaled so that the threshold rule commits about `--tokens-per-forward`. Unless both
loops commit the same tokens at the same forwards, nothing is timed. In 16 bits rounding flips near
ties. There our run decodes in gen / tokens-per-forward steps, and the eager loop follows it: each
forward starts from the recorded canvas and window, and the share of decisions on which both agree
there is printed.

The linear layers of the same forwards are timed alone, in turn with both loops. One variant
multiplies what follows the last layer's K and V with the scored positions, as our steps do; the
other multiplies everything with all positions of a forward, as published loops do. A ratio is the
median of each round's ratio, so that a drift of the machine cancels. Single steps are timed in runs
of their own, in which a GPU spins while the host submits a step: watched runs, in which the host
looks at each step before it launches the next, and free runs as `generate` makes them, in which a
speculative launch may be wasted. Refreshes of free runs are captured for prompts of many lengths
and take `window_attention`; those of watched runs take torch's attention. A GPU is idle while no
kernel runs and none that has been launched waits for the one before it; "between steps" is the part
in which it waits for the host.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import dsb_runtime as dsb
from benchmarks import against, benchmark_parser, describe_benchmark
from benchmarks.decode_report import draw, median_ms, print_runs, step_figures
from benchmarks.eager import EagerOutput, eager_generate
from benchmarks.profiled import gap_share, gpu_busy_seconds, phase_times
from benchmarks.roofline import KINDS, Ceilings, check_most, positive
from benchmarks.step_cost import total_cost
from benchmarks.trajectory import Agreement, EagerClock, Trajectory, agreement
from dsb_runtime.cli.process import run_process
from dsb_runtime.files import write_json
from dsb_runtime.measure import models
from dsb_runtime.measure.command import check_arguments
from dsb_runtime.measure.steps import LinearLayers, TimedEngine
from dsb_runtime.measure.timing import copy_bandwidth, matmul_speed, timed

RATIOS = (
    ("ours", "eager"), ("eager", "ours"), ("ours", "floor"), ("ours", "floor_all_positions"),
    ("floor", "eager"), ("floor_all_positions", "eager"),
)  # fmt: skip


@torch.no_grad()
def scale_head(engine: dsb.Engine, prompt: Tensor, settings: dict[str, Any], target: float) -> None:
    """Scale the logits until about `target` tokens commit per forward. A random model is never
    sure; sharper logits stand in for a trained one's confidence. The final norm's gain is scaled,
    since the LM head may be the embedding as well."""
    gain = engine.model.model.norm.weight
    low, high, original = 8.0, 512.0, gain.clone()
    for _ in range(8):
        scale = (low * high) ** 0.5
        gain.copy_(original * scale)
        reached = settings["gen_length"] / engine.generate(prompt, **settings).nfe
        if abs(reached - target) < 0.5:
            return
        low, high = (scale, high) if reached < target else (low, scale)


class Case:
    """One batch of prompts. The constructor decodes it with both loops and checks one against the
    other (without `compare`, with ours alone), and exits if they would not do the same work."""

    def __init__(
        self, engine: dsb.Engine, prompt: Tensor, settings: dict[str, Any], compare: bool = True
    ) -> None:
        self.engine, self.prompt, self.settings = engine, prompt, settings
        self.model = model = engine.model
        self.exact = model.dtype == torch.float32
        self.record = Trajectory(model, prompt.shape[1], settings["gen_length"])
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        self.out = self.ours(self.record)
        if model.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(model.device)
        else:  # that of the whole process
            self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        # The timed run is not watched, and its steps may be wider. In 16 bits that may round
        # differently and flip a near tie, but it must not change the number of forwards.
        free = self.ours()
        self.repeats = torch.equal(free.sequences, self.out.sequences)
        eager = self.eager() if compare else []
        self.agreed = self.check(eager) if compare else None
        self.rounded = self.rounding(eager) if compare and not self.exact else None
        if free.nfe != self.out.nfe or (self.exact and not self.repeats):
            raise SystemExit("decode: a watched run decides differently: nothing is timed")

    def ours(self, on_step: Callable[[dsb.StepEvent], None] | None = None) -> dsb.GenerationOutput:
        return self.engine.generate(self.prompt, on_step=on_step, **self.settings)

    def eager(self, clock: EagerClock | None = None, model: Any = None) -> list[EagerOutput]:
        """Decode one prompt after another, along our run where rounding may flip a decision, with
        this model or, with None, ours."""
        settings = {k: v for k, v in self.settings.items() if k not in ("schedule", "cache")}
        outputs = []
        for row, prompt in enumerate(self.prompt):
            if clock is not None:
                clock.restart()
            follow = None if self.exact else self.record.rows[row]
            outputs.append(
                eager_generate(
                    model or self.model, prompt[None], follow=follow, on_step=clock, **settings
                )
            )
        return outputs

    def check(self, eager: list[EagerOutput]) -> Agreement:
        """The decisions on which both loops agree; in float32 they must agree on all."""
        sequences = torch.cat([other.sequences for other in eager])
        if self.exact and not torch.equal(self.out.sequences, sequences):
            raise SystemExit("decode: the loops return different tokens: nothing is timed")
        ours, theirs = self.record.commits, commits_of(eager)
        if self.exact and ours != theirs:
            raise SystemExit("decode: the loops commit differently: nothing is timed")
        return agreement(ours, theirs)

    def rounding(self, eager: list[EagerOutput]) -> dict[str, float]:
        """How many decisions 16 bits make otherwise than float32 would, ours and the eager loop's.
        All start each forward from our canvas."""
        exact = commits_of(self.eager(model=copy.deepcopy(self.model).float()))
        ours, theirs = (
            sum(map(len, exact)) - agreement(exact, commits).both
            for commits in (self.record.commits, commits_of(eager))
        )
        return {"ours": ours, "eager": theirs, "ours_over_eager": ours / max(theirs, 1)}


def commits_of(eager: list[EagerOutput]) -> list[dict[int, int]]:
    return [commits for output in eager for commits in output.commits]


def step_times(
    case: Case, engine: TimedEngine, watch: Callable[[dsb.StepEvent], None] | None = None
) -> list[tuple[str, float]]:
    """The time of each step of a decoding, without the host's. The steps of a watched run are those
    that were recorded; a free one may have wasted launches as well."""
    engine.take()
    with engine.without_host_time():
        case.ours(watch)
    return engine.take()


def measure(
    case: Case, engine: TimedEngine, ceilings: Ceilings, preset: models.Preset, rounds: int
) -> dict[str, Any]:
    """Time the runs of one batch and return all its figures."""
    device, record = case.model.device, case.record
    works = record.steps
    floor = LinearLayers(case.model, max(work.num_tokens for work in works))
    watched, free, shares = list[tuple[str, float]](), list[tuple[str, float]](), []
    eager = EagerClock(device)
    runs: dict[str, Callable[[], object]] = {
        "ours": case.ours,
        "eager": lambda: case.eager(eager),
        "floor": lambda: [floor.run(w.num_tokens, w.scored) for w in works],
        "floor_all_positions": lambda: [floor.run(w.num_tokens, w.num_tokens) for w in works],
    }
    if case.agreed is None:
        del runs["eager"]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(rounds), desc=f"batch {len(case.prompt)}", disable=None):
        for name, run in runs.items():
            engine.take()
            seconds[name].append(timed(run, device)[1])
            if name == "ours":
                shares.append(sum(took for _, took in engine.take()) / seconds[name][-1])
        free += step_times(case, engine)
        watched += step_times(case, engine, lambda event: None)

    def ratio(a: str, b: str) -> float | None:
        if not {a, b} <= runs.keys():
            return None
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens, agreed = sum(case.out.row_tokens), case.agreed
    steps = step_figures(record, watched, preset, ceilings)
    flops = sum(total_cost(preset, size).flops for size in record.sizes)
    widths = [work.widest for work in works if work.kind == "window"]
    return {
        "batch": len(case.prompt),
        "forwards": case.out.nfe,
        "tokens": tokens,
        "tokens_per_forward": record.num_commits / record.row_forwards,
        "refresh_share": record.kinds.count("refresh") / len(works),
        "window_width": statistics.mean(widths) if widths else None,
        "check": None if agreed is None else {
            "same_tokens": case.exact,
            "decisions": agreed.decisions,
            "positions_agreed": agreed.positions / agreed.decisions,
            "decisions_agreed": agreed.both / agreed.decisions,
            "flipped_by_rounding": case.rounded,
        },
        "timed_run_repeats_the_recorded": case.repeats,
        "seconds": medians,
        "tokens_per_second": tokens / medians["ours"],
        "eager_tokens_per_second": None if agreed is None else tokens / medians["eager"],
        "share_of_products_limit": 1e-12 * flops / ceilings.tflops / medians["ours"],
        **{f"{a}_over_{b}": ratio(a, b) for a, b in RATIOS},
        "steps": steps,
        **{f"{kind}_step_ms": steps.get(kind, {}).get("ms") for kind in KINDS},
        **{f"eager_{kind}_step_ms": median_ms(eager.steps, kind) for kind in KINDS},
        **{f"free_{kind}_step_ms": median_ms(free, kind) for kind in KINDS},
        "free_window_share_of_weights_limit": free_share(free, steps, "window", "weights"),
        "free_refresh_share_of_products_limit": free_share(free, steps, "refresh", "products"),
        "wasted_launches": len(free) / rounds - case.out.nfe,
        "gpu_wait_share": 1 - statistics.median(shares) if device.type == "cuda" else None,
        "peak_memory_bytes": case.peak,
    }  # fmt: skip


def free_share(
    free: list[tuple[str, float]], steps: dict[str, dict[str, Any]], kind: str, limit: str
) -> float | None:
    """The share of the "weights" or "products" limit that steps of a kind reach in free runs. Their
    limit is that of the watched run's steps, which compute the same without the positions that only
    fill a width class. Wider steps and wasted ones only add time."""
    seconds = [took for k, took in free if k == kind]
    if not seconds or kind not in steps:
        return None
    return 1e-3 * steps[kind][f"{limit}_ms"] / statistics.mean(seconds)


def idle_share(case: Case, run: dict[str, Any]) -> float | None:
    """Share of a decoding in which the GPU runs nothing. It is measured after all timing, since the
    profiler's hooks stay in the driver."""
    case.ours()  # a larger batch may have displaced the captured steps
    busy = gpu_busy_seconds(case.ours, case.model.device)
    return None if busy is None else 1 - busy / run["seconds"]["ours"]


def settings_of(args: argparse.Namespace, preset: models.Preset) -> dict[str, Any]:
    """The settings of the decoding. Raise ValueError for an argument that is not accepted."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: no CUDA device here; expected cpu")
    if args.device == "cpu" and args.no_graphs:
        raise ValueError("--no-graphs: a CPU has none; expected it with --device cuda")
    check_most("--tokens-per-forward", args.tokens_per_forward, "--block", args.block)
    most, room = models.POSITIONS - args.gen, f"before {args.gen} response positions"
    if args.prompt > most:
        raise ValueError(f"--prompt {args.prompt}: expected at most {most} {room}")
    check_arguments(args)
    if args.against is not None:
        against.check(args)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    prefix = preset.family.prefix_window if args.prefix_window is None else args.prefix_window
    rule: dict[str, Any] = {"threshold": args.threshold}
    if args.dtype != "float32":
        rule = {"steps": max(1, round(args.gen / args.tokens_per_forward))}
    settings = {
        "gen_length": args.gen, "block_length": args.block, "max_block_length": args.max_block,
        "prefix_window": prefix, "schedule": "dsb", "cache": "dsb", **rule,
    }  # fmt: skip
    dsb.DecodingConfig(**settings)
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    parser = benchmark_parser("decode", __doc__)
    add, above = parser.add_argument, positive(int)
    add("--preset", choices=models.PRESETS, default="60m", help="model shapes (60m)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=models.DTYPES, help="bfloat16 on cuda, float32 on cpu")
    add("--batch", type=above, nargs="+", default=[1], metavar="N", help="one run for each")
    add("--prompt", type=above, default=512, help="prompt tokens (512)")
    add("--gen", type=above, default=128, help="response positions (128)")
    add("--block", type=above, default=32, help="block length (32)")
    add("--max-block", type=above, help="maximal block length; unbounded without it")
    add("--prefix-window", type=int, help="positions before the window; the family's without it")
    add("--threshold", type=float, default=0.9, help="of the rule in float32 (0.9)")
    add("--tokens-per-forward", type=positive(float), default=models.TOKENS_PER_FORWARD,
        help=f"how many a step should commit ({models.TOKENS_PER_FORWARD:g})")  # fmt: skip
    add("--rounds", type=above, default=7, help="timed rounds (7)")
    add("--no-graphs", action="store_true", help="launch every kernel instead of CUDA graphs")
    add("--no-eager", action="store_true", help="do not compare with the eager loop")
    add(
        "--phases",
        action="store_true",
        help="time the phases of steps, and kernels one after another",
    )
    add("--against", type=Path, metavar="DIR", help="compare with this other checkout instead")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write the figures here")
    add("--plot", type=Path, metavar="FILE.png", help="draw them")
    args = parser.parse_args(argv)
    preset = models.PRESETS[args.preset]
    try:
        settings = settings_of(args, preset)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    model = models.random_model(preset, dtype, device, args.seed)
    engine = TimedEngine(model, graphs=False if args.no_graphs else None)
    batches = list(dict.fromkeys(args.batch))
    models.check_room(model, max(batches), args.prompt, dsb.DecodingConfig(**settings))
    prompts = models.random_prompts(model, None, max(batches), args.prompt, args.seed)
    if dtype == torch.float32:
        scale_head(engine, prompts[:1], settings, args.tokens_per_forward)
    result: dict[str, Any] = {
        **describe_benchmark("decode", argv, device),
        "settings": {
            "preset": args.preset, "dtype": args.dtype, "prompt": args.prompt, "gen": args.gen,
            "block": args.block, "seed": args.seed, "rounds": args.rounds,
            "graphs": device.type == "cuda" and not args.no_graphs, **settings,
        },
    }  # fmt: skip

    def write() -> None:
        if args.json:
            write_json(args.json, result)

    if args.against is not None:
        engine.release()
        result |= against.compare(args, model, prompts, settings, batches)
        write()
        return
    gb_per_s, tflops = copy_bandwidth(device) * 1e-9, matmul_speed(dtype, device) * 1e-12
    ceilings = Ceilings(gb_per_s, tflops, "this run")
    result["ceilings"] = {"copy_gb_per_s": gb_per_s, "matmul_tflops": tflops}
    result["eager"] = "the prompts of a batch one after another"
    result["runs"], cases = [], []
    for batch in batches:
        cases.append(Case(engine, prompts[:batch], settings, compare=not args.no_eager))
        result["runs"].append(measure(cases[-1], engine, ceilings, preset, args.rounds))
        write()  # a larger batch may fail, which must not lose the figures of this one
    for case, run in zip(cases, result["runs"], strict=True):
        run["gpu_idle_share"] = idle_share(case, run)
        if args.phases:
            run["gpu_gap_share"] = gap_share(engine, case.ours, run["seconds"]["ours"])
            run["phase_us"] = phase_times(model, case.prompt, settings, case.record.kinds)
        write()
    print_runs(result)
    if args.plot:
        draw(result, args.plot)


if __name__ == "__main__":
    sys.exit(run_process("decode", main))
