"""Find the widths at which a network costs what is wanted."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from compress.errors import EditError
from compress.prune.allocation.candidates import Candidate, Grid
from compress.prune.allocation.costs import Cost, Estimator, make_cost
from compress.prune.allocation.families import bracket, widths_at
from compress.prune.allocation.targets import Target
from compress.prune.anatomy import Anatomy
from compress.prune.planner import apply_removal, describe_removal, least

__all__ = ["Allocation", "fit_to_target", "keep_what_is_free"]

log = logging.getLogger(__name__)

_ROUNDS = 5
_NOISE = 0.005
_FEW = 16
_NUM_CLIFFS = 3

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
    as long as the measured cost allows it; and where one step of one group makes all the difference, that group stays
    and the others lose more.

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
    search = _Search(anatomy, candidates, allocation, grid, cost, target, wanted, _ratio(before, cost.estimate(whole)))
    estimated = search.approach({})
    search.widen()
    for pinned in search.cliffs():
        search.approach(pinned)
    best, tried, factor = search.best, search.tried, search.factor
    met = tried[best] <= wanted
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


class _Search:
    """Widths that have been measured, and how to find more.

    Args:
        factor: What a measured cost is of an estimated one.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        candidates: Sequence[Candidate],
        allocation: str,
        grid: Grid,
        cost: Cost,
        target: Target,
        wanted: float,
        factor: float,
    ) -> None:
        self._anatomy, self._candidates, self._allocation, self._grid = anatomy, candidates, allocation, grid
        self._cost, self._target, self._wanted = cost, target, wanted
        self.factor = factor
        self.tried: dict[_Widths, float] = {}

    @property
    def best(self) -> _Widths:
        """The widths that come closest to what is wanted from below, or from above where none is below."""
        return min(self.tried, key=lambda key: (self.tried[key] > self._wanted, abs(self._wanted - self.tried[key])))

    @property
    def _is_close(self) -> bool:
        return self.tried[self.best] >= (1 - self._target.tolerance) * self._wanted

    def approach(self, pinned: Mapping[str, int]) -> float:
        """Measure the widest widths of the family within the limit, and put the estimate right, until that is close.

        Args:
            pinned: Groups whose width is given.

        Returns:
            What the first estimate said.
        """
        free = [each for each in self._candidates if each.name not in pinned]
        cost = _Pinned(self._cost, pinned)
        estimated = None
        for _ in range(_ROUNDS):
            limit = self._wanted / self.factor
            widths = _widest(free, self._allocation, self._grid, cost, limit)
            if self._target.currency in ("latency", "latency_ms"):
                widths = keep_what_is_free(widths, free, self._grid, cost, limit)
            key = self._key({**widths, **pinned})
            estimated = estimated or self.factor * cost.estimate(widths)
            if key in self.tried:
                break
            reached = self._measure(key)
            self.factor = _ratio(reached, cost.estimate(widths))
            if (1 - self._target.tolerance) * self._wanted <= reached <= self._wanted:
                break
        assert estimated is not None
        return estimated

    def widen(self) -> None:
        """Widen single groups by measurement: those of a family step down together, and not all of them need to."""
        for _ in range(_ROUNDS):
            best = self.best
            if self.tried[best] > self._wanted or self._is_close:
                break
            # One more network, whose cost differs from this one's by what the estimate says of the group.
            base = self.tried[best] - self.factor * self._cost.estimate(dict(best))
            room = [(base + self.factor * self._cost.estimate(widths), self._key(widths)) for widths in self._widened()]
            room = [(predicted, key) for predicted, key in room if key not in self.tried]
            if not room:
                break
            _, key = min(room, key=lambda each: (each[0] > self._wanted, abs(self._wanted - each[0])))
            self._measure(key)

    def cliffs(self) -> Iterator[dict[str, int]]:
        """Yield, while what is met is not close, groups whose width is to be what it was.

        Where a single step of a group makes all the difference, nothing in between is to be had from it: it stays, and
        the others lose more.
        """
        best = dict(self.best)
        narrower = [each for each in self._candidates if best[each.name] < each.now]
        saved = {each.name: self._cost.estimate({**best, each.name: each.now}) for each in narrower}
        for each in sorted(narrower, key=lambda each: -saved[each.name])[:_NUM_CLIFFS]:
            if self._is_close:
                break
            yield {each.name: each.now}

    def _widened(self) -> list[dict[str, int]]:
        """Return widths of which one group is wider than in the best, a few for each group."""
        best = dict(self.best)
        found = []
        for each in self._candidates:
            wider = self._grid.wider(best[each.name], each)
            found += [{**best, each.name: to} for to in wider[:: max(1, len(wider) // _FEW)]]
        return found

    def _key(self, widths: Mapping[str, int]) -> _Widths:
        return tuple((each.name, widths[each.name]) for each in self._candidates)

    def _measure(self, key: _Widths) -> float:
        self.tried[key] = _measured(self._anatomy, self._candidates, dict(key), self._cost)
        return self.tried[key]


class _Pinned:
    """Estimates where some groups have a given width."""

    def __init__(self, cost: Cost, pinned: Mapping[str, int]) -> None:
        self._cost, self._pinned = cost, pinned

    def estimate(self, widths: Mapping[str, int]) -> float:
        return self._cost.estimate({**widths, **self._pinned})


def _ratio(measured: float, estimated: float) -> float:
    return measured / estimated if estimated > 0 else 1.0


def keep_what_is_free(
    widths: Mapping[str, int], candidates: Sequence[Candidate], grid: Grid, cost: Estimator, limit: float
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


def _widest(
    candidates: Sequence[Candidate], allocation: str, grid: Grid, cost: Estimator, limit: float
) -> dict[str, int]:
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
