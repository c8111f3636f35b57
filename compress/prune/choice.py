"""From wishes and evidence to an edit: which units go, and which blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.prune.allocation import Candidate, Cost, Target, allocate, fit_to_target, make_cost
from compress.prune.anatomy import Anatomy
from compress.prune.blocks import find_blocks
from compress.prune.criteria import score_groups
from compress.prune.influence import block_influence
from compress.prune.observations import Observations
from compress.prune.planner import describe_removal, least
from compress.prune.sensitivity import divergence, measure_sensitivity
from compress.surgery import History

__all__ = ["Wishes", "choose_blocks", "choose_units", "describe"]


@dataclass(frozen=True)
class Wishes:
    """What is to be removed in the end.

    Args:
        ratio: Fraction of the units, without a target.
        target: What the network may cost.
        allocation: How removal spreads over layers.
        criterion: What says how much a unit matters.
        depth: Fraction of the blocks.
        round_to: Widths are multiples of it.
        min_width: Least units of a layer that stay.
    """

    ratio: float = 0.5
    target: Target | None = None
    allocation: str = "uniform"
    criterion: str = "l2"
    depth: float = 0.0
    round_to: int = 8
    min_width: int = 1

    @property
    def nothing(self) -> bool:
        """Whether there is nothing to do."""
        return self.ratio == 0 and self.target is None and self.depth == 0


def choose_units(seen: Observations, wishes: Wishes, fraction: float, history: History) -> dict[str, Any] | None:
    """Describe which units are to go so that a fraction of the wishes is fulfilled.

    Args:
        seen: The network as it is now, and what has been seen of it; curves are added where they are measured.
        wishes: What is to be removed in the end.
        fraction: How much of that is to be gone after this edit, in (0, 1].
        history: What was removed before.

    Returns:
        Data of an edit, or none when nothing is to go. Where there is a target, ``target`` holds ``metric``,
        ``wanted`` now, ``goal`` in the end, ``reached``, ``original`` and ``engine``.

    Raises:
        EditError: when a target is out of reach, or what is left does not run.
    """
    anatomy = seen.anatomy
    scores = score_groups(
        anatomy, wishes.criterion, gradients=seen.gradients, activations=seen.activations, seed=len(history)
    )
    if wishes.allocation == "sensitivity" and not seen.curves:
        seen.curves = measure_sensitivity(anatomy, scores, divergence(anatomy.network, seen.batches))
    original = _original_widths(history)
    candidates = [
        Candidate(name, original.get(name, width), width, scores[name], seen.curves.get(name))
        for name, width in anatomy.widths.items()
    ]
    if wishes.target is None:
        widths = allocate(
            candidates,
            wishes.allocation,
            wishes.ratio * fraction,
            round_to=wishes.round_to,
            min_width=wishes.min_width,
        )
        return describe_removal(anatomy, least(scores, widths))
    widths, figures = _meet(anatomy, candidates, wishes, wishes.target, fraction, history)
    plan = describe_removal(anatomy, least(scores, widths))
    return {**plan, "target": figures, "original_cost": figures["original"]} if plan is not None else None


def choose_blocks(seen: Observations, wishes: Wishes, fraction: float, history: History) -> dict[str, Any] | None:
    """Describe which blocks are to go, those that change least what they are given; they go before units.

    Args:
        seen: The network as it is now, and recent inputs.
        wishes: What is to be removed in the end.
        fraction: How much of that is to be gone after this edit, in (0, 1].
        history: What was removed before.

    Returns:
        Data of an edit, or none when nothing is to go.
    """
    anatomy = seen.anatomy
    gone = sum(len(edit.data.get("blocks", ())) for edit in history)
    left = find_blocks(anatomy)
    surplus = round(wishes.depth * fraction * (gone + len(left))) - gone
    if surplus <= 0:
        return None
    influence = block_influence(anatomy, seen.batches)
    plan = describe_removal(anatomy, {}, blocks=sorted(influence, key=influence.__getitem__)[:surplus])
    if plan is None or wishes.target is None:
        return plan
    # What a target is a fraction of, before anything has gone.
    return {**plan, "original_cost": _original_cost(anatomy, make_cost(anatomy, wishes.target), history)}


def _meet(
    anatomy: Anatomy,
    candidates: Sequence[Candidate],
    wishes: Wishes,
    target: Target,
    fraction: float,
    history: History,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Return widths with which the network costs what it may at this point of the way to the target."""
    cost = make_cost(anatomy, target)
    original = _original_cost(anatomy, cost, history)
    wanted = original - fraction * (original - target.absolute(original))
    found = fit_to_target(
        anatomy,
        candidates,
        wishes.allocation,
        target,
        round_to=wishes.round_to,
        min_width=wishes.min_width,
        wanted=wanted,
        cost=cost,
    )
    figures = {
        "metric": found.currency,
        "wanted": wanted,
        "goal": target.absolute(original),
        "reached": found.reached,
        "original": original,
        "engine": target.engine if "latency" in target.currency else None,
    }
    return found.widths, figures


def _original_cost(anatomy: Anatomy, cost: Cost, history: History) -> float:
    """Return what the network cost before any pruning, from the first edit that knows it."""
    known = [edit.data["original_cost"] for edit in history if "original_cost" in edit.data]
    return known[0] if known else cost.measure(anatomy.network, anatomy.inputs)


def _original_widths(history: History) -> dict[str, int]:
    original: dict[str, int] = {}
    for edit in history:
        for name, (before, _) in edit.data.get("widths", {}).items():
            original.setdefault(name, before)
    return original


def describe(data: Mapping[str, Any]) -> str:
    """Return in one line what an edit removes."""
    parts = [f"{name} {old}->{new}" for name, (old, new) in data.get("widths", {}).items()]
    if data.get("blocks"):
        parts.append(f"without {', '.join(data['blocks'])}")
    if "target" in data:
        parts.append("{metric} {reached:.4g} (wanted {wanted:.4g})".format(**data["target"]))
    return ", ".join(parts)
