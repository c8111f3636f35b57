"""How much is removed when: pure functions from the fraction of edits done to the fraction of the ratio reached."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["SCHEDULES", "cubic", "linear", "num_kept", "one_shot"]


def cubic(done: float) -> float:
    r"""Remove much early and little late.

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


def one_shot(done: float) -> float:
    """Remove everything with the first edit.

    Example:
        >>> one_shot(0.0), one_shot(0.1)
        (0.0, 1.0)
    """
    return float(done > 0)


SCHEDULES: dict[str, Callable[[float], float]] = {"cubic": cubic, "linear": linear, "one_shot": one_shot}


def num_kept(width: int, *, ratio: float, round_to: int) -> int:
    """Return how many of a layer's channels stay.

    Args:
        width: Channels before any pruning.
        ratio: Fraction to remove, in [0, 1).
        round_to: The result is the nearest multiple of it, at least one multiple, and never more than ``width``.

    Example:
        >>> [num_kept(width, ratio=ratio, round_to=8) for width, ratio in [(64, 0.5), (64, 0.95), (6, 0.5)]]
        [32, 8, 6]
    """
    multiples = max(1, round(width * (1 - ratio) / round_to))
    return min(width, multiples * round_to)
