"""`make demo`: a few held-out word problems, decoded live with the embedded model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dsb_runtime.cli import main as command
from dsb_runtime.cli.process import OneLineParser, ending, run_process
from dsb_runtime.demo.problems import heldout
from dsb_runtime.measure.command import PlainConsole

# With so high a threshold there are some twenty forwards to watch; the defaults take two or three.
SETTINGS = ["--block-length", "16", "--max-block-length", "24", "--threshold", "0.999"]


def run() -> int:
    console = PlainConsole()
    for seed, steps in ((1, 3), (2, 4), (3, 6)):
        (problem,) = heldout(1, seed=seed, steps=steps)
        console.rule(style="dim")
        console.print(problem.prompt, style="bold")
        status = command.main(
            ["generate", problem.prompt, "--live", "--frame-seconds", "0.25", *SETTINGS]
        )
        if status:
            return status
        console.print(f"expected: {problem.response}", style="dim")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, which takes no arguments, and return its exit status."""
    parser = OneLineParser(prog="demo", description=(__doc__ or "").partition(": ")[2])

    def both() -> int:
        parser.parse_args(argv)
        return run()

    return (run_process if argv is None else ending)("demo", both)


if __name__ == "__main__":
    sys.exit(main())
