"""One of the zoo's checks: every criterion and every allocation once."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from zoo_models import build, first_output, size

from compress.prune import (
    ALLOCATIONS,
    CRITERIA,
    Anatomy,
    Target,
    apply_removal,
    describe_removal,
    divergence,
    measure_sensitivity,
    score_groups,
    study,
)
from compress.prune.allocation import Candidate, allocate, fit_to_target
from compress.prune.criteria import Gradients, measure_activations
from compress.prune.planner import least

__all__ = ["criteria"]

RATIO = 0.3


def criteria(name: str, row: dict[str, Any]) -> None:
    """Remove 30 % of an architecture by each criterion, allocation and target, and run what is left.

    Args:
        name: Of the architecture.
        row: Gets the number of ways that were tried, and those that failed.

    Raises:
        AssertionError: naming the ways that failed.
    """
    network, inputs = build(name)
    outputs = first_output(network(*inputs)).float()
    outputs.square().mean().backward()
    gradients = Gradients()
    gradients.update(network)
    anatomy = study(network, inputs)
    activations = measure_activations(anatomy, [inputs])
    scores = {
        criterion: score_groups(anatomy, criterion, gradients=gradients, activations=activations)
        for criterion in CRITERIA
    }
    curves = measure_sensitivity(anatomy, scores["l2"], divergence(network, [inputs]), ratios=(0.25, 0.5))
    candidates = [
        Candidate(group, width, width, scores["l2"][group], curves[group]) for group, width in anatomy.widths.items()
    ]
    failed = []
    ways: dict[str, Any] = {f"criterion {key}": (each, None) for key, each in scores.items()}
    for allocation in ALLOCATIONS:
        ways[f"allocation {allocation}"] = (scores["l2"], (allocation, None))
        for currency in ("macs", "params", "bytes"):
            ways[f"{allocation} to 80 % of {currency}"] = (scores["l2"], (allocation, Target(**{currency: 0.8})))
    for way, (score, how) in ways.items():
        try:
            _remove(anatomy, score, _widths(anatomy, candidates, how), inputs)
        except Exception as error:  # whatever fails is named
            failed.append(f"{way}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    row |= {"ways": len(ways), "failed": failed}
    assert not failed, "; ".join(failed)


def _widths(anatomy: Anatomy, candidates: list[Candidate], how: Any) -> Mapping[str, int]:
    if how is None:
        return {group: max(1, math.ceil((1 - RATIO) * width)) for group, width in anatomy.widths.items()}
    allocation, target = how
    if target is None:
        return allocate(candidates, allocation, RATIO, round_to=1)
    found = fit_to_target(anatomy, candidates, allocation, target, round_to=1)
    assert found.met, f"wanted {found.wanted:.4g}, reached {found.reached:.4g}"
    return found.widths


def _remove(anatomy: Anatomy, scores: Mapping[str, Tensor], widths: Mapping[str, int], inputs: Any) -> None:
    data = describe_removal(anatomy, least(scores, widths))
    assert data is not None, "nothing was removed"
    smaller = apply_removal(copy.deepcopy(anatomy.network), data)
    assert size(smaller) < size(anatomy.network), "it is not smaller"
    with torch.no_grad():
        assert torch.isfinite(first_output(smaller(*inputs))).all(), "outputs are not finite"
