"""Files of results: whether a file can be written, and JSON that is never half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def check_writable(name: str, path: Path | None) -> None:
    """Raise ValueError unless a file can be written, by opening it; its content stays.

    `name` is the argument that named the file. A path of None stands for no file.
    """
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{name} {path}: no such folder as {folder}")
    if path.is_dir():
        raise ValueError(f"{name} {path}: a folder; expected a file")
    existed = path.exists()
    if existed and not path.is_file():  # the reader of a pipe would see an end
        return
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(
            f"{name} {path}: {error.strerror}; expected a file that can be written"
        ) from error
    if not existed:
        path.unlink()


def write_json(path: Path, record: Any) -> None:
    """Write a JSON file whole or not at all: after an interrupt it has its old content.

    A rename would replace a pipe or a link, and cannot be done in a folder that takes no other
    file. These are written in place.
    """
    text = json.dumps(record, indent=1) + "\n"
    special = path.is_symlink() or (path.exists() and not path.is_file())
    if special or not os.access(path.absolute().parent, os.W_OK):
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_json(path: Path, name: str = "--from") -> Any:
    """The JSON in a file that the argument `name` named; ValueError where there is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{name} {path}: {error.strerror}; expected a file") from error
    except ValueError as error:  # JSON's and UTF-8's
        raise ValueError(f"{name} {path}: expected a JSON file ({error})") from error
