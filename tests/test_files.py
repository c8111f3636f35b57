from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from compress.files import replacing, write_json


def test_a_file_appears_whole_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    write_json(path, {"a": 1})
    with replacing(path) as temporary:
        temporary.write_text("{}")
        assert json.loads(path.read_text()) == {"a": 1}
    assert path.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [path]


def interrupted(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_where_there_is_no_folder_the_error_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "x", tmp_path / "file" / "x"):
        with pytest.raises(OSError, match=str(path.parent)):
            write_json(path, 1)


def test_two_at_once_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # which ends last
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_has_left_goes_an_hour_later(tmp_path: Path) -> None:
    path = tmp_path / "figures[1].json"
    left, young, other = (
        tmp_path / name for name in (".figures[1].json.1-a.tmp", ".figures[1].json.2-b.tmp", ".figures1.json.3-c.tmp")
    )
    for file in (left, young, other):
        file.touch()
    for file in (left, other):
        os.utime(file, (0, 0))
    write_json(path, {})
    assert sorted(tmp_path.iterdir()) == sorted([path, young, other])
