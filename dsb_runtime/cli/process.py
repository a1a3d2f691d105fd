"""How a command ends: an error is one line, and an end that was asked for is silent.

`dsb`, the demo and the benchmarks run inside `ending`. A command that is a process of its own calls
`run_process` instead, which also changes the process: its signals and its streams.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import torch

from dsb_runtime.engine.cache import is_out_of_memory

# What wrong input raises. An ImportError names an extra that is not installed.
ERRORS = (
    ValueError, TypeError, OSError, ImportError, OverflowError, FloatingPointError, MemoryError,
    torch.OutOfMemoryError,
)  # fmt: skip
FAILED, INTERRUPTED, READER_GONE = 2, 130, 141  # the last two are what a shell calls these signals
ENDING = (signal.SIGTERM, signal.SIGHUP)


class OneLineParser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, like every other error of the command."""

    def parse_args(self, *words: Any, **named: Any) -> Any:
        """As argparse does it, but that the hint names the command whose option is not known."""
        args, unknown = self.parse_known_args(*words, **named)
        if unknown:
            prog = f"{self.prog} {getattr(args, 'command', '')}".strip()
            said = " ".join(" ".join(unknown).split())
            self.exit(FAILED, f"{self.prog}: unrecognized arguments: {said} (see {prog} --help)\n")
        return args

    def error(self, message: str) -> NoReturn:
        said = " ".join(message.split())
        self.exit(FAILED, f"{self.prog}: {said} (see {self.prog} --help)\n")


def end_by_signal(number: int, frame: FrameType | None) -> NoReturn:
    """A signal handler. What is half done is cleaned up on the way out, as after an interrupt, and
    another signal does not disturb that."""
    for each in (signal.SIGINT, *ENDING):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def prepare_process() -> None:
    """Let SIGTERM and SIGHUP end the process as Ctrl-C does, unless whoever started it has chosen
    otherwise. Let the streams write `\\u25a2` for a character that a terminal's encoding lacks."""
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end_by_signal)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it is None where it was closed at the start
            stream.reconfigure(errors="backslashreplace")


def run_process(name: str, main: Callable[[], int | None]) -> int:
    """`ending` for a command that is a process of its own. A signal that comes once it has returned
    ends the process at once: an exception in Python's own exit would be printed with its traceback.
    """
    prepare_process()
    try:
        return ending(name, main)
    finally:
        for number in (signal.SIGINT, *ENDING):
            if signal.getsignal(number) in (end_by_signal, signal.default_int_handler):
                signal.signal(number, signal.SIG_DFL)


def flush() -> None:
    """Write what standard output has buffered. If that fails, what is left goes nowhere: otherwise
    Python would try again at its exit, and print a traceback of its own."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):  # a stream in memory has no file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        raise


def ending(name: str, run: Callable[[], int | None]) -> int:
    """Run a command, and return its exit status: its own, 2 after an error (one line says which),
    130 after an interrupt, 141 where the reader of its output has gone away."""
    try:
        try:
            return run() or 0
        finally:
            flush()
    except KeyboardInterrupt:
        status, said = INTERRUPTED, "interrupted"
    except BrokenPipeError:
        return READER_GONE
    except (*ERRORS, RuntimeError) as error:
        if not isinstance(error, ERRORS) and not is_out_of_memory(error):
            raise  # a fault of this package, whose traceback is needed
        status, said = FAILED, " ".join(str(error).split()) or type(error).__name__
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(f"{name}: {said}", file=sys.stderr)
    return status
