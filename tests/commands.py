"""Python in a process of its own, and the `dsb` command in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsb_runtime.cli.main import main

ROOT = Path(__file__).parents[1]


def python(*argv: object, code: int = 0, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run `python *argv`, offline and without Triton's interpreter, which must exit with `code`.
    `how` is what subprocess takes; its `env` holds variables beside those that are set here."""
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    }  # fmt: skip
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *map(str, argv)], capture_output=True, text=True, check=False,
        **{"cwd": ROOT, "timeout": 600, **how, "env": {**env, **how.get("env", {})}},
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def refused(
    capsys: pytest.CaptureFixture[str], *argv: object, said: str, quiet: bool = True
) -> None:
    """`dsb *argv` says one line on standard error and exits with 2; where it is `quiet`, it has
    printed nothing on standard output."""
    try:
        code: Any = main([str(a) for a in argv])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and not (quiet and captured.out)
    assert captured.err.count("\n") == 1 and captured.err.startswith("dsb")
    assert said in captured.err
