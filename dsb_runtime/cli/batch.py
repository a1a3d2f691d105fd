"""`dsb batch`: answer every line of a file, many at a time, and go on after any end.

Whoever starts the same command again loses no line and repeats none: the file of answers
(`dsb_runtime.cli.batch_files`) tells what is left to do.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_runtime.cli.batch_files import Answers, lines_of
from dsb_runtime.cli.batch_lines import Line, Work, answer_of, error_of, is_error, read_line
from dsb_runtime.config import check_int
from dsb_runtime.defaults import defaults_for
from dsb_runtime.doors.openai.answers import INTERNAL, Answer, failure_of
from dsb_runtime.doors.openai.asked import Reader
from dsb_runtime.doors.openai.errors import BodyError
from dsb_runtime.doors.openai.text import GrowingText
from dsb_runtime.doors.server import served_name
from dsb_runtime.engine.batch import BatchEngine
from dsb_runtime.engine.batcher import READ_AHEAD
from dsb_runtime.engine.request import check_request
from dsb_runtime.families import check_model
from dsb_runtime.files import check_writable

LINES_FAILED = 3  # the exit status; 1 would be that of a traceback
Load = Callable[[argparse.Namespace], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
NOTE = (
    'A line is {"id", "prompt" or "messages", settings by name} or a request of OpenAI\'s batch '
    "format. A line that cannot be answered is answered by an error, and the command ends with 3 "
    "if there is such an answer in OUT.jsonl. Started again in the same way, it goes on with the "
    "lines that have no answer; other lines, another model or other settings are refused."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN.jsonl", help="a prompt a line, - for standard input")
    parser.add_argument(
        "target", metavar="OUT.jsonl", help="gets an answer a line, as they come; - for standard "
        "output",
    )  # fmt: skip
    add = parser.add_argument_group("batch").add_argument
    add("--raw", action="store_true", help="do not apply the chat template to prompts")
    add("--max-rows", type=int, metavar="N", help="prompts at a time (default: what fits, to 64)")
    add("--ray", action="store_true", help="on the Ray cluster of $RAY_ADDRESS or of this machine")
    add(
        "--replicas", type=int, metavar="N", help="models on the cluster, each with a GPU if there "
        "are any (default: as many as there are GPUs, else 1)",
    )  # fmt: skip


def check_arguments(args: argparse.Namespace) -> None:
    """Raise for a wrong argument, before a checkpoint is read."""
    if args.max_rows is not None:
        check_int("--max-rows", args.max_rows, 1)
    if args.seed is not None:
        check_int("--seed", args.seed, 0, 2**62)
    if args.replicas is not None:
        check_int("--replicas", args.replicas, 1)
        if not args.ray:
            raise ValueError(f"--replicas={args.replicas}: expected it with --ray only")
    source, target = Path(args.source), Path(args.target)
    if args.source == "-":
        if sys.stdin is None:
            raise ValueError("IN.jsonl -: standard input is closed; expected lines")
    elif not source.is_file() and not source.is_fifo():
        raise ValueError(f"{source}: no such file; expected lines of JSON")
    if args.target == "-" and sys.stdout is None:
        raise ValueError("OUT.jsonl -: standard output is closed; expected a place for answers")
    if "-" not in (args.source, args.target) and target.exists() and source.samefile(target):
        raise ValueError(f"{target}: both IN.jsonl and OUT.jsonl; expected two files")
    check_writable("OUT.jsonl", None if args.target == "-" else target)


class Progress:
    """A bar with answers and tokens per second, on standard error where that is a terminal."""

    def __init__(self, total: int | None, already: int) -> None:
        self.began, self.tokens, self.answers, self.errors = time.perf_counter(), 0, 0, 0
        self.bar = tqdm(total=total, initial=already, unit=" answers", disable=None)

    @property
    def speed(self) -> float:
        return self.tokens / (time.perf_counter() - self.began)

    def count(self, answer: dict[str, Any], tokens: int) -> None:
        """Count an answer, which may be an error, of so many tokens."""
        self.tokens += tokens
        if is_error(answer):
            self.errors += 1
        else:
            self.answers += 1
        self.bar.set_postfix_str(f"{self.speed:.1f} tokens/s, {self.errors} errors", refresh=False)
        self.bar.update()

    def report(self, answers: Answers) -> int:
        """Say at the end, on standard error, what there was to count, and how many answers are
        errors, with those of before. Returns the exit status."""
        said = f"{self.answers} answers, {self.errors} errors, {self.tokens} tokens"
        print(f"{said}, {self.speed:.1f} tokens/s", file=sys.stderr)
        if not answers.errors:
            return 0
        said = f"dsb: {answers.errors} of {answers.count} lines are answered by an error"
        print(said, file=sys.stderr)
        return LINES_FAILED


class Decoder:
    """What a line becomes in an engine. `named` are the settings of the command line, which a line
    may override.

    Raises:
        TypeError, ValueError: the model does not take `named`, whatever the line.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        named: dict[str, Any],
    ) -> None:
        check_request(model, defaults_for(model, **named), None, False)
        self.args, self.engine = args, BatchEngine(model, args.max_rows)
        self.reader = Reader(model, tokenizer, served_name(args.model), streams=False, named=named)
        self.eos_ids = check_model(model).eos_ids

    def submit(self, line: Line) -> Work:
        """Let a line be decoded.

        Raises:
            TypeError, ValueError: it cannot be; the message is one line.
        """
        asked, generator = line.asked(self.reader, self.args.raw), None
        seed = asked.seed
        if seed is None and self.args.seed is not None:
            seed = self.args.seed + line.number
        if seed is not None:
            generator = torch.Generator(self.engine.model.device).manual_seed(seed)
        requests = [
            self.engine.submit(
                prompt,
                asked.config,
                generator=generator,
                record=asked.logprobs,
                # Without an EOS no row ends before its response is full, and the text alone is cut.
                stop_strings=asked.stops if self.eos_ids else None,
                tokenizer=self.reader.tokenizer,
            )
            for prompt in asked.prompts
            for _ in range(asked.samples)
        ]
        return Work(asked, requests, len(requests))

    def answer(self, line: Line, work: Work) -> tuple[dict[str, Any], int]:
        """The answer of a line, once its rows are done, and its tokens.

        Raises:
            BaseException: what a row has failed of, unless that is its own (NaN, or no memory for
                it). A device that has a fault fails every line, and none of them is to blame.
        """
        answers, tokenizer = [], self.reader.tokenizer
        for index, request in enumerate(work.requests):
            error = request.exception()
            if error is not None:
                status, code = failure_of(error)
                if code == INTERNAL:
                    raise error
                return error_of(line, BodyError(str(error), code=code, status=status)), 0
            text = GrowingText(tokenizer, self.eos_ids, work.asked.stops)
            answers.append(Answer(index, request.ids.tolist(), text))
            answers[-1].end(request.result())
        tokens = sum(len(answer.text.ids) for answer in answers)
        return answer_of(line, answers, work.asked.samples, self.reader), tokens


@dataclass
class Read:
    """A line has been read."""

    number: int
    text: bytes


@dataclass
class RowDone:
    """A line has another row done."""

    digest: str
    line: Line
    work: Work


class Job:
    """The lines of one command, each on its way to an answer."""

    def __init__(self, args: argparse.Namespace, decoder: Decoder, answers: Answers) -> None:
        self.args, self.decoder, self.answers = args, decoder, answers
        self.progress = Progress(answers.num_lines, answers.count)
        # So many lines are read and have no answer yet at most.
        self.room = threading.Semaphore(decoder.engine.max_rows + READ_AHEAD)
        # None is the end of the lines, an Exception says why they cannot be read further.
        self.events: queue.SimpleQueue[Read | RowDone | Exception | None] = queue.SimpleQueue()

    def read(self) -> None:
        """Read the lines, in a thread of its own: a pipe may keep it waiting."""
        try:
            for number, text in lines_of(self.args.source):
                self.room.acquire()
                self.events.put(Read(number, text))
            self.events.put(None)
        except Exception as error:  # `answer_all` would wait for ever
            self.events.put(error)

    def answer_all(self) -> None:
        """Submit lines and write answers until all lines have one.

        Raises:
            Exception: why the lines cannot be read further. Those that were read have their
                answers.
            ValueError: an answer is that of a line that was not there.
            BaseException: a fault that is no line's own. The lines under way have no answer.
        """
        threading.Thread(target=self.read, name="dsb batch lines", daemon=True).start()
        under_way, more, error = 0, True, None
        while under_way or more:
            event = self.events.get()
            if isinstance(event, Read):
                under_way += self.submit(event.number, event.text)
            elif isinstance(event, RowDone):
                event.work.left -= 1
                if not event.work.left:
                    under_way -= 1
                    self.finish(event.digest, *self.decoder.answer(event.line, event.work))
            else:
                more, error = False, event
        if error is not None:
            raise error
        self.answers.check_all_read()

    def submit(self, number: int, text: bytes) -> bool:
        """Let a line be decoded, unless it is wrong or has its answer."""
        digest = self.answers.digest(text)
        if self.answers.has(number, digest):
            self.room.release()
            return False
        line = read_line(number, text)
        try:
            work = self.decoder.submit(line)
        except (TypeError, ValueError) as error:
            self.finish(digest, error_of(line, error), 0)
            return False
        for request in work.requests:
            request.add_done_callback(lambda _: self.events.put(RowDone(digest, line, work)))
        return True

    def finish(self, digest: str, answer: dict[str, Any], tokens: int) -> None:
        """Write an answer, and make room for another line."""
        self.answers.write(digest, answer)
        self.progress.count(answer, tokens)
        self.room.release()


def run(args: argparse.Namespace, load: Load, named: dict[str, Any]) -> int:
    """Answer the lines of `args.source`, with the settings `named` where a line names no others.
    The two files are looked at before the checkpoint is loaded."""
    with Answers(args, named) as answers:
        answers.check_lines(args.source)
        job = Job(args, Decoder(args, *load(args), named), answers)
        with contextlib.closing(job.progress.bar):
            job.answer_all()
    return job.progress.report(answers)
