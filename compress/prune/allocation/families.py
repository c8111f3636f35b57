"""How the removal is shared out among groups: families of widths that fall as a level rises from 0 to 1.

At level 0 nothing goes, at level 1 as much as the grid allows; whoever has a target looks for the level that meets it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from compress.errors import EditError, RecipeError
from compress.prune.allocation.candidates import Candidate, Grid
from compress.prune.criteria import normalise

__all__ = [
    "ALLOCATIONS",
    "Family",
    "allocate",
    "share_by_sensitivity",
    "share_globally",
    "share_uniformly",
    "widths_at",
]

Family = Callable[[Sequence[Candidate], float], dict[str, float]]
"""From groups and a level to wished widths, which are then rounded."""


def share_uniformly(candidates: Sequence[Candidate], level: float) -> dict[str, float]:
    """Remove the same ratio of each group's original width.

    Args:
        candidates: The groups.
        level: The ratio.
    """
    return {each.name: each.original * (1 - level) for each in candidates}


def share_globally(candidates: Sequence[Candidate], level: float) -> dict[str, float]:
    r"""Remove the lowest scores of all groups together.

    Scores are divided by their group's mean first, since weights of different layers have different scales:

    .. math:: \hat I_{g,u} = I_{g,u} / \operatorname{mean}_v I_{g,v}          Fang et al. 2023, arXiv:2301.12900

    Args:
        candidates: The groups.
        level: The fraction of all units there are now that goes.

    Raises:
        EditError: when a score is not a finite number.
    """
    if not candidates:
        return {}
    scores = np.concatenate([_normalised(each) for each in candidates])
    owner = np.repeat(np.arange(len(candidates)), [each.now for each in candidates])
    # Among equals those that come first in their own group, so that no group is emptied by a tie.
    rank = np.concatenate([np.argsort(np.argsort(_normalised(each), kind="stable")) / each.now for each in candidates])
    gone = np.lexsort((rank, scores))[: round(level * len(scores))]
    counts = np.bincount(owner[gone], minlength=len(candidates))
    return {each.name: float(each.now - count) for each, count in zip(candidates, counts.tolist())}


def share_by_sensitivity(candidates: Sequence[Candidate], level: float) -> dict[str, float]:
    r"""Remove from each group the largest ratio at which the network's loss rises no more than a common bound.

    .. math:: r_g(t) = \max \{ r : \max_{q \le r} L_g(q) - L_g(0) \le t \}

    Curves of one layer at a time after Han et al. 2015, arXiv:1506.02626.

    Args:
        candidates: The groups, each with a curve; between its points the loss is a straight line, beyond them unknown.
        level: The bound, as a fraction of the largest rise that was measured.

    Raises:
        EditError: when a group has no curve.
    """
    rises = {each.name: _rise(each) for each in candidates}
    bound = level * max((float(rise[-1]) for _, rise in rises.values()), default=0.0)
    wished = {}
    for each in candidates:
        ratios, rise = rises[each.name]
        last = int(np.searchsorted(rise, bound, side="right")) - 1
        ratio = ratios[last]
        if last + 1 < len(ratios):
            ratio += (ratios[last + 1] - ratio) * (bound - rise[last]) / (rise[last + 1] - rise[last])
        wished[each.name] = each.original * (1 - float(ratio))
    return wished


ALLOCATIONS: dict[str, Family] = {
    "uniform": share_uniformly,
    "global": share_globally,
    "sensitivity": share_by_sensitivity,
}
"""Name in recipes to the family."""


def widths_at(candidates: Sequence[Candidate], allocation: str, level: float, grid: Grid) -> dict[str, int]:
    """Return the width of each group at a level.

    Args:
        candidates: The groups.
        allocation: A key of ``ALLOCATIONS``.
        level: In [0, 1]; widths never rise with it, and at 0 they are what they are now.
        grid: The widths that may be chosen.

    Raises:
        RecipeError: when there is no such allocation.
        EditError: when it needs what a group lacks.

    Example:
        >>> groups = [Candidate("a", 64, 64, torch.ones(64)), Candidate("b", 20, 20, torch.ones(20))]
        >>> widths_at(groups, "uniform", 0.5, Grid(8))
        {'a': 32, 'b': 8}
    """
    if allocation not in ALLOCATIONS:
        raise RecipeError(
            f"prune.allocation: expected one of {', '.join(ALLOCATIONS)}, got {allocation!r}. Choose one."
        )
    if level <= 0:
        return {each.name: each.now for each in candidates}
    wished = ALLOCATIONS[allocation](candidates, level)
    return {each.name: grid.nearest(wished[each.name], each) for each in candidates}


def allocate(
    candidates: Sequence[Candidate], allocation: str, ratio: float, *, round_to: int = 8, min_width: int = 1
) -> dict[str, int]:
    """Choose widths such that a fraction of all units goes.

    Args:
        candidates: The groups.
        allocation: A key of ``ALLOCATIONS``.
        ratio: Fraction removed in [0, 1): of each group with ``uniform``, else of the sum of the original widths, as
            near as widths allow.
        round_to: Widths are multiples of it.
        min_width: No group is made narrower.

    Raises:
        RecipeError: when a value is out of range.
        EditError: when the allocation needs what a group lacks.

    Example:
        >>> weak, strong = Candidate("a", 8, 8, torch.arange(8.0)), Candidate("b", 8, 8, torch.ones(8))
        >>> allocate([weak, strong], "global", 0.25, round_to=2)
        {'a': 4, 'b': 8}
    """
    if not 0 <= ratio < 1:
        raise RecipeError(
            f"prune.ratio: expected a value in [0, 1), got {ratio}. Use 0.5 to remove half of the channels."
        )
    grid = Grid(round_to, min_width)
    if allocation == "uniform":
        return widths_at(candidates, allocation, ratio, grid)
    wanted = (1 - ratio) * sum(each.original for each in candidates)
    above, below = bracket(lambda level: widths_at(candidates, allocation, level, grid), _total, wanted)
    return min(above, below, key=lambda widths: abs(_total(widths) - wanted))


def bracket(
    widths: Callable[[float], dict[str, int]], cost: Callable[[dict[str, int]], float], wanted: float
) -> tuple[dict[str, int], dict[str, int]]:
    """Return neighbouring widths of a family: the last that cost more than wanted, and the first that do not.

    Both are the widest when these cost no more, and both the narrowest when even these do.
    """
    low, high = 0.0, 1.0
    above, below = widths(low), widths(high)
    if cost(above) <= wanted:
        return above, above
    if cost(below) > wanted:
        return below, below
    # Levels may lie close together, as the bounds of sensitivity on a steep curve.
    for _ in range(60):
        middle = (low + high) / 2
        between = widths(middle)
        if cost(between) <= wanted:
            high, below = middle, between
        else:
            low, above = middle, between
    return above, below


def _total(widths: dict[str, int]) -> float:
    return sum(widths.values())


def _normalised(candidate: Candidate) -> np.ndarray:
    scores = candidate.scores.detach().double().cpu()
    if not bool(torch.isfinite(scores).all()):
        raise EditError(
            f"prune: expected finite scores of the units of {candidate.name}, got {scores.tolist()[:5]}. "
            "Has the training diverged?"
        )
    return normalise({candidate.name: scores})[candidate.name].numpy()


def _rise(candidate: Candidate) -> tuple[np.ndarray, np.ndarray]:
    """Return ratios from 0 on and how far the loss has risen up to each, at most."""
    if not candidate.curve:
        raise EditError(
            f"prune.allocation: expected a measured curve of {candidate.name} for sensitivity, got none. "
            "Measure one, or use global."
        )
    curve = {float(ratio): float(loss) for ratio, loss in sorted(map(tuple, candidate.curve))}
    # Without a point at 0 the least loss stands for the untouched network's.
    curve = {0.0: curve.get(0.0, min(curve.values())), **{ratio: loss for ratio, loss in curve.items() if ratio > 0}}
    losses = np.array(list(curve.values()))
    if not np.isfinite(losses).all():
        raise EditError(
            f"prune.allocation: expected finite losses on the curve of {candidate.name}, got {losses.tolist()}. "
            "Measure it on data that the network has been trained on."
        )
    return np.array(list(curve)), np.maximum.accumulate(losses) - losses[0]
