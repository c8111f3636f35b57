"""Names and checks of a cache's files: one of fixed-size records, a journal while it is written, a manifest after."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "JOURNAL",
    "MANIFEST",
    "RECORDS",
    "VERSION",
    "Chunk",
    "chunks",
    "differences",
    "digest",
    "read_chunk",
]

VERSION = 1
RECORDS, JOURNAL, MANIFEST = "records.bin", "journal.jsonl", "manifest.json"

Chunk = tuple[int, int, int]
"""View, first sample, and the sample behind the last one."""


def chunks(num_samples: int, num_views: int, size: int) -> Iterator[Chunk]:
    """Yield the parts that are written and checked as one.

    Example:
        >>> list(chunks(5, 2, 3))
        [(0, 0, 3), (0, 3, 5), (1, 0, 3), (1, 3, 5)]
    """
    for view in range(num_views):
        for start in range(0, num_samples, size):
            yield view, start, min(start + size, num_samples)


def read_chunk(path: Path, chunk: Chunk, num_samples: int, record_bytes: int) -> bytes:
    """Return a chunk's bytes; fewer than expected where the file ends before."""
    view, start, stop = chunk
    with path.open("rb") as file:
        file.seek((view * num_samples + start) * record_bytes)
        return file.read((stop - start) * record_bytes)


def digest(content: bytes) -> str:
    """Return a checksum in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """Say which parts of a key differ.

    Example:
        >>> differences({"teacher": "a", "data": "x"}, {"teacher": "b", "data": "x"})
        ["teacher: expected 'a', got 'b'"]
    """
    names = [*expected, *(name for name in got if name not in expected)]
    return [
        f"{name}: expected {expected.get(name)!r}, got {got.get(name)!r}"
        for name in names
        if expected.get(name) != got.get(name)
    ]
