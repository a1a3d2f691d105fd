"""Benchmarks: each compares with a plain reference in the same run and checks before it times."""

from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib


def read_toml(name: str) -> dict[str, Any]:
    """A file of data beside this one."""
    return tomllib.loads((Path(__file__).parent / name).read_text("utf-8"))
