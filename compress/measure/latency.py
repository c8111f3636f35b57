"""Latency as ratios that can be trusted: all candidates in one interleaved run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.errors import RecipeError

__all__ = ["Latency", "measure_latency", "progress_bar", "time_calls"]


@dataclass(frozen=True)
class Latency:
    """Latency of one call.

    Args:
        p50_ms: Median, in milliseconds.
        p95_ms: 95th percentile, in milliseconds.
        num_runs: How many calls were counted.
    """

    p50_ms: float
    p95_ms: float
    num_runs: int


def measure_latency(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    warmup: int = 5,
    block_seconds: float = 0.05,
    pause_seconds: float = 0.01,
    min_runs: int = 20,
    progress: bool = False,
    advance: Callable[[float], object] | None = None,
) -> dict[str, Latency]:
    """Time several calls in turn, so that a drift of the machine's speed meets all of them alike.

    Each round runs every call for a while in a row, after a pause in which the threads of the engine before it stop
    spinning; the first run of a block is not counted, since it pays for cold caches.

    Args:
        calls: What to time, by name.
        seconds: Time for each call.
        warmup: Runs of each call before timing starts.
        block_seconds: Time of a call's block in each round.
        pause_seconds: Pause before each block.
        min_runs: Least number of counted runs, however long they take.
        progress: Whether to show a progress bar.
        advance: Called after each round with how far it is, a fraction.

    Returns:
        Latency by name.

    Raises:
        RecipeError: when ``seconds`` is not positive.

    Example:
        >>> measured = measure_latency({"nothing": lambda: None}, seconds=0.01)
        >>> measured["nothing"].num_runs >= 20
        True
    """
    times = time_calls(
        calls,
        seconds=seconds,
        warmup=warmup,
        block_seconds=block_seconds,
        pause_seconds=pause_seconds,
        min_runs=min_runs,
        progress=progress,
        advance=advance,
    )
    return {name: _summary(values) for name, values in times.items()}


def time_calls(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    warmup: int = 5,
    block_seconds: float = 0.05,
    pause_seconds: float = 0.01,
    min_runs: int = 20,
    progress: bool = False,
    advance: Callable[[float], object] | None = None,
) -> dict[str, list[float]]:
    """Return the times, in seconds, of which ``measure_latency`` gives a summary; the arguments are the same."""
    if not seconds > 0:
        raise RecipeError(f"seconds: expected a positive number, got {seconds}. Use 1.0 for a second of each call.")
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    with progress_bar(progress, "measuring latency") as show:
        pending = list(calls)
        while pending:
            for name in pending:
                time.sleep(pause_seconds)
                durations = _block(calls[name], block_seconds)
                spent[name] += sum(durations)
                times[name] += durations[1:]
            pending = [name for name in calls if spent[name] < seconds or len(times[name]) < min_runs]
            fraction = sum(min(1.0, value / seconds) for value in spent.values()) / len(spent)
            for tell in (show, advance) if advance else (show,):
                tell(fraction)
    return times


def progress_bar(show: bool, text: str) -> Any:
    """Return a context with a function that sets how far it is, a fraction; the bar is drawn on the error stream.

    Args:
        show: Whether there is a bar; without, rich is not imported.
        text: What is being done.
    """
    if not show:
        return nullcontext(lambda fraction: None)
    from rich.console import Console
    from rich.progress import Progress

    class _Bar(Progress):
        def __enter__(self) -> Any:
            super().__enter__()
            task = self.add_task(text, total=1.0)
            return lambda fraction: self.update(task, completed=fraction, refresh=True)

    # Drawn between rounds only: a thread that redraws would take its share of what is measured.
    return _Bar(console=Console(stderr=True), transient=True, auto_refresh=False)


def _block(call: Callable[[], object], seconds: float) -> list[float]:
    durations: list[float] = []
    spent = 0.0
    while spent < seconds or len(durations) < 3:
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
        spent += durations[-1]
    return durations


def _summary(times: list[float]) -> Latency:
    p50, p95 = np.percentile(np.array(times) * 1e3, [50, 95])
    return Latency(float(p50), float(p95), len(times))
