"""`dsb batch`: answer every line of a file, many at a time, and go on after any end.

An answer is one line that is written at once, and says which line it answers. So a file of answers
tells what is left to do: whoever starts the same command again loses no line and repeats none.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import queue
import stat
import sys
import threading
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_runtime.cli.batch_lines import MOST_BYTES, Line, Work, answer_of, error_of, read_line
from dsb_runtime.config import check_int
from dsb_runtime.defaults import defaults_for
from dsb_runtime.doors.openai.answers import Answer
from dsb_runtime.doors.openai.asked import Reader
from dsb_runtime.doors.openai.text import GrowingText
from dsb_runtime.doors.server import served_name
from dsb_runtime.engine.batch import BatchEngine
from dsb_runtime.engine.batcher import READ_AHEAD
from dsb_runtime.families import check_model

OURS = b'{"line": '  # how every answer begins
# A line, one that has another row done, the end of the lines, or why they cannot be read.
Event = tuple[int, bytes] | tuple[Line, Work] | OSError | None
NOTE = (
    'A line is {"id", "prompt" or "messages", settings by name} or a request of OpenAI\'s batch '
    "format. A line that cannot be answered is answered by an error. Started again with the same "
    "files, the command goes on with the lines that have no answer."
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
    if args.drafts:
        raise ValueError(f"--drafts={args.drafts}: prompts are decoded side by side; expected 0")
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


class Answers:
    """The file of answers: which lines have one, and where the next goes.

    Raises:
        ValueError: the file holds something else, or another command writes it.
    """

    def __init__(self, target: str) -> None:
        self.ids: dict[int, Any] = {}  # of each line that has an answer
        self.path, self.file = target, None
        if target == "-":
            return
        self.file = open(target, "a+b", buffering=0)  # noqa: SIM115 (it stays open to the end)
        try:
            self.take_over(self.file)
        except BaseException:
            self.close()
            raise

    def take_over(self, file: FileIO) -> None:
        """Lock the file, read what is answered, and drop a last line that was cut off."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another dsb batch writes it; expected one") from None
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a pipe, of which nothing is read
            return
        whole = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n") and (line.startswith(OURS) or OURS.startswith(line)):
                    break
                self.note(number, line)
                whole += len(line)
        file.truncate(whole)

    def close(self) -> None:
        """Let other commands write the file."""
        if self.file is not None:
            self.file.close()

    def note(self, number: int, line: bytes) -> None:
        """Take note of an answer that is there."""
        try:
            answer = json.loads(line)
            of, name = answer["line"], answer.get("custom_id", answer.get("id"))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            of, name = None, None
        if not isinstance(of, int) or not line.startswith(OURS):
            raise ValueError(
                f"{self.path} line {number}: no answer of dsb batch; expected its own file of "
                "answers, or none"
            )
        self.ids[of] = name

    def has(self, line: Line) -> bool:
        """Whether a line has its answer.

        Raises:
            ValueError: the answer is that of another line.
        """
        if line.number not in self.ids:
            return False
        if self.ids[line.number] != line.id:
            raise ValueError(
                f"{self.path}: line {line.number} is answered as {self.ids[line.number]!r}, and is "
                f"{line.id!r} now; expected the same IN.jsonl, or another OUT.jsonl"
            )
        return True

    def write(self, answer: dict[str, Any]) -> None:
        """Write an answer, so that it is there whatever ends the process."""
        line = json.dumps(answer) + "\n"
        if self.file is None:
            sys.stdout.write(line)
            sys.stdout.flush()
            return
        left = memoryview(line.encode())
        while left:
            left = left[self.file.write(left) :]


def lines_of(path: str) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line that is not blank; of a longer one the first MOST_BYTES + 1."""
    source = 0 if path == "-" else path
    with open(source, "rb", closefd=source != 0) as file:
        for number in itertools.count(1):
            line = file.readline(MOST_BYTES + 1)
            if not line:
                return
            last = line
            while len(last) > MOST_BYTES and not last.endswith(b"\n"):
                last = file.readline(MOST_BYTES + 1)
            if line.strip():
                yield number, line


def count_lines(path: str) -> int | None:
    """How many lines of a file are to be answered; None for a pipe, which can be read once."""
    if path == "-" or not Path(path).is_file():
        return None
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())


class Progress:
    """A bar with answers and tokens per second, on standard error where that is a terminal."""

    def __init__(self, total: int | None, already: int) -> None:
        self.began, self.tokens, self.answers, self.errors = time.perf_counter(), 0, 0, 0
        self.bar = tqdm(total=total, initial=already, unit=" answers", disable=None)

    @property
    def speed(self) -> float:
        return self.tokens / (time.perf_counter() - self.began)

    def count(self, tokens: int | None) -> None:
        """Count an answer of so many tokens, or an error."""
        if tokens is None:
            self.errors += 1
        else:
            self.answers += 1
            self.tokens += tokens
        self.bar.set_postfix_str(f"{self.speed:.1f} tokens/s, {self.errors} errors", refresh=False)
        self.bar.update()

    def report(self, target: str) -> None:
        """Say at the end what there was to count, unless the answers went where that would go."""
        if target != "-":
            said = f"{self.answers} answers, {self.errors} errors, {self.tokens} tokens"
            print(f"{said}, {self.speed:.1f} tokens/s")


class Decoder:
    """What a line becomes in an engine. `named` are the settings of the command line, which a line
    may override.

    Raises:
        TypeError, ValueError: the model does not take `named`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        named: dict[str, Any],
    ) -> None:
        defaults_for(model, **named)
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
        # Without an EOS no row ends before its response is full, and the text alone is cut.
        stops = {"stop_strings": asked.stops, "tokenizer": self.reader.tokenizer}
        how: dict[str, Any] = stops if self.eos_ids else {}
        requests = [
            self.engine.submit(
                prompt, asked.config, generator=generator, record=asked.logprobs, **how
            )
            for prompt in asked.prompts
            for _ in range(asked.samples)
        ]
        return Work(asked, requests, len(requests))

    def answer(self, line: Line, work: Work) -> tuple[dict[str, Any], int | None]:
        """The answer of a line whose rows are done, and its tokens; None for an error."""
        answers, tokenizer = [], self.reader.tokenizer
        for index, request in enumerate(work.requests):
            error = request.exception()
            if error is not None:
                return error_of(line, error), None
            text = GrowingText(tokenizer, self.eos_ids, work.asked.stops)
            answers.append(Answer(index, request.ids.tolist(), text))
            answers[-1].end(request.result())
        tokens = sum(len(answer.text.ids) for answer in answers)
        return answer_of(line, answers, work.asked.samples, self.reader), tokens


class Job:
    """The lines of one command, each on its way to an answer."""

    def __init__(self, args: argparse.Namespace, decoder: Decoder) -> None:
        self.args, self.decoder = args, decoder
        self.answers = Answers(args.target)
        self.progress = Progress(count_lines(args.source), len(self.answers.ids))
        # So many lines are read and have no answer yet at most.
        self.room = threading.Semaphore(decoder.engine.max_rows + READ_AHEAD)
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def read(self) -> None:
        """Read the lines, in a thread of its own: a pipe may keep it waiting."""
        try:
            for line in lines_of(self.args.source):
                self.room.acquire()
                self.events.put(line)
            self.events.put(None)
        except OSError as error:
            self.events.put(error)

    def answer_all(self) -> None:
        """Submit lines and write answers until all lines have one."""
        threading.Thread(target=self.read, name="dsb batch lines", daemon=True).start()
        under_way, more = 0, True
        while under_way or more:
            event = self.events.get()
            if event is None:
                more = False
            elif isinstance(event, OSError):
                raise event
            elif isinstance(event[1], bytes):
                under_way += self.submit(read_line(event[0], event[1]))
            else:
                line, work = event
                work.left -= 1
                if not work.left:
                    under_way -= 1
                    self.finish(*self.decoder.answer(line, work))

    def submit(self, line: Line) -> bool:
        """Let a line be decoded, unless it is wrong or has its answer."""
        if self.answers.has(line):
            self.room.release()
            return False
        try:
            work = self.decoder.submit(line)
        except (TypeError, ValueError) as error:
            self.finish(error_of(line, error), None)
            return False
        for request in work.requests:
            request.add_done_callback(lambda _: self.events.put((line, work)))
        return True

    def finish(self, answer: dict[str, Any], tokens: int | None) -> None:
        """Write an answer, and make room for another line."""
        self.answers.write(answer)
        self.progress.count(tokens)
        self.room.release()


def run(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    named: dict[str, Any],
) -> int:
    """Answer the lines of `args.source`, with the settings `named` where a line names no others."""
    job = Job(args, Decoder(args, model, tokenizer, named))
    with contextlib.closing(job.answers), contextlib.closing(job.progress.bar):
        job.answer_all()
    job.progress.report(args.target)
    return 0
