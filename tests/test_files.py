"""Files of results: whole or as they were."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsb_runtime.files import check_writable, sole_writer, write_json


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "kept.json"
    write_json(path, {"rounds": 1})
    assert json.loads(path.read_text()) == {"rounds": 1}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"rounds": object()})

    def interrupted(part: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"rounds": 2})
    assert json.loads(path.read_text()) == {"rounds": 1}


def test_links_and_folders_that_take_no_other_file(tmp_path, monkeypatch):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    link.symlink_to(target)
    write_json(link, [1])
    assert link.is_symlink() and json.loads(target.read_text()) == [1]
    monkeypatch.setattr(os, "access", lambda folder, mode: False)  # root may write everywhere
    monkeypatch.setattr(Path, "replace", None)
    write_json(target, [3])
    assert json.loads(target.read_text()) == [3]


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        write_json(pipe, [2])
        assert json.loads(read.result(10)) == [2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe"]


def test_a_file_has_one_writer_at_a_time(tmp_path):
    path = tmp_path / "scores.json"

    def other() -> None:
        with pytest.raises(ValueError) as refused, sole_writer("--json", path):
            pass
        assert str(refused.value) == (
            f"--json {path}: another process writes it; expected one at a time"
        )

    with sole_writer("--json", path) as write:
        other()
        for number in range(3):  # each takes the place of the file before
            write([number])
            other()
    with sole_writer("--json", path) as write:
        assert json.loads(path.read_text()) == [2]
    assert json.loads(path.read_text()) == [2] and os.listdir(tmp_path) == ["scores.json"]
    with sole_writer("--json", None) as write:
        write([3])


def test_a_writer_that_came_while_the_file_was_replaced(tmp_path, monkeypatch):
    """It has opened the old file, whose lock ends with its replacement."""
    path = tmp_path / "scores.json"
    with sole_writer("--json", path) as write:
        flock, waiting = fcntl.flock, [write]

        def replaced_before(file: object, how: int) -> None:
            if waiting:
                waiting.pop()([1])
            flock(file, how)

        monkeypatch.setattr(fcntl, "flock", replaced_before)
        with pytest.raises(ValueError, match="another process"), sole_writer("--json", path):
            pass
    assert not waiting


def test_a_writer_that_writes_nothing_leaves_nothing(tmp_path):
    new, link, empty = tmp_path / "new.json", tmp_path / "link.json", tmp_path / "empty.json"
    link.symlink_to(new)
    empty.touch()
    for path in (new, link, empty):
        check_writable("--json", path)
        with pytest.raises(KeyboardInterrupt), sole_writer("--json", path):
            raise KeyboardInterrupt
    assert not new.exists() and link.is_symlink() and empty.exists()
    with sole_writer("--json", link) as write:
        write([4])
        with pytest.raises(ValueError, match="another process"), sole_writer("--json", new):
            pass
    assert link.is_symlink() and json.loads(new.read_text()) == [4]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with sole_writer("--json", tmp_path / "scores.json") as write:
        write([5])
    assert json.loads((tmp_path / "scores.json").read_text()) == [5]
