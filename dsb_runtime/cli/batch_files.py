"""The two files of `dsb batch`: the lines that are read, and the answers that are written.

An answer is one line that is written at once. It says which line it answers, and has a digest of
that line and of what all answers depend on. So a file of answers tells what is left to do, and does
not pass for the answers to other lines.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import stat
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

from dsb_runtime.cli.batch_lines import MOST_BYTES
from dsb_runtime.files import lock

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


class Answers:
    """The file of answers: which lines have one, and where the next goes.

    Raises:
        ValueError: the file holds something else, or another command writes it.
    """

    def __init__(self, args: argparse.Namespace, named: dict[str, Any]) -> None:
        self.common = common_part(args, named)
        self.digests: dict[int, str] = {}  # of each line that had an answer before
        self.count, self.errors = 0, 0  # of all answers, and of those that are errors
        self.path, self.file = args.target, None
        if args.target == "-":
            return
        self.file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (it stays open to the end)
        try:
            self.take_over(self.file)
        except BaseException:
            self.close()
            raise

    def take_over(self, file: FileIO) -> None:
        """Lock the file, read what is answered, and drop a last line that was cut off."""
        lock(file, self.path)
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
            of, digest, error = answer["line"], answer["digest"], answer.get("error")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            of, digest, error = None, None, None
        if not isinstance(of, int) or not isinstance(digest, str) or not line.startswith(OURS):
            raise ValueError(
                f"{self.path} line {number}: no answer of this dsb batch; expected its own file of "
                "answers, or none"
            )
        self.digests[of] = digest
        self.count += 1
        self.errors += error is not None

    def digest(self, text: bytes) -> str:
        """Sixteen digits of a line and of what all answers depend on."""
        return hashlib.sha256(self.common + b"\n" + text.strip()).hexdigest()[:16]

    def has(self, number: int, digest: str) -> bool:
        """Whether the line of this number and digest had its answer before.

        Raises:
            ValueError: the answer is that of another line.
        """
        if number in self.digests and self.digests[number] != digest:
            self.refuse(number)
        return number in self.digests

    def refuse(self, number: int) -> NoReturn:
        """Raise ValueError for an answer that is not of this command."""
        raise ValueError(
            f"{self.path}: line {number} is answered for another IN.jsonl, model or setting; "
            "expected those of before, or another OUT.jsonl"
        )

    def check_lines(self, source: str) -> int | None:
        """Check that all answers are of lines of a file, before the first line is decoded. Returns
        how many lines the file has; None for a pipe, which can be read once.

        Raises:
            ValueError: an answer is that of another line.
        """
        if source == "-" or not Path(source).is_file():
            return None
        count, others = 0, set(self.digests)
        for number, text in lines_of(source):
            count += 1
            if self.has(number, self.digest(text)):
                others.remove(number)
        if others:
            self.refuse(min(others))
        return count

    def write(self, digest: str, answer: dict[str, Any]) -> None:
        """Write the answer of a line of this digest, so that it is there whatever ends the
        process."""
        self.count += 1
        self.errors += answer.get("error") is not None
        line = json.dumps({"line": answer["line"], "digest": digest, **answer}) + "\n"
        if self.file is None:
            sys.stdout.write(line)
            sys.stdout.flush()
            return
        left = memoryview(line.encode())
        while left:
            left = left[self.file.write(left) :]
