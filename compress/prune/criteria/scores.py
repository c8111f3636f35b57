"""The table of criteria, and the scores of all groups of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.prune.anatomy import Anatomy
from compress.prune.coupling import Group

__all__ = ["CRITERIA", "Criterion", "Member", "members", "score_groups"]


@dataclass(frozen=True)
class Member:
    """What the units of a group hold of one parameter.

    Args:
        name: The parameter.
        dim: Along which of its dimensions the units lie: 0 for what computes them, 1 for what reads them.
        weight: Shape (units, elements), float32.
    """

    name: str
    dim: int
    weight: Tensor


@dataclass(frozen=True)
class Criterion:
    """How units are ranked.

    Args:
        score: From the members of a group to scores of shape (units,); the lowest go first.
    """

    score: Callable[[Sequence[Member]], Tensor]


def members(anatomy: Anatomy, group: Group) -> list[Member]:
    """Return what a group's units hold, parameter by parameter."""
    parameters = dict(anatomy.network.named_parameters())
    found = []
    for (name, dim), indices in group.slots.items():
        if name in parameters:
            weight = parameters[name].detach().float().movedim(dim, 0)
            found.append(Member(name, dim, weight.reshape(len(weight), -1)[indices.to(weight.device)].flatten(1)))
    return found


def l2(group: Sequence[Member]) -> Tensor:
    r"""Score units by their weights' squared norm.

    .. math:: I_u = \operatorname{mean}_{W \in group} \|W_u\|_2^2          Fang et al. 2023, arXiv:2301.12900

    Args:
        group: The members of a group.

    Returns:
        Shape (units,).
    """
    return torch.stack([member.weight.square().sum(1) for member in group]).mean(0)


CRITERIA: dict[str, Criterion] = {"l2": Criterion(l2)}


def score_groups(anatomy: Anatomy, criterion: str) -> dict[str, Tensor]:
    """Return the scores of the units of each group, shape (units,); the lowest matter least."""
    score = CRITERIA[criterion].score
    return {name: score(members(anatomy, group)) for name, group in anatomy.groups.items()}
