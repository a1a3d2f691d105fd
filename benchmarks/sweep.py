"""Other launch configurations than those of `dsb_kernels/_configs.py`, timed on a GPU.

    python -m benchmarks.sweep --size 64 --json sweep.json

`sweep.toml` lists the configurations to try. Each is timed twice, so that noise shows. Change the
table by hand where one is faster by more than its two times differ. The command replaces entries of
the table in its own process only.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import benchmark_parser, describe_benchmark, ops, read_toml
from benchmarks.attention_cases import attention_out_case
from benchmarks.op_case import Case, check, device, on_gpu, time_contender
from dsb_kernels import _configs
from dsb_kernels._configs import Config, architecture_of
from dsb_runtime.cli.process import run_process
from dsb_runtime.files import write_json
from dsb_runtime.measure.command import check_arguments

Run = Callable[[Callable[[], Case]], dict[str, Any]]  # from what makes a case to its figures
SPLITS = (2, 3, 4, 5, 6)  # of window_attention, at 128 positions of LLaDA


def candidates(item: dict[str, Any]) -> list[Config]:
    """The configurations of an entry of `sweep.toml`."""
    return [Config({k: v for k, v in c.items() if k.isupper()}, c["num_warps"], c["num_stages"])
            for c in item["configs"]]  # fmt: skip


def in_words(config: Config) -> str:
    blocks = " ".join(f"{name}={value}" for name, value in config.blocks.items())
    return f"{blocks} warps={config.num_warps} stages={config.num_stages}"


def using(key: str, size: int, config: Config, architecture: str) -> Any:
    """A context in which the table's configuration of an op for a size is another one."""
    entry = (key, architecture)
    table = _configs.CONFIGS[entry if entry in _configs.CONFIGS else (key, "any")]
    return mock.patch.dict(table, {min(most for most in table if most >= size): config})


def sweep_one(item: dict[str, Any], run: Run) -> Iterator[dict[str, Any]]:
    """Run the table's configuration and every other one of an entry of `sweep.toml`."""
    benchmark, architecture = ops.BENCHMARKS[item["op"]], architecture_of(device())
    shape = item["shape"] if on_gpu() else benchmark.shapes[0]
    key, size = item["key"], item["size"]
    now = _configs.configuration(key, size, architecture)
    for config in (now, *candidates(item)):
        with using(key, size, config, architecture):
            yield run(functools.partial(benchmark.case, **shape)) | {
                "key": key, "size": size, "shape": shape, "configuration": in_words(config),
                "current": config is now,
            }  # fmt: skip


def sweep_splits(run: Run) -> Iterator[dict[str, Any]]:
    """Run window_attention with the `num_splits` that it chooses (None), then with fixed ones."""
    width, lengths = (128, (1280, 4096)) if on_gpu() else (8, (96,))
    for positions, splits in itertools.product(lengths, (None, *SPLITS)):
        shape = {"model": "LLaDA-8B", "batch": 1, "width": width, "positions": positions}
        make = functools.partial(ops.BENCHMARKS["window_attention"].case, **shape, splits=splits)
        yield run(make) | {
            "key": "window_attention splits", "size": width, "shape": shape,
            "configuration": f"num_splits={splits}", "current": splits is None,
        }  # fmt: skip


def sweep_next_weight(run: Run) -> Iterator[dict[str, Any]]:
    """Run attention and the linear layer that follows it, of whose weight attention is told or
    not."""
    sizes = {"width": 64, "positions": 1280} if on_gpu() else {"width": 8, "positions": 96}
    shape = {"model": "LLaDA-8B", **sizes}
    for told in (True, False):
        yield run(functools.partial(attention_out_case, **shape, told=told)) | {
            "key": "window_attention, linear_add_norm", "size": sizes["width"], "shape": shape,
            "configuration": "next_weight" if told else "next_weight=None", "current": told,
        }  # fmt: skip


def checked(make: Callable[[], Case]) -> dict[str, Any]:
    """The error of a call over what is allowed, or the reason why it is not used."""
    try:
        error = check(make(), "op")
    except Exception as error:  # the configuration may not compile
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return {"error": error} if error <= 1 else {"failed": f"{error:.2f} times the error allowed"}


def two_times(make: Callable[[], Case]) -> dict[str, Any]:
    """Two cold times in microseconds after a check, or the reason why there are none."""
    line = checked(make)
    try:
        if "failed" not in line:
            line["us"] = [time_contender(make, "op")["cold_us"] for _ in range(2)]
    except Exception as error:
        line["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return line


def main(argv: Sequence[str] | None = None) -> int:
    items = read_toml("sweep.toml")["sweep"]
    sizes = sorted({item["size"] for item in items})
    parser = benchmark_parser("sweep", __doc__)
    add = parser.add_argument
    add("--size", type=int, nargs="+", choices=sizes, metavar="N",
        help="these sizes of sweep.toml only")  # fmt: skip
    add("--check", action="store_true", help="compile and check them, time nothing")
    add("--json", type=Path, metavar="FILE", help="written after every line")
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    record = {**describe_benchmark("sweep", argv, device()), "lines": []}
    run = checked if args.check else two_times
    sweeps = [sweep_one(item, run) for item in items if item["size"] in (args.size or sizes)]
    if 64 in (args.size or sizes):
        sweeps.append(sweep_next_weight(run))
    if 128 in (args.size or sizes):
        sweeps.append(sweep_splits(run))
    for line in itertools.chain(*sweeps):
        record["lines"].append(line)
        print(line["key"], line["size"], line["configuration"], "*" if line["current"] else "",
              line.get("failed", line.get("us", "right")), flush=True)  # fmt: skip
        if args.json:
            write_json(args.json, record)
    return int(any("failed" in line for line in record["lines"] if line["current"]))


if __name__ == "__main__":
    sys.exit(run_process("sweep", main))
