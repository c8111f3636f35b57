"""What the engines of an artefact were measured at on this machine, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import IO, Any

from compress.files import write_json
from compress.measure.machine import describe_machine, gpus, user_cache
from compress.runtime.dispatch import BUCKETS, Times

__all__ = ["Memory"]

_NAP = 0.05  # seconds
_PATIENCE = 1200  # naps: a minute, after which whoever measures is stopped, or hangs
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # which the libraries read when they start


class Memory:
    """Remembers how fast engines are; what is measured for other threads, versions or processors is apart.

    Args:
        what: Tells the artefact from others.
        usable: Names of the engines that may be remembered.
        num_threads: As asked for; without, torch's engines have what the process has set by then.
    """

    def __init__(self, what: Sequence[Any], usable: Sequence[str], num_threads: int | None) -> None:
        threads = num_threads or [os.environ.get(name) for name in _THREADS]
        self._what = [*what, threads, describe_machine(), gpus(), BUCKETS]
        self._usable = frozenset(usable)
        self._asked = num_threads
        self._file = self._file_now()

    def read(self) -> tuple[Times, list[str]]:
        """Return what was measured, and the engines that did not run then; nothing where that cannot be read."""
        if self._file is None:
            return {}, []
        try:
            content = json.loads(self._file.read_bytes())
            times = {int(size): {str(k): float(v) for k, v in row.items()} for size, row in content.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return {}, []
        names = set(times.get(1, {}))
        alike = all(set(row) == names for row in times.values()) and min(times, default=0) == 1
        positive = all(value > 0 for row in times.values() for value in row.values())
        failed = [name for name in names if any(row.get(name) == inf for row in times.values())]
        if not (alike and positive and len(names) > max(1, len(failed)) and names <= self._usable):
            return {}, []
        return {size: {n: ms for n, ms in row.items() if n not in failed} for size, row in times.items()}, failed

    def write(self, times: Times) -> None:
        """Keep what was measured, where there is a folder and it can be written."""
        try:
            for file in filter(None, {self._file, self._file_now()}):  # measuring has imported torch, maybe
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, times)
        except OSError:
            pass  # a read-only home: measured again next time

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process measures the same, where the system can tell: two at once disturb each other."""
        handle = self._locked()
        try:
            yield
        finally:
            if handle is not None:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_UN)  # closing would not do while a child of this process has it, too
                handle.close()

    def _locked(self) -> IO[str] | None:
        if self._file is None:
            return None
        try:
            import fcntl

            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle = self._file.with_suffix(".lock").open("w")
        except (ImportError, OSError):
            return None
        for _ in range(_PATIENCE):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return handle
            except BlockingIOError:
                time.sleep(_NAP)
            except OSError:  # a file system without locks
                break
        handle.close()
        return None

    def _file_now(self) -> Path | None:
        folder = user_cache()
        if folder is None:
            return None
        torch = sys.modules.get("torch")
        threads = torch.get_num_threads() if torch and not self._asked else None
        key = hashlib.sha256(json.dumps([*self._what, threads], sort_keys=True).encode()).hexdigest()[:32]
        return folder / "engines" / f"{key}.json"
