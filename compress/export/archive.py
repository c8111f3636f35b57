"""Rewriting the zip archives that torch writes uncompressed."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from compress.files import replacing

__all__ = ["repack"]


def repack(path: Path, change: Callable[[str, bytes], bytes] | None = None) -> None:
    """Compress an archive's entries in place; torch's readers take them as well.

    Args:
        path: A ``.pt2`` file.
        change: Maps an entry's name and content to its new content.
    """
    with (
        replacing(path) as slim,
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            content = source.read(entry)
            target.writestr(entry.filename, content if change is None else change(entry.filename, content))
