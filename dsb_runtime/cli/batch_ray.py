"""`dsb batch --ray`: the lines of a file on a Ray cluster, by a `BatchEngine` on each GPU.

Ray Data starts the replicas, starts one anew that dies, and gives each as many lines as it has
rows for. The file of answers is that of `dsb batch`, and is written in this process alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
from collections.abc import Iterable
from typing import Any

from dsb_runtime.cli.batch import Decoder, Load, Progress
from dsb_runtime.cli.batch_files import Answers, lines_of
from dsb_runtime.cli.batch_lines import error_of, read_line
from dsb_runtime.cli.process import ERRORS
from dsb_runtime.engine.batcher import MOST_ROWS, READ_AHEAD
from dsb_runtime.files import absolute_folder

MOST_TASKS = 10_000  # a task has one line, or more where the file has more lines than this


class Replica:
    """A model in a process of the cluster, which threads of Ray ask for an answer each. One that
    cannot begin says why in the place of answers: Ray would try it again and again."""

    def __init__(self, args: argparse.Namespace, load: Load, named: dict[str, Any]) -> None:
        self.wrong = ""
        try:
            self.decoder = Decoder(args, *load(args), named)
        except Exception as error:
            self.wrong = str(error) if isinstance(error, ERRORS) else repr(error)
            self.wrong = self.wrong or type(error).__name__

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The answer of a line as JSON, and its tokens. What it raises ends the command."""
        if self.wrong:
            return {"digest": "", "answer": "", "tokens": 0, "wrong": self.wrong}
        line = read_line(row["number"], row["text"])
        try:
            work = self.decoder.submit(line)
        except (TypeError, ValueError) as error:
            answer, tokens = error_of(line, error), 0
        else:
            answer, tokens = self.decoder.answer(line, work)
        answered = {"digest": row["digest"], "answer": json.dumps(answer), "tokens": tokens}
        return {**answered, "wrong": ""}


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ImportError without the extra."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; dsb batch --ray needs the extra: dsb-kernels[ray]") from error


def answered(
    args: argparse.Namespace, load: Load, named: dict[str, Any], todo: list[dict[str, Any]]
) -> Iterable[dict[str, Any]]:
    """What `Replica` makes of each line, as they come."""
    import ray

    gpus = 0 if args.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    rows = MOST_ROWS if args.max_rows is None else args.max_rows
    replicas = ray.data.ActorPoolStrategy(
        size=args.replicas or gpus or 1,
        max_concurrent_calls_per_actor=rows + READ_AHEAD,
        enable_true_multi_threading=True,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the bar of this command stays alone
    ray.data.DataContext.get_current().enable_progress_bars = False
    lines = ray.data.from_items(todo, override_num_blocks=min(len(todo), MOST_TASKS))
    replica: Any = Replica  # a class, where Ray's annotation names functions alone
    done = lines.map(
        replica, fn_constructor_args=(args, load, named), compute=replicas, num_cpus=1,
        num_gpus=1 if gpus else 0,
    )  # fmt: skip
    return done.iter_rows()


def run(args: argparse.Namespace, load: Load, named: dict[str, Any]) -> int:
    """Answer the lines of `args.source` that have no answer yet."""
    import ray

    with Answers(args, named) as answers:
        answers.check_lines(args.source)
        already, todo = answers.count, []
        for number, text in lines_of(args.source):
            digest = answers.digest(text)
            if not answers.has(number, digest):
                todo.append({"number": number, "text": text, "digest": digest})
        answers.check_all_read()
        # The replicas run in folders of their own.
        args.model = absolute_folder(args.model)
        args.adapter = args.adapter and absolute_folder(args.adapter)
        if todo and not ray.is_initialized():
            # The cluster of RAY_ADDRESS or of this machine, or one that ends with this process.
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        progress = Progress(len(todo) + already, already)
        with contextlib.closing(progress.bar):
            for row in answered(args, load, named, todo) if todo else ():
                if row["wrong"]:
                    raise ValueError(row["wrong"])
                answer = json.loads(row["answer"])
                answers.write(row["digest"], answer)
                progress.count(answer, row["tokens"])
    return progress.report(answers)
