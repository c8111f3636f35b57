"""Which layer gets what: the least predicted loss within a size or a time."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np

from compress.errors import RecipeError

__all__ = ["allocate_bits", "allocate_floats"]

Option = TypeVar("Option", bound=Hashable)

_MOST_UNITS = 16384


def allocate_bits(
    losses: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], *, average_bits: float
) -> dict[str, int]:
    """Choose bits for the weights of each layer, by dynamic programming over the size that is spent.

    The loss of a choice is predicted as the sum of what each layer costs alone, as measured. Within that, the choice is
    the best there is, where sizes share a divisor that makes at most 16,384 units of the target; otherwise sizes are
    rounded up to such units, and the target is still kept.

    Args:
        losses: What a network loses with one layer at some bits, by layer and bits.
        sizes: The number of weights of each layer.
        average_bits: The target: bits a weight has on average, at most.

    Returns:
        Bits of each layer; of choices that lose the same, the smallest.

    Raises:
        RecipeError: when even the fewest bits are too many.

    Example:
        >>> losses = {"a": {8: 0.0, 4: 0.1}, "b": {8: 0.0, 4: 0.3}}
        >>> allocate_bits(losses, {"a": 10, "b": 10}, average_bits=6)
        {'a': 4, 'b': 8}
    """
    layers = list(losses)
    if not layers:
        raise RecipeError("average_bits: expected layers to share bits among, got none. Leave it out.")
    budget = math.floor(average_bits * sum(sizes[layer] for layer in layers) + 1e-9)
    costs = {layer: {bits: bits * sizes[layer] for bits in sorted(losses[layer])} for layer in layers}
    fewest = sum(min(of_layer.values()) for of_layer in costs.values())
    if fewest > budget:
        least = fewest / sum(sizes[layer] for layer in layers)
        raise RecipeError(
            f"average_bits: expected at least {least:g}, all layers at their fewest bits, got {average_bits:g}. "
            "Measure fewer bits, or allow more."
        )
    unit = math.gcd(*(cost for of_layer in costs.values() for cost in of_layer.values()))
    return _least_loss(losses, costs, budget, max(unit, math.ceil(budget / _MOST_UNITS)))


def allocate_floats(gains: Mapping[str, float], times: Mapping[str, float], *, budget: float) -> list[str]:
    """Choose the layers that stay in floats where the others compute in integers, as ``allocate_bits`` chooses bits.

    Args:
        gains: What a network's loss falls by with one layer in floats, all others in integers; negative where it rises.
        times: What that layer costs more in floats, in any unit of time; negative where floats are faster.
        budget: What all of them may cost more, in sum, to a 16,384th for each layer of what there is to choose about.

    Returns:
        Their names.

    Raises:
        RecipeError: when even the fastest choice is too slow.

    Example:
        >>> allocate_floats({"stem": 0.2, "body": 0.3, "fc": 0.2}, {"stem": 1.0, "body": 2.0, "fc": 1.0}, budget=2.0)
        ['stem', 'fc']
    """
    fastest = sum(min(0.0, time) for time in times.values())
    if fastest > budget:
        raise RecipeError(f"latency: expected at least {fastest:g} more than in integers, got {budget:g}. Allow more.")
    room = budget - fastest
    unit = room / _MOST_UNITS or min((abs(time) for time in times.values() if time), default=1.0)
    # Times are what a layer takes beyond its faster form, so that none is negative.
    costs = {
        layer: {False: round(max(0.0, -time) / unit), True: round(max(0.0, time) / unit)}
        for layer, time in times.items()
    }
    losses = {layer: {False: 0.0, True: -gain} for layer, gain in gains.items()}
    num = _MOST_UNITS + len(costs) // 2 if room else 0  # what just fits may be half a unit more for each layer
    chosen = _least_loss(losses, costs, num, 1)
    return [layer for layer, in_floats in chosen.items() if in_floats]


def _least_loss(
    losses: Mapping[str, Mapping[Option, float]],
    costs: Mapping[str, Mapping[Option, int]],
    budget: int,
    unit: int,
) -> dict[str, Option]:
    """Return the option of each layer with the least loss in sum whose costs, rounded up to units, are within a budget.

    Of options that lose the same, the first of a layer counts; where none fits once rounded up, the cheapest.
    """
    num = budget // unit
    units = {
        layer: {option: -(-cost // unit) for option, cost in of_layer.items()} for layer, of_layer in costs.items()
    }
    # best[n]: the least loss of the layers so far that spends n units; taken[layer][n]: the option that reaches it.
    best = np.full(num + 1, np.inf)
    best[0] = 0.0
    taken = []
    for layer, of_layer in units.items():
        reached, place_of = np.full(num + 1, np.inf), np.zeros(num + 1, dtype=np.int64)
        for place, (option, spent) in enumerate(of_layer.items()):
            if spent > num:
                continue
            candidate = np.full(num + 1, np.inf)
            candidate[spent:] = best[: num + 1 - spent] + losses[layer][option]
            better = candidate < reached
            reached[better], place_of[better] = candidate[better], place
        best = reached
        taken.append(place_of)
    place = int(best.argmin())
    if not math.isfinite(best[place]):
        return {layer: min(of_layer, key=of_layer.__getitem__) for layer, of_layer in costs.items()}
    chosen = {}
    for layer, place_of in zip(reversed(units), reversed(taken)):
        option = list(units[layer])[place_of[place]]
        chosen[layer] = option
        place -= units[layer][option]
    return {layer: chosen[layer] for layer in losses}
