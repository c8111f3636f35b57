"""Which engine serves which batch size: measured where it runs, chosen by a rule over the table of times."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import combinations, pairwise
from math import isqrt, prod

from compress.errors import CompressError, EngineError, MissingPackageError
from compress.measure.latency import measure_latency, progress_bar
from compress.runtime.engines import Engine
from compress.runtime.examples import example_call
from compress.runtime.manifest import Manifest

__all__ = ["BUCKETS", "Times", "able", "batch_sizes", "choose", "load_each", "measure", "picker"]

BUCKETS = (1, 4, 16, 32)
"""Batch sizes that are measured; a batch is served as the nearest of them, by ratio."""

Times = Mapping[int, Mapping[str, float]]
"""Median milliseconds of a call by batch size and engine."""

_NOISE = 1.03  # as fast, for all that a short run can tell
_BEATEN = 1.25  # this much behind at first sight, an engine is timed no longer
_LONG_MS = 150.0  # of batches beyond this, only those that are close so far are measured, with a few calls each
_LONGEST_MS = 600.0  # larger batches than this are not measured: it would take a minute, and the order has settled


def batch_sizes(largest: int | None) -> tuple[int, ...]:
    """Return the batch sizes that are measured when files take at most ``largest`` at once.

    Example:
        >>> batch_sizes(None), batch_sizes(8)
        ((1, 4, 16, 32), (1, 4, 8))
    """
    return tuple(sorted({min(size, largest or size) for size in BUCKETS}))


def measure(engines: Mapping[str, Engine], manifest: Manifest, *, seconds: float = 2.0) -> tuple[Times, dict[str, str]]:
    """Time engines against each other, interleaved, at a few batch sizes; a terminal shows how far it is.

    Args:
        engines: Loaded, by name.
        manifest: Of their artefact.
        seconds: Time for everything, where calls are short; each engine gets some calls however long they take.

    Returns:
        Times of all engines that run, at each size that was measured; where calls are long, an engine that was far
        behind at the size before is taken to be so still. And why the others do not run, by name; a size that none of
        them takes ends it.
    """
    sizes = batch_sizes(manifest.max_batch)
    times: dict[int, dict[str, float]] = {}
    reasons: dict[str, str] = {}
    show = sys.stderr.isatty() and find_spec("rich") is not None
    with progress_bar(show, f"measuring {', '.join(engines)} on this machine, once") as advance:
        for step, size in enumerate(sizes, 1):
            before = {name: ms for name, ms in times.get(sizes[step - 2], {}).items() if name not in reasons}
            expected = min(before.values(), default=0.0) * size / sizes[step - 2]
            if expected > _LONGEST_MS:
                break
            left = [name for name in engines if name not in reasons]
            names = _close(before) if expected > _LONG_MS else left
            calls, fails = able({name: engines[name] for name in names}, manifest, size)
            if not calls:  # those that were far behind may run
                calls, others = able({name: engines[name] for name in left if name not in names}, manifest, size)
                fails |= others
            if not calls:
                reasons |= {} if times else fails
                break
            reasons |= fails
            before = {name: ms for name, ms in before.items() if name not in fails}
            found = _few_calls(calls) if expected > _LONG_MS else _race(calls, seconds / len(sizes))
            growth = min(found.values()) / min(before.values(), default=1.0)
            times[size] = {name: growth * ms for name, ms in before.items()} | found
            advance(step / len(sizes))
    return {size: {name: ms for name, ms in row.items() if name not in reasons} for size, row in times.items()}, reasons


def load_each(names: Sequence[str], make: Callable[[str], Engine], reasons: dict[str, str]) -> dict[str, Engine]:
    """Load engines and return those that can be, by name.

    Args:
        names: Of the engines.
        make: Loads one.
        reasons: Where it is written down why the others cannot be loaded here, by name.

    Raises:
        CompressError: when it is not a matter of this machine: a damaged file, say.
    """
    loaded = {}
    for name in names:
        try:
            loaded[name] = make(name)
        except (EngineError, MissingPackageError) as error:
            reasons[name] = str(error)
        except CompressError:
            raise
        except Exception as error:  # a library that cannot load its file raises anything
            reasons[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    return loaded


def able(
    engines: Mapping[str, Engine], manifest: Manifest, batch: int
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Return calls of those engines that run a batch of a size, and why the others do not.

    Each has run once: memory that it needs for such a batch it has afterwards.

    Args:
        engines: Loaded, by name.
        manifest: Of their artefact.
        batch: Samples in a call.
    """
    calls: dict[str, Callable[[], object]] = {}
    fails: dict[str, str] = {}
    for name, engine in engines.items():
        try:
            call = example_call(engine, manifest, batch)
            call()
        except Exception as error:  # an engine's library raises anything
            fails[name] = f"a batch of {batch}: {type(error).__name__}: {str(error).strip()[:200]}"
        else:
            calls[name] = call
    return calls, fails


def choose(times: Times) -> dict[int, str]:
    """Choose engines for the measured batch sizes: as few as serve each of them within 3 % of its fastest.

    Args:
        times: Of the same engines at each batch size.

    Example:
        >>> choose({1: {"a": 1.0, "b": 1.01}, 16: {"a": 9.0, "b": 7.0}})
        {1: 'b', 16: 'b'}
        >>> choose({1: {"a": 1.0, "b": 1.2}, 16: {"a": 9.0, "b": 7.0}})
        {1: 'a', 16: 'b'}
    """
    behind = {size: {name: ms / min(row.values()) for name, ms in row.items()} for size, row in times.items()}
    names = list(next(iter(times.values())))

    def slowdowns(few: Sequence[str]) -> list[float]:
        return [min(row[name] for name in few) for row in behind.values()]

    for num in range(1, len(names) + 1):
        enough = [few for few in combinations(names, num) if max(slowdowns(few)) <= _NOISE]
        if enough:
            few = min(enough, key=lambda few: prod(slowdowns(few)))
            return {size: min(few, key=row.__getitem__) for size, row in behind.items()}
    raise AssertionError("all engines together hold the fastest of each size")


def picker(serves: Mapping[int, str]) -> Callable[[int], str]:
    """Return the function from a batch size to its engine: that of the nearest size by ratio, the smaller of two.

    Args:
        serves: Engines by batch size, as ``choose`` gives them.

    Example:
        >>> pick = picker({1: "a", 4: "b"})
        >>> pick(1), pick(2), pick(3), pick(1000)
        ('a', 'a', 'b', 'b')
    """
    sizes = sorted(serves)
    names = [serves[size] for size in sizes]
    # The nearest by ratio changes at the geometric mean.
    borders = [isqrt(low * high) for low, high in pairwise(sizes)]
    return lambda num: names[bisect_left(borders, num)]


def _race(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    first = measure_latency(calls, seconds=seconds / 4 / len(calls), warmup=0, block_seconds=0.01, min_runs=2)
    times = {name: latency.p50_ms for name, latency in first.items()}
    close = _close(times)
    if len(close) > 1:
        share = seconds * 3 / 4 / len(close)
        again = measure_latency(
            {name: calls[name] for name in close}, seconds=share, warmup=0, block_seconds=0.02, min_runs=4
        )
        times |= {name: latency.p50_ms for name, latency in again.items()}
    return times


def _few_calls(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    found = measure_latency(calls, seconds=0.01, warmup=0, block_seconds=0.01, min_runs=2)
    return {name: latency.p50_ms for name, latency in found.items()}


def _close(times: Mapping[str, float]) -> list[str]:
    return [name for name, ms in times.items() if ms <= _BEATEN * min(times.values())]
