"""Python in a process of its own, and the `dsb` command in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
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


def write_lines(path: Path, lines: list[Any]) -> Path:
    """Lines of JSON; a text is a line as it stands."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def answers(path: Path) -> dict[int, dict[str, Any]]:
    """The answers by their lines, each of which has one."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_line = {line["line"]: line for line in lines}
    assert len(by_line) == len(lines)
    return by_line


def start(words: list[str], module: str = "dsb_runtime", **env: str) -> subprocess.Popen[str]:
    """Start `python -m MODULE words`, with the variables `env`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
           **env}  # fmt: skip
    env.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, "-m", module, *words], env=env, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def kill_after(process: subprocess.Popen[str], out: Path, number: int, answers: int) -> str:
    """Send a signal once there are so many answers. Returns what the process said."""
    before = time.monotonic()
    while process.poll() is None and time.monotonic() - before < 300:
        if out.exists() and out.read_bytes().count(b"\n") >= answers:
            process.send_signal(number)
            break
        time.sleep(0.005)
    return process.communicate(timeout=60)[1]
