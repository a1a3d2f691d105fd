"""`make demo`: a few held-out word problems, decoded live with the embedded model."""

from __future__ import annotations

import sys

from rich.console import Console

from dsb_runtime.cli.main import main
from dsb_runtime.demo.problems import heldout

# With so high a threshold there are some twenty forwards to watch; the defaults take two or three.
SETTINGS = ["--block-length", "16", "--max-block-length", "24", "--threshold", "0.999"]


def run() -> int:
    console = Console(highlight=False)
    for seed, steps in ((1, 3), (2, 4), (3, 6)):
        (problem,) = heldout(1, seed=seed, steps=steps)
        console.rule(style="dim")
        console.print(problem.prompt, style="bold")
        status = main(["generate", problem.prompt, "--live", "--frame-seconds", "0.25", *SETTINGS])
        if status:
            return status
        console.print(f"expected: {problem.response}", style="dim")
    return 0


if __name__ == "__main__":
    sys.exit(run())
