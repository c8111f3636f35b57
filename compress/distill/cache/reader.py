"""Read a teacher's stored outputs from a memory-mapped file."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from torch import Tensor

from compress.distill.cache.fields import Field, record_dtype
from compress.distill.cache.files import (
    JOURNAL,
    MANIFEST,
    RECORDS,
    VERSION,
    chunks,
    differences,
    digest,
    read_chunk,
)
from compress.errors import DataError

__all__ = ["OutputCache"]

_RELEASE_AFTER = 32 * 2**20  # bytes of touched pages after which they are given back; the system keeps them cached


class OutputCache:
    """A teacher's outputs for each sample and view.

    Open one with ``OutputCache.open``. It can be copied to worker processes: each maps the file for itself.

    Args:
        path: The folder.
        manifest: What ``manifest.json`` holds.

    Attributes:
        fields: What is stored, by name.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.fields = {name: Field.from_json(content) for name, content in manifest["fields"].items()}
        self.num_samples: int = manifest["num_samples"]
        self.num_views: int = manifest["num_views"]
        self._dtype = record_dtype(self.fields)
        self._map: mmap.mmap | None = None
        self._touched = 0

    @staticmethod
    def open(path: str | Path, *, key: Mapping[str, Any], verify: bool = True, progress: bool = False) -> OutputCache:
        """Open a cache after checking that it is the right one and whole.

        Args:
            path: Its folder.
            key: What made the outputs that are wanted.
            verify: Whether every byte is checked against its checksum.
            progress: Whether a progress bar shows that check.

        Raises:
            DataError: when it is absent, unfinished, of another version, made by something else, truncated or altered;
                the message says which.

        Example:
            >>> OutputCache.open("nowhere", key={})
            Traceback (most recent call last):
            compress.errors.DataError: nowhere: expected a teacher's stored outputs, got none. Write them: compress ...
        """
        folder = Path(path)
        manifest = _manifest(folder)
        found = differences(dict(key), manifest["key"])
        if found:
            raise DataError(
                f"{folder}: expected outputs of this teacher on these data, got others: {'; '.join(found)}. "
                "Write them anew: remove the folder and run compress cache-teacher RECIPE."
            )
        cache = OutputCache(folder, manifest)
        _check_size(folder / RECORDS, cache._dtype.itemsize * cache.num_samples * cache.num_views)
        if verify:
            cache._verify(manifest, progress)
        return cache

    def read(self, index: Tensor, view: Tensor) -> dict[str, Tensor]:
        """Return what is stored for some samples.

        Args:
            index: Which samples, integers of shape (N,).
            view: Which view of each, integers of shape (N,).

        Returns:
            By name, float32 of shape (N, ...).

        Raises:
            DataError: when a sample or view is not stored.
        """
        samples, views = index.cpu().numpy(), view.cpu().numpy()
        for what, given, limit in (("sample", samples, self.num_samples), ("view", views, self.num_views)):
            if len(given) and not (given.min() >= 0 and given.max() < limit):
                raise DataError(
                    f"{self.path}: expected a {what} below {limit}, got {int(given.max())}. "
                    "The data have grown since the outputs were stored, or come from another loader."
                )
        rows = self._records()[views * self.num_samples + samples]
        self._release(len(rows))
        return {name: field.unpack(rows[str(number)]) for number, (name, field) in enumerate(self.fields.items())}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None, "_touched": 0}

    def _records(self) -> np.ndarray:
        if self._map is None:
            with (self.path / RECORDS).open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):
                self._map.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(self._map, dtype=self._dtype)

    def _release(self, num: int) -> None:
        # Otherwise a process seems to hold all of the file that it has ever read.
        self._touched += num * max(mmap.PAGESIZE, self._dtype.itemsize)
        if self._touched > _RELEASE_AFTER and self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0

    def _verify(self, manifest: Mapping[str, Any], progress: bool) -> None:
        parts = list(chunks(self.num_samples, self.num_views, manifest["chunk"]))
        pairs = list(zip(parts, manifest["sha256"]))
        for part, expected in track(pairs, "checking the teacher's outputs", disable=not progress, transient=True):
            content = read_chunk(self.path / RECORDS, part, self.num_samples, self._dtype.itemsize)
            if digest(content) != expected:
                view, start, stop = part
                raise DataError(
                    f"{self.path / RECORDS}: expected the bytes that were written, got others for samples {start} to "
                    f"{stop - 1} of view {view}. Remove the folder and run compress cache-teacher RECIPE."
                )


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        if (folder / JOURNAL).is_file():
            raise DataError(
                f"{folder}: expected a teacher's stored outputs, got an unfinished write. "
                "Go on with it: compress cache-teacher RECIPE."
            )
        raise DataError(
            f"{folder}: expected a teacher's stored outputs, got none. Write them: compress cache-teacher RECIPE."
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / MANIFEST}: expected a manifest, got {type(error).__name__}. "
            "Remove the folder and write it anew."
        ) from error
    if version != VERSION:
        raise DataError(
            f"{folder}: expected a cache of version {VERSION}, got {version}. Remove the folder and write it anew."
        )
    return manifest


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise DataError(
            f"{path}: expected {expected} bytes, got {size}: the file was truncated or replaced. "
            "Remove the folder and run compress cache-teacher RECIPE."
        )
