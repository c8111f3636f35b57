"""What the benchmarks of engines share: calls of networks by name, timed at a batch size in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from common import Row
from torch import Tensor, nn

from compress.measure.latency import measure_latency

__all__ = ["Call", "Make", "as_rows", "in_turn", "no_grad", "reason_of"]

Call = Callable[[Tensor], object]
Make = Callable[[int], Call]
"""From a batch size to what runs such a batch."""


def in_turn(
    x: Tensor, found: Mapping[str, Make], missing: Mapping[str, str], *, seconds: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Time what runs a batch.

    Args:
        x: The batch.
        found: What makes its calls, by name.
        missing: Names without any, and why.
        seconds: Time of each.

    Returns:
        Medians in milliseconds by name, and reasons by name, those that the batch brought up among them.
    """
    calls: dict[str, Callable[[], object]] = {}
    reasons = dict(missing)
    for key, make_call in found.items():
        try:
            call = make_call(len(x))
            call(x)
        except Exception as error:  # an engine that does not take this batch
            reasons[key] = reason_of(error)
            continue
        calls[key] = lambda call=call: call(x)
    measured = measure_latency(calls, seconds=seconds, min_runs=5, progress=True)
    return {key: latency.p50_ms for key, latency in measured.items()}, reasons


def as_rows(case: str, medians: Mapping[str, float], reasons: Mapping[str, str]) -> list[Row]:
    """Return a row for each median, and one without a value for each reason."""
    rows = [Row(f"{case}/{key}", "p50_ms", value, "ms") for key, value in medians.items()]
    return rows + [Row(f"{case}/{key}", "p50_ms", None, "ms", reason) for key, reason in reasons.items()]


def no_grad(network: nn.Module) -> Call:
    """Return a network's call without gradients."""

    def call(x: Tensor) -> object:
        with torch.no_grad():
            return network(x)

    return call


def reason_of(error: Exception) -> str:
    """Return an error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
