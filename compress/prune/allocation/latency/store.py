"""What has been measured on this machine, in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compress.files import write_json
from compress.measure.machine import describe_machine, user_cache

__all__ = ["Store", "typical_ms"]


def typical_ms(times: Sequence[float]) -> float:
    """Return what a call takes undisturbed: the tenth percentile, in milliseconds.

    On an idle machine it is the median. On a busy one, calls that last longer than a time slice are interrupted more
    often than not, and their median is that of the interruptions: with five times as many processes as cores, 105, 60
    and 27 million multiply-accumulates took 8.0, 1.6 and 0.5 ms at the median, and 2.0, 1.4 and 0.5 ms by this.

    Args:
        times: Of single calls, in seconds.

    Example:
        >>> typical_ms([0.001, 0.001, 0.004, 0.004, 0.004])
        1.0
    """
    return float(np.percentile(np.array(times) * 1e3, 10))


class Store:
    """Milliseconds by name, of single layers and of whole networks.

    Each machine, engine, number of threads and set of versions has a file of its own, in ``$COMPRESS_CACHE`` or
    ``~/.cache/compress``. It is written under a temporary name and renamed; what another process has written meanwhile
    stays. Where it cannot be written, everything is measured anew in each process.

    Args:
        engine: What is measured.
        threads: Threads of a call.

    Attributes:
        path: The file, or ``None`` for a user without a home.
        layers: Milliseconds by a layer's key.
        networks: Milliseconds by a hash of a network's graph and sizes.
    """

    def __init__(self, engine: str, threads: int | None) -> None:
        self._about = {"engine": engine, "threads": threads, "machine": describe_machine()}
        key = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode()).hexdigest()[:16]
        folder = user_cache()
        self.path = folder / "latency" / f"{engine}-{key}.json" if folder else None
        self.layers: dict[str, float] = {}
        self.networks: dict[str, float] = {}
        self._merge()

    def save(self) -> None:
        """Write what has been measured."""
        if self.path is None:
            return
        self._merge()
        content = {**self._about, "layers": self.layers, "networks": self.networks}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, content)
        except OSError:
            pass  # a read-only home

    def _merge(self) -> None:
        """Take in what the file holds and this process has not measured itself."""
        if self.path is None:
            return
        try:
            content: Any = json.loads(self.path.read_text())
        except (OSError, ValueError):  # none yet, or a damaged one
            return
        for name in ("layers", "networks"):
            found = content.get(name, {}) if isinstance(content, Mapping) else {}
            if isinstance(found, Mapping):
                times = {str(key): float(ms) for key, ms in found.items() if isinstance(ms, int | float) and ms > 0}
                setattr(self, name, {**times, **getattr(self, name)})
