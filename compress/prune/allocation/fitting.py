"""Find the widths at which a network costs what is wanted."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from compress.errors import EditError
from compress.prune.allocation.candidates import Candidate, Grid
from compress.prune.allocation.costs import Cost, make_cost
from compress.prune.allocation.families import bracket, widths_at
from compress.prune.allocation.targets import Target
from compress.prune.anatomy import Anatomy
from compress.prune.planner import apply_removal, describe_removal, least

__all__ = ["Allocation", "fit_to_target", "keep_what_is_free"]

log = logging.getLogger(__name__)

_ROUNDS = 5
_NOISE = 0.005
_FEW = 16

_Widths = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Allocation:
    """Widths, and what they cost.

    Args:
        widths: Width of each group.
        currency: What the figures count.
        before: What the network cost before this step, measured.
        wanted: What it should cost at most.
        estimated: What the first estimate said of widths that meet it.
        reached: What the network of these widths costs, measured.
        rounds: How many networks were measured.
    """

    widths: dict[str, int]
    currency: str
    before: float
    wanted: float
    estimated: float
    reached: float
    rounds: int

    @property
    def met(self) -> bool:
        """Whether the network costs no more than wanted."""
        return self.reached <= self.wanted


def fit_to_target(
    anatomy: Anatomy,
    candidates: Sequence[Candidate],
    allocation: str,
    target: Target,
    *,
    round_to: int = 8,
    min_width: int = 1,
    wanted: float | None = None,
    cost: Cost | None = None,
) -> Allocation:
    """Choose the widest widths of a family at which the network costs no more than wanted.

    Widths are found by an estimate; then the network is cut on a copy and measured, and while it is dearer than wanted
    or cheaper by more than the target's tolerance, the estimate is put right by what was measured, and widths are found
    anew. Where it stays cheaper than that, since widths of a family step down together, single groups are widened again
    as long as the measured cost allows it.

    Args:
        anatomy: The network; left untouched.
        candidates: Its groups.
        allocation: A key of ``ALLOCATIONS``.
        target: What the network may cost.
        round_to: Widths are multiples of it.
        min_width: No group is made narrower.
        wanted: What it may cost now, in the target's currency, where the target is approached in steps; without it the
            target, of which fractions count from this network.
        cost: Estimates and measures; by default that of the target's currency.

    Raises:
        EditError: when the narrowest widths cost more than wanted, or what is left does not run.
        RecipeError: when there is no such allocation, or a value is out of range.

    Example:
        >>> import torch
        >>> from compress.prune import study
        >>> anatomy = study(nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 2)), [torch.ones(2, 3)])
        >>> groups = [Candidate("0", 64, 64, torch.rand(64))]
        >>> fit_to_target(anatomy, groups, "uniform", Target(macs=0.5)).widths
        {'0': 32}
    """
    grid = Grid(round_to, min_width)
    cost = cost or make_cost(anatomy, target)
    before = cost.measure(anatomy.network, anatomy.inputs)
    wanted = target.absolute(before) if wanted is None else wanted
    whole = {each.name: each.now for each in candidates}
    if before <= wanted:
        return Allocation(whole, target.currency, before, wanted, before, before, 0)
    # What the estimate leaves out counts as dear as the rest, until a measurement says more.
    factor = _ratio(before, cost.estimate(whole))
    tried: dict[_Widths, float] = {}
    estimated = None
    for _ in range(_ROUNDS):
        widths = _widest(candidates, allocation, grid, cost, wanted / factor)
        if target.currency in ("latency", "latency_ms"):
            widths = keep_what_is_free(widths, candidates, grid, cost, wanted / factor)
        estimated = estimated or factor * cost.estimate(widths)
        key = tuple(widths.items())
        if key in tried:
            break
        tried[key] = _measured(anatomy, candidates, widths, cost)
        if (1 - target.tolerance) * wanted <= tried[key] <= wanted:
            break
        factor = _ratio(tried[key], cost.estimate(widths))
    for _ in range(_ROUNDS):
        best = _best(tried, wanted)
        if not tried[best] < (1 - target.tolerance) * wanted:
            break
        # One more network, whose cost differs from this one's by what the estimate says of the group that is widened.
        room = [
            (tried[best] + factor * (cost.estimate(widths) - cost.estimate(dict(best))), tuple(widths.items()))
            for widths in _widened(dict(best), candidates, grid)
        ]
        room = [(predicted, key) for predicted, key in room if key not in tried]
        if not room:
            break
        _, key = min(room, key=lambda each: (each[0] > wanted, abs(wanted - each[0])))
        tried[key] = _measured(anatomy, candidates, dict(key), cost)
    best = _best(tried, wanted)
    met = tried[best] <= wanted
    assert estimated is not None
    found = Allocation(dict(best), target.currency, before, wanted, estimated, tried[best], len(tried))
    narrowest = {each.name: grid.least(each) for each in candidates}
    if not met and factor * cost.estimate(narrowest) > wanted:
        raise EditError(
            f"prune.target.{target.currency}: expected a cost that the widths allowed here reach, got {wanted:,.6g} "
            f"where the narrowest network costs {found.reached:,.6g} (and before, {before:,.6g}). Ask for more, lower "
            "prune.min_width or prune.round_to, or shorten prune.ignore."
        )
    if not met:
        log.warning(
            "prune.target.%s: wanted %.6g, reached %.6g at best in %d measurements; the machine's speed may vary",
            target.currency,
            wanted,
            found.reached,
            found.rounds,
        )
    return found


def _best(tried: Mapping[_Widths, float], wanted: float) -> _Widths:
    """Return the widths that come closest to what is wanted from below, or from above where none is below."""
    return min(tried, key=lambda key: (tried[key] > wanted, abs(wanted - tried[key])))


def _widened(widths: Mapping[str, int], candidates: Sequence[Candidate], grid: Grid) -> list[dict[str, int]]:
    """Return widths of which one group is wider, a few for each group."""
    found = []
    for each in candidates:
        wider = grid.wider(widths[each.name], each)
        found += [{**widths, each.name: to} for to in wider[:: max(1, len(wider) // _FEW)]]
    return found


def _ratio(measured: float, estimated: float) -> float:
    return measured / estimated if estimated > 0 else 1.0


def keep_what_is_free(
    widths: Mapping[str, int], candidates: Sequence[Candidate], grid: Grid, cost: Cost, limit: float
) -> dict[str, int]:
    """Widen groups again whose removal does not make the network faster.

    Args:
        widths: Chosen widths.
        candidates: The groups.
        grid: The widths that may be chosen.
        cost: What says how fast.
        limit: What the network may cost, as the cost estimates it; each group may use its share of half a percent of
            noise below it.
    """
    chosen = dict(widths)
    share = _NOISE * cost.estimate(chosen) / max(1, len(candidates))
    for each in candidates:
        now = cost.estimate(chosen)
        bound = max(now, min(now + share, limit))
        for wider in reversed(grid.wider(chosen[each.name], each)):
            if cost.estimate({**chosen, each.name: wider}) <= bound:
                chosen[each.name] = wider
                break
    return chosen


def _widest(candidates: Sequence[Candidate], allocation: str, grid: Grid, cost: Cost, limit: float) -> dict[str, int]:
    """Return widths of which the estimate is just within a limit."""
    above, chosen = bracket(lambda level: widths_at(candidates, allocation, level, grid), cost.estimate, limit)
    # Groups of the same width step down together; some of them need not.
    for each in candidates:
        for wider in reversed([w for w in grid.wider(chosen[each.name], each) if w <= above[each.name]]):
            if cost.estimate({**chosen, each.name: wider}) <= limit:
                chosen = {**chosen, each.name: wider}
                break
    return chosen


def _measured(anatomy: Anatomy, candidates: Sequence[Candidate], widths: Mapping[str, int], cost: Cost) -> float:
    data = describe_removal(anatomy, least({each.name: each.scores for each in candidates}, widths))
    network: nn.Module = copy.deepcopy(anatomy.network)
    return cost.measure(network if data is None else apply_removal(network, data), anatomy.inputs)
