"""Files of results: whole or as they were."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsb_runtime.files import write_json


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
