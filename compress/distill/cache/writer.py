"""Write a teacher's outputs, chunk by chunk; what is written stays when the process dies."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from compress.distill.cache.fields import Field, record_dtype
from compress.distill.cache.files import (
    JOURNAL,
    MANIFEST,
    RECORDS,
    VERSION,
    Chunk,
    chunks,
    differences,
    digest,
    read_chunk,
)
from compress.errors import DataError
from compress.files import write_json, write_text

__all__ = ["CacheWriter"]


class CacheWriter:
    """Writes a cache, going on where an earlier process stopped.

    Only one process writes at a time: a second one waits here until the first has finished, and then finds nothing
    missing.

    Args:
        path: The cache's folder.
        key: What made the outputs: names to descriptions.
        fields: What is stored for each sample, by name.
        num_samples: Training samples.
        num_views: Augmented views of each.
        chunk: Samples that are written and checked as one.

    Raises:
        DataError: when the folder holds outputs with another key, finished or not.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> writer = CacheWriter(folder, key={"teacher": "a"}, fields={"outputs": Field((2,))}, num_samples=3)
        >>> for view, start, stop in writer.missing():
        ...     writer.write(view, start, {"outputs": torch.zeros(stop - start, 2)})
        >>> writer.finish()
        >>> (folder / "manifest.json").exists()
        True
    """

    def __init__(
        self,
        path: str | Path,
        *,
        key: Mapping[str, Any],
        fields: Mapping[str, Field],
        num_samples: int,
        num_views: int = 1,
        chunk: int = 1024,
    ) -> None:
        self.path = Path(path)
        self.fields = dict(fields)
        self.num_samples = num_samples
        self.num_views = num_views
        self.chunk = chunk
        self._dtype = record_dtype(fields)
        self._header: dict[str, Any] = {
            "version": VERSION,
            "key": dict(key),
            "fields": {name: field.to_json() for name, field in fields.items()},
            "num_samples": num_samples,
            "num_views": num_views,
            "chunk": chunk,
        }
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path / "lock")
        self._digests: dict[Chunk, str] = {}
        self._finished = (self.path / MANIFEST).exists()
        if self._finished:
            self._compare(json.loads((self.path / MANIFEST).read_text()))
        else:
            self._begin()

    def missing(self) -> list[Chunk]:
        """Return the chunks ``(view, start, stop)`` that are not yet written."""
        if self._finished:
            return []
        return [part for part in chunks(self.num_samples, self.num_views, self.chunk) if part not in self._digests]

    def write(self, view: int, start: int, values: Mapping[str, Tensor]) -> None:
        """Write one missing chunk.

        Args:
            view: Its view.
            start: Its first sample.
            values: For each field, shape (stop - start, ...).

        Raises:
            DataError: when values are missing, of another shape, or not finite.
        """
        part = next((part for part in self.missing() if part[:2] == (view, start)), None)
        if part is None:
            raise DataError(f"cache: expected a chunk that is missing, got view {view} from {start}. Ask missing().")
        rows = np.zeros(part[2] - start, dtype=self._dtype)
        for number, (name, field) in enumerate(self.fields.items()):
            shape = (len(rows), *field.shape)
            if name not in values or tuple(values[name].shape) != shape:
                got = tuple(values[name].shape) if name in values else "none"
                raise DataError(f"cache: expected {name} of shape {shape}, got {got}. Give one row a sample.")
            field.pack(values[name].detach().cpu(), rows[str(number)])
        content = rows.tobytes()
        with (self.path / RECORDS).open("r+b") as file:
            file.seek((view * self.num_samples + start) * self._dtype.itemsize)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # Only now: a journal never speaks of what is not on disk.
        with (self.path / JOURNAL).open("a") as journal:
            journal.write(json.dumps([*part, digest(content)]) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self._digests[part] = digest(content)

    def finish(self) -> None:
        """Write the manifest and let other processes in.

        Raises:
            DataError: when chunks are missing.
        """
        if not self._finished:
            if self.missing():
                raise DataError(f"cache: expected all chunks, got {len(self.missing())} missing. Write them first.")
            found = [self._digests[part] for part in chunks(self.num_samples, self.num_views, self.chunk)]
            write_json(self.path / MANIFEST, {**self._header, "sha256": found})
            (self.path / JOURNAL).unlink()
            self._finished = True
        self.close()

    def close(self) -> None:
        """Let other processes write."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _begin(self) -> None:
        journal, records = self.path / JOURNAL, self.path / RECORDS
        size = self._dtype.itemsize * self.num_samples * self.num_views
        if not (journal.exists() and records.exists() and journal.read_text().strip()):
            journal.write_text(json.dumps(self._header) + "\n")
            with records.open("wb") as file:
                file.truncate(size)
            return
        lines = journal.read_text().splitlines()
        self._compare(json.loads(lines[0]))
        if records.stat().st_size != size:
            os.truncate(records, size)
        for line in lines[1:]:
            try:
                view, start, stop, expected = json.loads(line)
            except ValueError:
                break  # the process died while it wrote this line
            content = read_chunk(records, (view, start, stop), self.num_samples, self._dtype.itemsize)
            if digest(content) == expected:
                self._digests[view, start, stop] = expected
        kept = [json.dumps(self._header), *(json.dumps([*part, value]) for part, value in self._digests.items())]
        write_text(journal, "\n".join(kept) + "\n")

    def _compare(self, header: Mapping[str, Any]) -> None:
        names = ("version", "fields", "num_samples", "num_views")
        found = differences(self._header["key"], header["key"]) + differences(
            {name: self._header[name] for name in names}, {name: header.get(name) for name in names}
        )
        if found or header["chunk"] != self.chunk:
            self.close()
            reasons = "; ".join(found) or f"chunk: expected {self.chunk}, got {header['chunk']}"
            raise DataError(
                f"{self.path}: expected outputs of this teacher on these data, got others: {reasons}. "
                "Remove the folder, or name another."
            )


def _lock(path: Path) -> IO[str] | None:
    try:
        import fcntl
    except ImportError:  # Windows has no such lock; there, do not write one cache from two processes
        return None
    file = path.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file
