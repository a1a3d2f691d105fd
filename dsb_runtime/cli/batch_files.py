"""The two files of `dsb batch`: the lines that are read, and the answers that are written.

An answer is one line that is written at once. It says which line it answers, and has a digest of
that line and of what all answers depend on. So a file of answers tells what is left to do, and does
not pass for the answers to other lines.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from dsb_runtime.cli.batch_lines import MOST_BYTES, is_error
from dsb_runtime.files import lock_path

OURS = b'{"line": '  # how every answer begins


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


def common_part(args: argparse.Namespace, named: dict[str, Any]) -> bytes:
    """What the answers of all lines depend on: the model by its path or hub id, and the options of
    the command but for those that say where and how many lines are decoded at a time."""
    names = [args.model, args.adapter]
    where = [str(Path(n).resolve()) if n is not None and Path(n).is_dir() else n for n in names]
    how = [args.dtype, args.family, args.mask_id, args.raw, args.seed]
    return json.dumps([where, how, named], sort_keys=True).encode()


@dataclass(frozen=True)
class Before:
    """An answer that was there before: where it stands, the digest of its line, whether it is an
    error."""

    at: int
    digest: str
    error: bool


class Answers:
    """The file of answers: which lines have one, and where the next goes. It is open, and locked
    against other commands, to the end of a `with`; one that is new and got no answer is removed
    where the `with` ends with an exception. What is no file (a pipe, a device) has no lock, and is
    only written: opening a pipe waits for its reader.

    Raises:
        ValueError: the file holds something else, or another command writes it.
    """

    def __init__(self, args: argparse.Namespace, named: dict[str, Any]) -> None:
        self.common = common_part(args, named)
        self.before: dict[int, Before] = {}  # by the number of the line
        self.unread: set[int] = set()  # the lines of these that have not been read yet
        self.count, self.errors = 0, 0  # of all answers, and of those that are errors
        self.num_lines: int | None = None  # of IN.jsonl, where they could be counted
        self.path, self.new = Path(args.target), False
        self.file: IO[bytes] | None = None
        if args.target == "-":
            return
        if self.path.exists() and not self.path.is_file():
            self.file = self.path.open("wb")
            return
        self.new = not self.path.exists()
        self.file = lock_path(self.path, str(self.path))
        try:
            self.take_over(self.file)
        except BaseException:
            self.file.close()
            raise

    def take_over(self, file: IO[bytes]) -> None:
        """Read what is answered, and drop a last line that was cut off."""
        whole = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n") and (line.startswith(OURS) or OURS.startswith(line)):
                    break
                self.note(number, line)
                whole += len(line)
        file.truncate(whole)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.new and not self.count and kind is not None:
            with contextlib.suppress(FileNotFoundError):
                self.path.resolve().unlink()  # a link stays
        if self.file is not None:
            self.file.close()

    def note(self, number: int, line: bytes) -> None:
        """Take note of an answer that is there."""
        try:
            answer = json.loads(line)
            of, digest, error = answer["line"], answer["digest"], is_error(answer)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            of, digest, error = None, None, False
        if not isinstance(of, int) or not isinstance(digest, str) or not line.startswith(OURS):
            raise ValueError(
                f"{self.path} line {number}: no answer of this dsb batch; expected its own file of "
                "answers, or none"
            )
        if of in self.before:
            raise ValueError(
                f"{self.path} line {number}: the second answer to line {of}, after that at line "
                f"{self.before[of].at}; expected one"
            )
        self.before[of] = Before(number, digest, error)
        self.unread.add(of)
        self.count += 1
        self.errors += error

    def digest(self, text: bytes) -> str:
        """Sixteen digits of a line and of what all answers depend on."""
        return hashlib.sha256(self.common + b"\n" + text.strip()).hexdigest()[:16]

    def has(self, number: int, digest: str) -> bool:
        """Whether the line of this number and digest, which has been read, had its answer before.

        Raises:
            ValueError: the answer is that of another line.
        """
        if number not in self.before:
            return False
        if self.before[number].digest != digest:
            self.refuse(number)
        self.unread.discard(number)
        return True

    def refuse(self, number: int) -> NoReturn:
        """Raise ValueError for an answer that is not of this command."""
        answer = self.before[number]
        error = f" (or delete its line {answer.at}, an error, to have that tried again)"
        raise ValueError(
            f"{self.path}: line {number} is answered for another IN.jsonl, model or setting; "
            f"expected those of before, or another OUT.jsonl{error if answer.error else ''}"
        )

    def check_all_read(self) -> None:
        """Raise ValueError for an answer to a line that was not in IN.jsonl to its end."""
        if self.unread:
            self.refuse(min(self.unread))

    def check_lines(self, source: str) -> None:
        """Check that all answers are of lines of a file, before the first line is decoded. Of a
        pipe, which can be read once, this is checked as it is read.

        Raises:
            ValueError: an answer is that of another line.
        """
        if source == "-" or not Path(source).is_file():
            return
        self.num_lines = 0
        for number, text in lines_of(source):
            self.num_lines += 1
            self.has(number, self.digest(text))
        self.check_all_read()

    def write(self, digest: str, answer: dict[str, Any]) -> None:
        """Write the answer of a line of this digest, so that it is there whatever ends the
        process."""
        self.count += 1
        self.errors += is_error(answer)
        line = json.dumps({"line": answer["line"], "digest": digest, **answer}) + "\n"
        if self.file is None:
            sys.stdout.write(line)
            sys.stdout.flush()
            return
        left = memoryview(line.encode())
        while left:
            left = left[os.write(self.file.fileno(), left) :]
