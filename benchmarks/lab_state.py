"""What a run of `benchmarks/lab.py` has found, how long it may take, and what its parts share."""

from __future__ import annotations

import contextlib
import gc
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, measure
from benchmarks.roofline import Ceilings
from dsb_runtime.files import write_json

MODELS = ("model ", "main ")  # what models are kept under, with what was measured of them

AGAIN = 5.0  # seconds after which a part that has not stopped is told once more


class OutOfTimeError(BaseException):
    """Raised inside of a part when the run's time is over; no `except Exception` holds it."""


class NotHereError(Exception):
    """Raised by a part that cannot run on this machine; says why."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTimeError` inside, wherever it is by then (between two calls into C)."""

    def over(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, over)
    # And again: what is raised inside of a destructor or a callback of C is printed and forgotten.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Lab:
    """A run: figures by key and parts by name are what its file keeps.

    A figure has `value`, `note` and, where no target names them, `figure` and `unit`. A part has
    `status` ("ran", "failed", "out of time", "not run"), `why` and `seconds`.
    """

    seconds: float  # that the run may take
    path: Path | None = None  # of the file
    about: dict[str, Any] = field(default_factory=dict)  # machine, versions, command
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)  # what parts leave to later ones; not saved
    problems: list[str] = field(default_factory=list)  # of the part that runs
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    @property
    def applies(self) -> bool:
        """Whether the targets are meant for this machine."""
        return measure.on_gpu()

    def figure(self, key: str, value: float, note: str = "") -> None:
        """A figure that a target names; in the file at once, since a process may be killed."""
        self.figures[key] = {"value": float(value), "note": note}
        self.save()

    def fact(self, figure: str, value: float, unit: str, note: str = "") -> None:
        """A figure without a target."""
        self.figures[figure] = {
            "value": float(value), "note": note, "figure": figure, "unit": unit,
        }  # fmt: skip
        self.save()

    def problem(self, what: str) -> None:
        """Something failed that does not keep the part from going on: it counts as failed."""
        self.problems.append(what)

    def ceilings(self) -> Ceilings:
        """Of this process, measured at the first call."""
        if "ceilings" not in self.kept:
            device = measure.device()
            tflops = ceilings.matmul_tflops(measure.low_precision(), device)
            self.kept["ceilings"] = Ceilings(ceilings.copy_gb_per_s(device), tflops, "this run")
        return self.kept["ceilings"]

    def release(self, prefixes: tuple[str, ...] = ("",)) -> None:
        """Forget what parts left under names that begin so, and give its memory back."""
        for name in [name for name in self.kept if name.startswith(prefixes)]:
            del self.kept[name]
        gc.collect()
        if measure.on_gpu():
            torch.cuda.empty_cache()

    def save(self) -> None:
        """Write the file as a whole or not at all."""
        if self.path is not None:
            write_json(self.path, self.record())

    def beside(self, name: str, record: dict[str, Any]) -> Path | None:
        """Write another file beside this run's, if it has one: lab.json, lab.NAME.json."""
        if self.path is None:
            return None
        path = self.path.with_suffix(f".{name}.json")
        write_json(path, record)
        return path

    def record(self) -> dict[str, Any]:
        return {
            **self.about, "applies": self.applies, "figures": self.figures, "parts": self.parts,
            "details": self.details,
        }  # fmt: skip

    def resume(self, path: Path) -> None:
        """Take over what an earlier run found.

        Raises:
            ValueError: not such a file.
        """
        try:
            record = json.loads(path.read_text("utf-8"))
            self.figures, self.parts = dict(record["figures"]), dict(record["parts"])
            self.details = dict(record["details"])
        except OSError as error:
            raise ValueError(
                f"--json {path}: {error.strerror}; --continue expects a file"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--json {path}: expected what benchmarks.lab wrote") from error


@dataclass(frozen=True)
class Part:
    """A named piece of the run."""

    run: Callable[[Lab], None]
    about: str
    least: float = 10  # seconds without which it is not begun on a GPU


def one_line(error: BaseException) -> str:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}"[:200]


def alive() -> bool:
    """Whether the GPU still answers: after some errors a process gets nothing but errors."""
    if not measure.on_gpu():
        return True
    try:
        torch.cuda.synchronize()
        return (torch.ones(1, device="cuda") + 1).item() == 2
    except RuntimeError:
        return False


def run_part(lab: Lab, name: str, part: Part) -> None:
    """Run a part, note how it went and save; nothing that it raises stops the run."""
    least = part.least if measure.on_gpu() else 0
    if lab.left <= least:
        why = f"{max(lab.left, 0):.0f} s left, it takes {least:.0f} or more"
        lab.parts[name] = {"status": "not run", "why": why, "seconds": 0.0}
        lab.save()
        return
    began, lab.problems = time.monotonic(), []
    # What the file says where the process is killed, or kills itself, before the part ends.
    lab.parts[name] = {"status": "out of time", "why": "the process ended in it", "seconds": 0.0}
    lab.save()
    status, why, stopped = "ran", "", True
    try:
        with time_limit(lab.left):
            part.run(lab)
        stopped = False
    except OutOfTimeError:
        status, why = "out of time", "it was stopped"
    except NotHereError as error:
        status, why, stopped = "not run", str(error), False
    except (Exception, SystemExit) as error:  # whatever it is stands in the table
        lab.problem(one_line(error))
    if lab.problems:
        status, why = "failed", "; ".join(lab.problems)
    seconds = round(time.monotonic() - began, 1)
    lab.parts[name] = {"status": status, "why": why, "seconds": seconds}
    # Not where a figure alone was wrong: later parts would have to make the model again.
    if stopped and alive():
        lab.release(MODELS)
    lab.save()
