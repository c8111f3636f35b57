"""How fast an artefact's engines are, at several batch sizes and numbers of threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

from compress.errors import ArtifactError
from compress.measure.latency import Latency, measure_latency, progress_bar
from compress.measure.machine import most_threads
from compress.runtime.dispatch import able
from compress.runtime.engines import Engine
from compress.runtime.manifest import Manifest

__all__ = ["measure_engines", "torch_threads_kept"]


def measure_engines(
    engines: Callable[[int | None, dict[str, str]], Mapping[str, Engine]],
    manifest: Manifest,
    *,
    batch_sizes: Sequence[int],
    threads: Sequence[int | None],
    seconds: float,
    progress: bool,
) -> list[dict[str, Any]]:
    """Measure engines, interleaved at each batch size, with one number of threads at a time.

    Args:
        engines: Loads all engines with a number of threads, the default one for ``None``: for some libraries it is the
            whole process's, so that two numbers cannot be measured in turn. Why one cannot be loaded with a number it
            writes into the mapping.
        manifest: Of their artefact.
        batch_sizes: Samples in a call.
        threads: Numbers of threads. An engine that has the same as before, whatever it is told, is measured once.
        seconds: Time for each engine, batch size and number of threads.
        progress: Whether to show a progress bar.

    Returns:
        Rows with ``batch, engine, threads, p50_ms, p95_ms, samples_per_second, reason``: the last but one is by the
        median, and the last says why an engine did not run such a batch, where it has no values.

    Raises:
        ArtifactError: when a batch size or a number of threads is not positive, a batch larger than the files take, or
            there are more threads than ``load`` takes.
    """
    _check("batch_sizes", batch_sizes, manifest.max_batch)
    _check("threads", [num for num in threads if num is not None], most_threads())
    rows: list[dict[str, Any]] = []
    num_steps = len(threads) * len(batch_sizes)
    with progress_bar(progress, "measuring latency") as show:
        for index, num in enumerate(threads):
            known = {(row["engine"], row["threads"]) for row in rows}
            absent: dict[str, str] = {}
            runs = {name: run for name, run in engines(num, absent).items() if (name, run.threads) not in known}
            for step, batch in enumerate(batch_sizes, index * len(batch_sizes)):

                def advance(fraction: float, step: int = step) -> None:
                    show((step + fraction) / num_steps)

                calls, reasons = able(runs, manifest, batch)
                measured = measure_latency(calls, seconds=seconds, advance=advance)
                rows += [
                    _row(batch, name, run.threads, measured.get(name), reasons.get(name)) for name, run in runs.items()
                ]
                rows += [_row(batch, name, num, None, f"with {num} threads: {why}") for name, why in absent.items()]
    return rows


def torch_threads_kept() -> AbstractContextManager[None]:
    """Return a context after which torch has as many threads as before, where it is installed."""
    if find_spec("torch") is None:
        return nullcontext()
    from compress.measure.threads import torch_threads

    return torch_threads(None)


def _row(batch: int, name: str, threads: int | None, latency: Latency | None, reason: str | None) -> dict[str, Any]:
    return {
        "batch": batch,
        "engine": name,
        "threads": threads,
        "p50_ms": latency and latency.p50_ms,
        "p95_ms": latency and latency.p95_ms,
        "samples_per_second": latency and 1e3 * batch / latency.p50_ms,
        "reason": reason,
    }


def _check(name: str, numbers: Sequence[int], largest: int | None) -> None:
    for number in numbers:
        if number < 1 or (largest is not None and number > largest):
            limit = "" if largest is None else f" and at most {largest}"
            raise ArtifactError(f"{name}: expected numbers of at least 1{limit}, got {number}. Leave it out.")
    if len(set(numbers)) < len(numbers):
        raise ArtifactError(f"{name}: expected different numbers, got {', '.join(map(str, numbers))}. Give each once.")
