"""Where to write the labels of a scatter plot, so that none covers another or a point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Box", "place_labels"]

_DIRECTIONS = [math.radians(angle) for angle in (0, 180, 90, 270, 45, 135, 315, 225)]
_GAP = 5.0


class Box(NamedTuple):
    """A rectangle, in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Return the area of the intersection."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.right - self.left) * (self.top - self.bottom)


def place_labels(
    points: Sequence[tuple[float, float]],
    radii: Sequence[float],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
) -> list[Box]:
    """Find a place for each label: beside its point, or farther off where that is taken.

    Greedy, in the order given: of the places tried, nearest first, a label takes the first free one; where there is
    none, the one with the least overlap.

    Args:
        points: Centres of the points, in pixels.
        radii: Their radii.
        sizes: Width and height of each label.
        frame: Labels stay inside.

    Returns:
        The labels' boxes.

    Example:
        >>> place_labels([(50, 50)], [5], [(20, 10)], Box(0, 0, 100, 100))
        [Box(left=60.0, bottom=45.0, right=80.0, top=55.0)]
    """
    taken = [Box(x - radius, y - radius, x + radius, y + radius) for (x, y), radius in zip(points, radii)]
    labels = []
    for point, radius, size in zip(points, radii, sizes):
        best, least = None, math.inf
        for box in _candidates(point, radius, size, frame):
            overlap = sum(box.overlap(other) for other in taken) + box.area - box.overlap(frame)
            if overlap < least - 1e-6:
                best, least = box, overlap
            if least < 1e-6:
                break
        assert best is not None
        labels.append(best)
        # A little air around a label.
        taken.append(Box(best.left - 2, best.bottom - 2, best.right + 2, best.top + 2))
    return labels


def _candidates(point: tuple[float, float], radius: float, size: tuple[float, float], frame: Box) -> list[Box]:
    reach = max(frame.right - frame.left, frame.top - frame.bottom)
    boxes = []
    distance = radius + _GAP
    while distance < reach:
        for angle in _DIRECTIONS:
            # The label's nearest edge or corner lies at `distance` from the point.
            x = point[0] + distance * math.cos(angle) + size[0] / 2 * _sign(math.cos(angle))
            y = point[1] + distance * math.sin(angle) + size[1] / 2 * _sign(math.sin(angle))
            boxes.append(Box(x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2))
        distance += 6.0
    return boxes


def _sign(value: float) -> int:
    return 0 if abs(value) < 1e-9 else 1 if value > 0 else -1
