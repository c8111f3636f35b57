"""Groups whose width is to be chosen, and the widths that may be chosen for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from compress.errors import RecipeError

__all__ = ["Candidate", "Grid"]


@dataclass(frozen=True)
class Candidate:
    """A group of units of which some may go.

    Args:
        name: The group, as in ``Anatomy.groups``.
        original: Its width before any pruning; ratios count from it.
        now: Its width now; it never grows beyond it.
        scores: What each unit matters, shape (now,).
        curve: Measured pairs (ratio removed of the original width, loss of the network), for ``sensitivity``.
    """

    name: str
    original: int
    now: int
    scores: Tensor
    curve: Sequence[Sequence[float]] | None = None


@dataclass(frozen=True)
class Grid:
    """Which widths a group may have: multiples, or what it has now.

    Args:
        round_to: Widths are multiples of it.
        min_width: No group is made narrower; one that is narrower already stays.

    Raises:
        RecipeError: when one is less than 1.

    Example:
        >>> import torch
        >>> Grid(8, min_width=10).nearest(3.0, Candidate("a", 64, 64, torch.ones(64)))
        16
    """

    round_to: int = 8
    min_width: int = 1

    def __post_init__(self) -> None:
        for name in ("round_to", "min_width"):
            if getattr(self, name) < 1:
                raise RecipeError(f"prune.{name}: expected at least 1, got {getattr(self, name)}. Use 1 or more.")

    def least(self, candidate: Candidate) -> int:
        """Return the smallest width of a group."""
        return min(candidate.now, max(1, math.ceil(self.min_width / self.round_to)) * self.round_to)

    def nearest(self, width: float, candidate: Candidate) -> int:
        """Return the width next to a wished one."""
        return min(candidate.now, max(self.least(candidate), round(width / self.round_to) * self.round_to))

    def wider(self, width: int, candidate: Candidate) -> list[int]:
        """Return the widths above one, in rising order, up to what the group has now."""
        above = range(width // self.round_to * self.round_to + self.round_to, candidate.now, self.round_to)
        return [*above, candidate.now] if width < candidate.now else []
