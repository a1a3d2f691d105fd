"""Files: JSON that is read with one line for an error and is never half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MOST_BYTES = 2**26  # of a JSON file that is read


def check_writable(name: str, path: Path | None) -> None:
    """Raise ValueError unless the file can be opened for writing. Its content stays.

    `name` is the argument that named the file. If the path is None, there is nothing to check.
    """
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{name} {path}: no such folder as {folder}")
    if path.is_dir():
        raise ValueError(f"{name} {path}: a folder; expected a file")
    existed = path.exists()
    if existed and not path.is_file():  # closing a pipe would end it for its reader
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

    It writes another file and renames that. A rename would replace a pipe or a link, and needs a
    folder that accepts a new file. Pipes, links, and files in other folders are written in place,
    where an interrupt may leave half a file.
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
    """Read the JSON of a file, which the argument `name` named ("" for none). Raise ValueError if
    the file cannot be read, is not JSON, or is larger than any file of figures or of a config."""
    where = f"{name} {path}".lstrip()
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)  # a device or a pipe may have no end
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}; expected a file") from error
    if len(text) > MOST_BYTES:
        raise ValueError(f"{where}: expected a JSON file of at most {MOST_BYTES} bytes")
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{where}: expected a JSON file of fewer levels") from error
    except ValueError as error:  # the errors of JSON, of UTF-8 and of long numbers are ValueErrors
        raise ValueError(f"{where}: expected a JSON file ({error})") from error
