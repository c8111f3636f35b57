"""The time of each layer at a few widths, measured, and at others between them."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.errors import LiveError
from rich.progress import Progress

from compress.measure.latency import time_calls
from compress.prune.allocation.latency.layers import LAYER_CALLS, Layer
from compress.prune.allocation.latency.multiples import step_width
from compress.prune.allocation.latency.store import Store, typical_ms
from compress.prune.allocation.sizes import Extent
from compress.prune.allocation.work import Work, volume

__all__ = ["TimedWork", "measure_layers"]

log = logging.getLogger(__name__)

_FRACTIONS = (0.25, 0.5, 0.75, 1.0)
_CHUNK = 32
_LEAST = 1e-6  # milliseconds; nothing takes less, or a network of layers too fast to time would take none
NOTHING = Layer("nothing")


@dataclass(frozen=True)
class TimedWork:
    """A layer of the network and where its time is looked up.

    Args:
        work: The layer.
        layer: What it is as a network of its own, at the widths it has now.
        reads: Widths in rising order at which it is measured, of what it reads.
        makes: The same of what it makes.
        step: Channels by which the engine's time rises in steps.
    """

    work: Work
    layer: Layer
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    step: int = 1

    @classmethod
    def of(cls, work: Work, engine: str, *, samples: float) -> TimedWork:
        """Return the layer of some work.

        Args:
            work: As the graph has it, for the example inputs.
            engine: What times it.
            samples: Samples of a timed call for each sample of the example inputs.
        """
        read, made = (max(1, round(volume(each, {}))) for each in (work.read, work.made))
        step = step_width(engine) if work.kind == "conv" else 1
        layer = _layer(work, read, made, samples)
        # Groups go whole: with all of their outputs, of a transposed convolution with all of their inputs.
        of_group = (read if layer.settings.get("transposed") else made) // layer.groups if layer.groups > 1 else 1
        reads, makes = _points(work.read, read, step, of_group), _points(work.made, made, step, of_group)
        return cls(work, layer, reads, makes, step)

    def layers(self) -> Iterator[Layer]:
        """Yield the layer at each of the widths it is measured at."""
        for read, made in itertools.product(self.reads, self.makes):
            yield self._at(read, made)

    def time(self, removed: Mapping[str, int], milliseconds: Mapping[str, float]) -> float:
        """Return the time once some units of each group are gone.

        Between widths that were measured it is bilinear, in the engine's steps; with anything else that multiplies, as
        heads, it is proportional.

        Args:
            removed: Units gone of each group.
            milliseconds: Times of layers by key.
        """
        grid = np.array(
            [[milliseconds[self._at(read, made).key] for made in self.makes] for read in self.reads], dtype=float
        )
        grid = np.maximum(grid - milliseconds[NOTHING.key], 0.0)
        made, read = (self._in_steps(each, removed) for each in (self.work.made, self.work.read))
        each = _between(self.reads, np.array([_between(self.makes, row, made) for row in grid]), read)
        share = volume(self.work.times, removed) / max(1.0, volume(self.work.times, {}))
        return max(_LEAST, each) * share * self.layer.repeat

    def _in_steps(self, extents: Sequence[Extent], removed: Mapping[str, int]) -> float:
        return min(volume(extents, {}), math.ceil(volume(extents, removed) / self.step) * self.step)

    def _at(self, read: int, made: int) -> Layer:
        whole = self.layer
        now, width = (whole.read, read) if whole.settings.get("transposed") else (whole.made, made)
        return replace(whole, read=read, made=made, groups=whole.groups * width // now if whole.groups > 1 else 1)


def measure_layers(layers: Iterable[Layer], store: Store, engine: str, threads: int | None) -> None:
    """Measure the layers that a store does not hold yet, and save it after every few of them.

    Args:
        layers: The layers.
        store: Gets milliseconds, as ``typical_ms`` has them, by key.
        engine: A key of ``LAYER_CALLS``.
        threads: Threads of a call.
    """
    missing = {layer.key: layer for layer in (NOTHING, *layers) if layer.key not in store.layers}
    order = list(missing)
    # So that a machine that slows down does not slow down one layer's row.
    random.Random(0).shuffle(order)
    if order:
        log.info("prune: measuring %d layers on %s, kept in %s", len(order), engine, store.path or "no file")
    with _progress(len(order)) as advance, tempfile.TemporaryDirectory() as folder:
        for chunk in (order[first : first + _CHUNK] for first in range(0, len(order), _CHUNK)):
            calls = {key: LAYER_CALLS[engine](missing[key], Path(folder), threads) for key in chunk}
            measured = time_calls(calls, seconds=0.05, warmup=2, block_seconds=0.005, pause_seconds=0.002, min_runs=6)
            store.layers |= {key: typical_ms(times) for key, times in measured.items()}
            store.save()
            advance(len(chunk))


def _layer(work: Work, read: int, made: int, samples: float) -> Layer:
    times = [each.full for each in work.times]
    if work.kind == "conv":
        fixed = dict(work.fixed)
        groups = fixed.pop("groups")
        batch = max(1, round(times[0] * samples)) if len(times) > 2 * len(fixed["kernel"]) else 1
        return Layer("conv", read, made, batch=batch, groups=groups, fixed=json.dumps(fixed, sort_keys=True))
    if work.kind == "product":
        *others, rows = times or [1]
        return Layer("product", read, made, rows=rows, batch=max(1, round(np.prod(others) * samples)))
    repeat = work.fixed.get("repeat", 1)
    rows = max(1, round(np.prod(times) * samples / repeat))
    return Layer("linear", read, made, rows=rows, repeat=repeat)


def _points(extents: Sequence[Extent], now: int, step: int, of_group: int) -> tuple[int, ...]:
    """Return the widths at which a layer is measured: ends of the engine's steps, where it has some of them."""
    if not any(extent.parts for extent in extents):
        return (now,)
    multiple = max(step, 8)
    multiple = math.lcm(multiple, of_group) if now >= 2 * math.lcm(multiple, of_group) else of_group
    return tuple(sorted({now, *(max(1, round(now * part / multiple)) * multiple for part in _FRACTIONS[:-1])}))


def _between(points: Sequence[int], values: np.ndarray, at: float) -> float:
    """Return the value on the line through the two nearest points, also beyond them."""
    if len(points) == 1:
        return float(values[0])
    right = min(max(int(np.searchsorted(points, at)), 1), len(points) - 1)
    slope = (values[right] - values[right - 1]) / (points[right] - points[right - 1])
    return float(values[right] + slope * (at - points[right]))


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Show a bar that is drawn between measurements only."""
    bar = Progress(transient=True, auto_refresh=False, disable=total == 0)
    task = bar.add_task("measuring layers", total=total)
    try:
        bar.start()
    except LiveError:  # older versions of rich show one bar at a time, and a fit has one
        bar.disable = True
    try:
        yield lambda num: bar.update(task, advance=num, refresh=True)
    finally:
        bar.stop()
