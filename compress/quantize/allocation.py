"""Which layer gets how many bits: the least predicted loss within a size."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from compress.errors import RecipeError

__all__ = ["allocate_bits"]

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
    unit = max(unit, math.ceil(budget / _MOST_UNITS))
    num = budget // unit
    # best[n]: the least loss of the layers so far that spends n units; taken[layer][n]: the bits that reach it.
    best = np.full(num + 1, np.inf)
    best[0] = 0.0
    taken = []
    for layer in layers:
        reached, bits_of = np.full(num + 1, np.inf), np.zeros(num + 1, dtype=np.int64)
        for bits, cost in costs[layer].items():
            units = -(-cost // unit)
            if units > num:
                continue
            candidate = np.full(num + 1, np.inf)
            candidate[units:] = best[: num + 1 - units] + losses[layer][bits]
            better = candidate < reached
            reached[better], bits_of[better] = candidate[better], bits
        best = reached
        taken.append(bits_of)
    place = int(best.argmin())
    if not math.isfinite(best[place]):  # rounded up, the fewest bits do not fit
        return {layer: min(losses[layer]) for layer in layers}
    chosen = {}
    for layer, bits_of in zip(reversed(layers), reversed(taken)):
        chosen[layer] = int(bits_of[place])
        place -= -(-costs[layer][chosen[layer]] // unit)
    return {layer: chosen[layer] for layer in layers}
