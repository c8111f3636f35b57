"""How the weight of a loss changes over training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from compress.errors import RecipeError

__all__ = ["Decay", "Warmup", "WeightSchedule", "Window"]


class WeightSchedule(ABC):
    """A factor on a loss's weight as a function of progress."""

    @abstractmethod
    def factor(self, progress: float) -> float:
        """Return the factor in [0, 1] at a progress in [0, 1]."""


class Warmup(WeightSchedule):
    """Rise linearly from nothing.

    Args:
        until: Progress at which the full weight is reached, in (0, 1].

    Raises:
        RecipeError: when a value is out of range.

    Example:
        >>> Warmup(until=0.2).factor(0.1), Warmup(until=0.2).factor(0.9)
        (0.5, 1.0)
    """

    def __init__(self, until: float = 0.1) -> None:
        _check("until", until, low=0.0)
        self.until = until

    def factor(self, progress: float) -> float:
        """Return the factor at a progress."""
        return min(1.0, progress / self.until)


class Decay(WeightSchedule):
    """Fall along half a cosine to a last value: a teacher that is strong at first hinders later.

    Source: early-stopped distillation, Cho and Hariharan 2019, arXiv:1910.01348.

    Args:
        start: Progress at which the fall begins, in [0, 1).
        end: Progress at which it ends, in (start, 1].
        final: Factor from there on, in [0, 1].

    Raises:
        RecipeError: when a value is out of range.

    Example:
        >>> schedule = Decay(start=0.5)
        >>> schedule.factor(0.2), round(schedule.factor(0.75), 6), schedule.factor(1.0)
        (1.0, 0.5, 0.0)
    """

    def __init__(self, start: float = 0.0, end: float = 1.0, final: float = 0.0) -> None:
        _check("start", start, high=end)
        _check("end", end)
        _check("final", final)
        self.start, self.end, self.final = start, end, final

    def factor(self, progress: float) -> float:
        """Return the factor at a progress."""
        fall = min(1.0, max(0.0, (progress - self.start) / (self.end - self.start)))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * fall))


class Window(WeightSchedule):
    """Work in a part of training only.

    Args:
        start: Progress at which the loss begins to count, in [0, 1).
        end: Progress from which on it no longer counts, in (start, 1].

    Raises:
        RecipeError: when a value is out of range.

    Example:
        >>> [Window(0.2, 0.5).factor(progress) for progress in (0.1, 0.2, 0.5)]
        [0.0, 1.0, 0.0]
    """

    def __init__(self, start: float = 0.0, end: float = 1.0) -> None:
        _check("start", start, high=end)
        _check("end", end)
        self.start, self.end = start, end

    def factor(self, progress: float) -> float:
        """Return the factor at a progress."""
        return float(self.start <= progress < self.end or (self.end == 1.0 and progress == 1.0))


def _check(name: str, value: float, *, low: float | None = None, high: float | None = None) -> None:
    inside = 0 <= value <= 1 and (low is None or value > low) and (high is None or value < high)
    if not inside:
        between = f"{'[' if low is None else '('}{low or 0:g}, {'1]' if high is None else f'{high})'}"
        raise RecipeError(f"schedule.{name}: expected a value in {between}, got {value}. It is a fraction of training.")
