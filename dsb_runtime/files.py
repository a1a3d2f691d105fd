"""Files of results: whether one can be written, and JSON written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def check_writable(name: str, path: Path | None) -> None:
    """Raise unless the file can be written, by trying; what it holds stays.

    Args:
        name: the argument that named the file.
        path: the file; None means that none was asked for.

    Raises:
        ValueError: the message names the argument, the file and the reason.
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
    """Write a JSON file whole or not at all, so that an interrupt leaves what it held.

    A pipe, a link, and a file in a folder that takes no other file are written in place, because
    a rename would replace them.
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
    """The JSON in a file that the argument `name` named.

    Raises:
        ValueError: no such file, or no JSON in it.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{name} {path}: {error.strerror}; expected a file") from error
    except ValueError as error:  # JSON's and UTF-8's
        raise ValueError(f"{name} {path}: expected a JSON file ({error})") from error
