from __future__ import annotations

import zipfile
from pathlib import Path

from compress.export.archive import repack


def test_entries_are_compressed_and_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("keep", "change", "empty"):
            archive.writestr(name, name * 1000)
    before = path.stat().st_size
    repack(path, lambda name, content: {"keep": content, "change": b"new", "empty": b""}[name])
    with zipfile.ZipFile(path) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            "keep": b"keep" * 1000,
            "change": b"new",
            "empty": b"",
        }
    assert path.stat().st_size < before / 10
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt2"]
