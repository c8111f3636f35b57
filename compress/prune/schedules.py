"""How much is removed when: pure functions from the fraction of edits done to the fraction of the ratio reached."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence

from compress.errors import RecipeError

__all__ = ["SCHEDULES", "Timetable", "cosine", "cubic", "last_point", "linear", "one_shot", "timetable"]

Timetable = list[tuple[float, float]]
"""For each edit the progress of the fit at which it is due, and the fraction of the final ratio reached with it."""


def cubic(done: float) -> float:
    r"""Remove much early and little late: automated gradual pruning, AGP.

    .. math:: s(u) = 1 - (1 - u)^3          Zhu and Gupta 2017, arXiv:1710.01878, equation 1

    Args:
        done: Fraction of the pruning phase done, in [0, 1].

    Returns:
        Fraction of the final ratio, in [0, 1].

    Example:
        >>> cubic(0.0), cubic(0.5), cubic(1.0)
        (0.0, 0.875, 1.0)
    """
    return 1 - (1 - done) ** 3


def linear(done: float) -> float:
    """Remove the same amount with each edit.

    Example:
        >>> linear(0.25)
        0.25
    """
    return done


def cosine(done: float) -> float:
    r"""Remove little at first, most in the middle, little at last.

    .. math:: s(u) = (1 - \cos \pi u) / 2

    Example:
        >>> cosine(0.0), round(cosine(0.5), 6), cosine(1.0)
        (0.0, 0.5, 1.0)
    """
    return (1 - math.cos(math.pi * done)) / 2


def one_shot(done: float) -> float:
    """Remove everything with the first edit.

    Example:
        >>> one_shot(0.0), one_shot(0.1)
        (0.0, 1.0)
    """
    return float(done > 0)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cubic": cubic,
    "linear": linear,
    "cosine": cosine,
    "one_shot": one_shot,
}


def timetable(
    schedule: str | Sequence[Sequence[float]],
    *,
    start: float,
    end: float,
    num_edits: int | str,
    steps: float = math.inf,
    epochs: float = math.inf,
    where: str = "prune",
) -> Timetable:
    """Return when edits are due and how much is gone after each.

    Args:
        schedule: A name of ``SCHEDULES``, or points ``[progress, fraction]`` that say it all.
        start: Progress of the fit at the first edit.
        end: Progress at the last edit.
        num_edits: How many, or how often: ``"200 steps"``, ``"2 epochs"``.
        steps: Optimiser steps of the fit.
        epochs: Epochs of the fit.
        where: The section of the recipe that errors name.

    Raises:
        RecipeError: when a value is out of range.

    Example:
        >>> timetable("linear", start=0.2, end=0.6, num_edits=3)
        [(0.2, 0.333...), (0.4, 0.666...), (0.6, 1.0)]
        >>> timetable("linear", start=0.0, end=0.5, num_edits="2 epochs", epochs=8)
        [(0.0, 0.333...), (0.25, 0.666...), (0.5, 1.0)]
        >>> timetable([[0.1, 0.5], [0.3, 1.0]], start=0.0, end=0.9, num_edits=1)
        [(0.1, 0.5), (0.3, 1.0)]
    """
    if not isinstance(schedule, str):
        return _points(schedule, where)
    if schedule not in SCHEDULES:
        raise RecipeError(
            f"{where}.schedule: expected one of {', '.join(SCHEDULES)}, or points, got {schedule!r}. Choose one."
        )
    if not 0 <= start <= end < 1:
        raise RecipeError(
            f"{where}.start, {where}.end: expected 0 <= start <= end < 1, got {start} and {end}. "
            "Leave time after the end for recovery."
        )
    if schedule == "one_shot":
        return [(start, 1.0)]
    number, gap = _spacing(num_edits, start, end, steps, epochs, where)
    return [(start + index * gap, SCHEDULES[schedule]((index + 1) / number)) for index in range(number)]


def last_point(schedule: str | Sequence[Sequence[float]], end: float) -> float:
    """Return the progress of the fit after which nothing is edited any more.

    Example:
        >>> last_point("cubic", 0.6), last_point([[0.1, 0.5], [0.3, 1.0]], 0.6)
        (0.6, 0.3)
    """
    return end if isinstance(schedule, str) else float(schedule[-1][0])


def _points(points: Sequence[Sequence[float]], where: str) -> Timetable:
    pairs = [(float(point[0]), float(point[1])) for point in points if len(point) == 2]
    rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(pairs))
    inside = all(0 <= when < 1 and 0 < much <= 1 for when, much in pairs)
    if not pairs or len(pairs) < len(points) or not rising or not inside or pairs[-1][1] != 1:
        raise RecipeError(
            f"{where}.schedule: expected rising points [progress in [0, 1), fraction in (0, 1]] that end with "
            f"fraction 1, got {[list(point) for point in points]}. Use [[0.2, 0.5], [0.4, 1.0]], say."
        )
    return pairs


def _spacing(
    num_edits: int | str, start: float, end: float, steps: float, epochs: float, where: str
) -> tuple[int, float]:
    """Return the number of edits and the progress between two of them."""
    if isinstance(num_edits, str) and not num_edits.isdigit():
        match = re.fullmatch(r"(\d+) (step|epoch)s?", num_edits.strip())
        if match is None or int(match[1]) < 1:
            raise RecipeError(
                f"{where}.num_edits: expected a number, or '200 steps', or '2 epochs', got {num_edits!r}. Use 5, say."
            )
        total = steps if match[2] == "step" else epochs
        if not total > 0:
            raise RecipeError(
                f"{where}.num_edits: expected a fit of known length for {num_edits!r}, got one without. Use a number."
            )
        gap = int(match[1]) / total
        return (math.floor((end - start) / gap + 1e-9) + 1 if gap > 0 else 1), gap
    number = int(num_edits)
    if number < 1:
        raise RecipeError(f"{where}.num_edits: expected at least 1, got {num_edits}. Use 1 or more.")
    return number, (end - start) / max(1, number - 1)
