"""What the commands that measure have in common: options, checks of arguments, tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.errors import ConsoleError
from rich.table import Table

from dsb_runtime.config import check_int
from dsb_runtime.files import check_writable, read_json
from dsb_runtime.measure.plots import check_picture

LEAST = {
    "batch": 1, "prompt_length": 1, "rounds": 1, "limit": 1, "profile_steps": 1, "warmup": 0,
    "seed": 0, "requests": 1, "max_rows": 1, "problems": 1,
}  # fmt: skip
# A million problems are all different; with many more, the draw of new ones would not end.
MOST = {"seed": 2**63 - 1, "limit": 1_000_000, "requests": 1_000_000}

T = TypeVar("T")
# What reading a record of another kind raises; rich raises the last one.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, ConsoleError)


def add_output(parser: Any) -> None:
    """The options for files of figures."""
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write the figures here")
    add("--plot", type=Path, metavar="FILE.png", help="draw them")
    add("--from", dest="source", type=Path, metavar="FILE",
        help="measure nothing: print and draw what --json wrote")  # fmt: skip


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for a wrong argument of any of the commands; called before a checkpoint is
    read."""
    named = {name: value for name, value in vars(args).items() if value is not None}
    for name in LEAST.keys() & named.keys():
        for value in named[name] if isinstance(named[name], list) else [named[name]]:
            check_int(option(name), value, LEAST[name], MOST.get(name))
    check_writable("--json", named.get("json"))
    check_picture("--plot", named.get("plot"))
    if "json" in named and named["json"] == named.get("plot"):
        raise ValueError(f"--json and --plot {named['plot']}: expected two files")
    trace = named.get("torch")
    check_writable("--torch", trace)
    if trace is not None and trace.suffix != ".json":
        raise ValueError(f"--torch {trace}: expected a file ending in .json")


def option(name: str) -> str:
    """The option whose value an attribute of this name holds."""
    return f"--{'from' if name == 'source' else name.replace('_', '-')}"


def check_shown(named: Iterable[str], effective: Sequence[str]) -> None:
    """Raise ValueError if the command line of `--from` names an option that would change nothing
    that is shown. `named` are all options that it names, `effective` those that have an effect."""
    others = [option(name) for name in named if name not in ("source", *effective)]
    if others:
        accepted = ", ".join(map(option, effective))
        raise ValueError(
            f"--from and {', '.join(others)}: nothing is measured; expected {accepted} at most"
        )


def read_again(args: argparse.Namespace, read: Callable[[Any], T]) -> T:
    """`--from`: what `read` makes of the JSON of an earlier measurement."""
    record = read_json(args.source)
    try:
        return read(record)
    except MALFORMED as error:
        writer = f"dsb {args.command} --json"
        raise ValueError(f"--from {args.source}: expected what {writer} writes") from error


def table_of(
    columns: Sequence[str], lines: Iterable[Sequence[str]], *, left: Sequence[int] = (0,),
    no_wrap: bool = False, **how: Any,
) -> Table:  # fmt: skip
    """A table whose columns are aligned to the right, except those whose index is in `left`."""
    table = Table(**how)
    for index, name in enumerate(columns):
        justify: Any = "left" if index in left else "right"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=no_wrap)
    for line in lines:
        table.add_row(*line)
    return table


def markdown_table(columns: Mapping[str, str], lines: Iterable[Sequence[str]]) -> str:
    """A table as Markdown. `columns` has the alignment of each column, "left" or "right"."""
    rules = ("---:" if side == "right" else "---" for side in columns.values())
    cells = ([cell.replace("|", "\\|") for cell in line] for line in (columns, *lines))
    head, *rows = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join([head, f"|{'|'.join(rules)}|", *rows])


class PlainConsole(Console):
    """A console that prints text as it is. A name may have square brackets or colons, which rich
    takes for markup and emoji."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__(width=width, markup=False, emoji=False, highlight=False)

    @property
    def encoding(self) -> str:
        """That of standard output too, which rich takes for UTF-8: ASCII gets no other lines."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()

    def on_broken_pipe(self) -> None:
        """Leave to the command what to do where its reader has gone away. rich would exit."""
        raise


def wide_console() -> PlainConsole:
    """A console that is wide enough for every table where its output is a file."""
    return PlainConsole(width=None if Console().is_terminal else 150)
