"""Files: JSON that is read with one line for an error and is never half written, and files that
one process alone writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

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
        path.resolve().unlink()  # a link stays


def check_replaced(name: str, path: Path | None, is_ours: Callable[[Any], bool]) -> None:
    """Raise ValueError if the file that `path` names has something for which `is_ours` is False:
    what another command has written would be lost. `name` is the argument that named the file."""
    if path is None or not path.is_file() or path.stat().st_size == 0:
        return
    with contextlib.suppress(ValueError):
        if is_ours(read_json(path, name)):
            return
    raise ValueError(f"{name} {path}: it has something else; expected a new file")


def absolute_folder(name: str) -> str:
    """The absolute path of a folder; what names none, such as a hub id, as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def lock(file: IO[Any], name: str) -> None:
    """Keep other processes that ask out of an open file until it is closed. A file system without
    locks (some of a cluster's) keeps nobody out.

    Raises:
        ValueError: another process has the lock. `name` is what the message calls the file.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{name}: another process writes it; expected one at a time") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def lock_path(path: Path, name: str) -> IO[bytes]:
    """A file, open and locked as by `lock`. It is made where there is none."""
    while True:
        file = path.open("ab")
        try:
            lock(file, name)
            # While it was opened, another may have taken its place.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def write_json(path: Path, record: Any) -> None:
    """Write a JSON file whole or not at all: after an interrupt it has its old content.

    It writes another file and renames that. A rename would replace a pipe or a link, and needs a
    folder that accepts a new file. Pipes, links, and files in other folders are written in place,
    where an interrupt may leave half a file.
    """
    file = replace_json(path, record)
    if file is not None:
        file.close()


def replace_json(path: Path, record: Any) -> IO[bytes] | None:
    """What `write_json` does. Returns the new file, which was locked before it got its name, or
    None if the old one was written in place."""
    text = json.dumps(record, indent=1) + "\n"
    special = path.is_symlink() or (path.exists() and not path.is_file())
    if special or not os.access(path.absolute().parent, os.W_OK):
        path.write_text(text, encoding="utf-8")
        return None
    part = path.with_name(f"{path.name}.part")
    file = lock_path(part, str(part))
    try:
        file.truncate(0)  # one that was killed may have left it
        file.write(text.encode())
        file.flush()
        part.replace(path)
    except BaseException:
        file.close()
        raise
    return file


@contextlib.contextmanager
def sole_writer(name: str, path: Path | None) -> Iterator[Callable[[Any], None]]:
    """A function that writes a record as `write_json` does, or nowhere if the path is None. Until
    the end of the `with`, another process that asks for the same file is refused.

    The lock is on the file itself, so that none is left behind. Pipes and devices have no lock.

    Raises:
        ValueError: another process has the file. `name` is the argument that named it.
    """
    if path is None:
        yield lambda record: None
        return
    if path.exists() and not path.is_file():
        yield lambda record: write_json(path, record)
        return
    existed = path.exists()
    file = lock_path(path, f"{name} {path}")
    try:

        def write(record: Any) -> None:
            nonlocal file
            new = replace_json(path, record)
            if new is not None:
                file.close()
                file = new

        yield write
    finally:
        if not existed and path.exists() and path.stat().st_size == 0:  # nothing was written
            path.resolve().unlink()
        file.close()


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
