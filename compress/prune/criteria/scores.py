"""The table of criteria, and the scores of all groups of a network.

===================  ===========  =======================================================
Criterion            Needs        Says nothing of (scored by ``l2``, and logged)
===================  ===========  =======================================================
``l2``, ``l1``       weights
``lamp``, ``fpgm``   weights
``random``           weights
``batchnorm_scale``  weights      groups that no normalisation scales
``taylor``           gradients    groups whose weights have had no gradient
``hessian``          gradients    groups whose weights have had no gradient
``activation_mean``  activations  groups whose units are no dimension of any value
``apoz``             activations  those, and groups that are never zero (GELU, SiLU)
``correlation``      activations  those, and groups of more than 2048 units
===================  ===========  =======================================================
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from compress.errors import RecipeError
from compress.prune.anatomy import Anatomy
from compress.prune.criteria import derivatives, responses, weights
from compress.prune.criteria.activations import Activation
from compress.prune.criteria.gradients import Gradients
from compress.prune.criteria.members import Member, members
from compress.prune.criteria.roles import roles_of

__all__ = ["CRITERIA", "Criterion", "Evidence", "normalise", "score_groups"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at in a group.

    Args:
        name: The group's name.
        width: Its number of units.
        members: What its units hold of each parameter.
        activation: What its units have said, where that was measured.
        seed: For what is drawn.
    """

    name: str
    width: int
    members: Sequence[Member]
    activation: Activation | None
    seed: int


@dataclass(frozen=True)
class Criterion:
    """How units are ranked.

    Args:
        score: From evidence to scores of shape (units,); the lowest go first.
        needs: What must have been gathered besides the weights.
        covers: Says whether the criterion can tell the units of a group apart; others are scored by ``l2``.
    """

    score: Callable[[Evidence], Tensor]
    needs: Literal["weights", "gradients", "activations"] = "weights"
    covers: Callable[[Evidence], bool] = lambda given: True


def _of_weights(score: Callable[[Sequence[Member]], Tensor]) -> Criterion:
    return Criterion(lambda given: score(given.members))


def _of_gradients(score: Callable[[Sequence[Member]], Tensor]) -> Criterion:
    return Criterion(
        lambda given: score(given.members), "gradients", lambda given: derivatives.has_gradient(given.members)
    )


def _of_activations(score: Callable[[Activation], Tensor], covers: Callable[[Activation], bool]) -> Criterion:
    def told(given: Evidence) -> Tensor:
        assert given.activation is not None, "a group that the criterion covers"
        return score(given.activation)

    return Criterion(told, "activations", lambda given: given.activation is not None and covers(given.activation))


CRITERIA: dict[str, Criterion] = {
    "l2": _of_weights(weights.l2),
    "l1": _of_weights(weights.l1),
    "lamp": _of_weights(weights.lamp),
    "fpgm": _of_weights(weights.fpgm),
    "batchnorm_scale": Criterion(
        lambda given: weights.batchnorm_scale(given.members), covers=lambda given: weights.has_scale(given.members)
    ),
    "random": Criterion(lambda given: weights.random(given.name, given.width, seed=given.seed)),
    "taylor": _of_gradients(derivatives.taylor),
    "hessian": _of_gradients(derivatives.hessian),
    "activation_mean": _of_activations(responses.activation_mean, lambda said: True),
    "apoz": _of_activations(responses.apoz, lambda said: bool(said.zeros.any())),
    "correlation": _of_activations(responses.correlation, lambda said: said.products is not None),
}


def score_groups(
    anatomy: Anatomy,
    criterion: str,
    *,
    gradients: Gradients | None = None,
    activations: Mapping[str, Activation] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the scores of the units of each group; the lowest matter least.

    Args:
        anatomy: The network.
        criterion: A name in ``CRITERIA``.
        gradients: Of the network since its last edit, for criteria that need them.
        activations: From ``measure_activations``, for criteria that need them.
        seed: For ``random``.

    Returns:
        Shape (units,) for each group.

    Raises:
        RecipeError: when the criterion is unknown, or what it needs is missing.
        EditError: when the gradients are those of another network.

    Example:
        >>> import torch
        >>> from compress.prune import study
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> score_groups(study(net, [torch.ones(2, 3)]), "random", seed=1)["0"].shape
        torch.Size([4])
    """
    chosen = _checked(criterion, gradients, activations)
    roles = roles_of(anatomy.graph)
    scores, others = {}, []
    for name, group in anatomy.groups.items():
        held = members(anatomy, group, roles=roles, gradients=gradients if chosen.needs == "gradients" else None)
        given = Evidence(name, group.width, held, (activations or {}).get(name), seed)
        if not chosen.covers(given):
            others.append(name)
        scores[name] = (chosen if chosen.covers(given) else CRITERIA["l2"]).score(given)
    if others:
        _say_once(f"prune: {criterion} says nothing of {', '.join(others)}, whose units are ranked by l2")
    return scores


def normalise(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Make scores comparable between groups.

    .. math:: \hat{I}_u = I_u \Big/ \operatorname{mean}_{v \in group} I_v

    Layers differ in the scale of their weights, not in how many of their units matter. ``lamp``, ``taylor`` and
    ``hessian`` compare between groups without it.

    Args:
        scores: Shape (units,) for each group, not negative.

    Returns:
        The same with mean 1; a group of zeros stays as it is.

    Example:
        >>> from torch import tensor
        >>> normalise({"a": tensor([1.0, 3.0]), "b": tensor([100.0, 300.0]), "c": tensor([0.0, 0.0])})
        {'a': tensor([0.5000, 1.5000]), 'b': tensor([0.5000, 1.5000]), 'c': tensor([0., 0.])}
    """
    return {name: score / mean if (mean := score.mean()) > 0 else score for name, score in scores.items()}


def _checked(criterion: str, gradients: Gradients | None, activations: Mapping[str, Activation] | None) -> Criterion:
    if criterion not in CRITERIA:
        raise RecipeError(
            f"prune.criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}. Choose one of them."
        )
    chosen = CRITERIA[criterion]
    if chosen.needs == "gradients" and (gradients is None or not gradients.count):
        raise RecipeError(
            f"prune.criterion: expected gradients for {criterion!r}, got none. Let some optimiser steps pass before "
            "the first edit (a later prune.start), and call Gradients.update before each."
        )
    if chosen.needs == "activations" and activations is None:
        raise RecipeError(
            f"prune.criterion: expected activations for {criterion!r}, got none. Give score_groups what "
            "measure_activations returns."
        )
    return chosen


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)
