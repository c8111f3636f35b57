"""Criteria that look at weights alone, and chance."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.prune.criteria.members import Member, with_role
from compress.prune.criteria.roles import MAKES, SCALES

__all__ = ["batchnorm_scale", "fpgm", "has_scale", "l1", "l2", "lamp", "random"]

_ROWS = 1024


def l1(group: Sequence[Member]) -> Tensor:
    r"""Score units by the sum of their weights' magnitudes.

    .. math:: I_u = \operatorname{mean}_{W \in group} \|W_u\|_1

    Li et al. 2017, arXiv:1608.08710, with the mean over all coupled parameters instead of one layer.

    Args:
        group: The members of a group.

    Returns:
        Shape (units,).

    Example:
        >>> l1([Member("a", 0, torch.tensor([[1.0, -2.0], [0.5, 0.0]])), Member("b", 1, torch.tensor([[1.0], [1.5]]))])
        tensor([2., 1.])
    """
    return torch.stack([member.weight.abs().sum(1) for member in group]).mean(0)


def l2(group: Sequence[Member]) -> Tensor:
    r"""Score units by their weights' squared norm.

    .. math:: I_u = \operatorname{mean}_{W \in group} \|W_u\|_2^2          Fang et al. 2023, arXiv:2301.12900

    Args:
        group: The members of a group.

    Returns:
        Shape (units,).

    Example:
        >>> l2([Member("a", 0, torch.tensor([[1.0, -2.0], [0.5, 0.0]])), Member("b", 1, torch.tensor([[1.0], [1.5]]))])
        tensor([3.0000, 1.2500])
    """
    return torch.stack([member.weight.square().sum(1) for member in group]).mean(0)


def lamp(group: Sequence[Member]) -> Tensor:
    r"""Score units by their squared norm relative to that of all units which are not smaller.

    .. math:: I_u = s_u \Big/ \sum_{v: s_v \ge s_u} s_v

    with s the squared norms of ``l2``. Lee et al. 2021, arXiv:2010.07611, with units in the place of weights. The
    largest unit of every group has the same score, so scores compare between groups as they are.

    Args:
        group: The members of a group.

    Returns:
        Shape (units,), in [0, 1].

    Example:
        >>> lamp([Member("a", 0, torch.tensor([[1.0], [2.0], [3.0**0.5]]))])
        tensor([0.1250, 1.0000, 0.4286])
    """
    squared = l2(group)
    ordered, order = squared.sort()
    not_smaller = ordered.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(ordered, ordered)  # equal units count each other
    scores = torch.empty_like(squared)
    scores[order] = (ordered / not_smaller[first]).nan_to_num(0.0)
    return scores


def fpgm(group: Sequence[Member]) -> Tensor:
    r"""Score units by how far what makes them lies from what makes the others.

    .. math:: I_u = \sum_v \|W_u - W_v\|_2

    He et al. 2019, arXiv:1811.00250: a unit near the geometric median can be stood in for by the others. W is joined
    from all layers that make the units.

    Args:
        group: The members of a group.

    Returns:
        Shape (units,).

    Example:
        >>> fpgm([Member("a", 0, torch.tensor([[0.0], [1.0], [5.0]]), role="makes")])
        tensor([6., 5., 9.])
    """
    made = torch.cat([member.weight for member in with_role(group, MAKES)], 1)
    made = made.double()  # distances come from matrix products, whose rounding gives equal units a distance
    # A few rows at a time: all distances of a wide group would not fit in memory.
    rows = [torch.cdist(part, made, compute_mode="use_mm_for_euclid_dist").sum(1) for part in made.split(_ROWS)]
    return torch.cat(rows).float()


def batchnorm_scale(group: Sequence[Member]) -> Tensor:
    r"""Score units by the scales of the normalisations that they pass.

    .. math:: I_u = \operatorname{mean} |\gamma_u|          Liu et al. 2017, arXiv:1708.06519

    The mean is over all coupled normalisations (batch, instance, group, layer, RMS) and all indices of a unit.

    Args:
        group: The members of a group, one of them a scale (``has_scale``).

    Returns:
        Shape (units,).

    Example:
        >>> batchnorm_scale([Member("norm", 0, torch.tensor([[-2.0], [1.0]]), role="scales")])
        tensor([2., 1.])
    """
    return torch.stack([member.weight.abs().mean(1) for member in group if member.role == SCALES]).mean(0)


def has_scale(group: Sequence[Member]) -> bool:
    """Say whether a normalisation scales the units."""
    return any(member.role == SCALES for member in group)


def random(name: str, width: int, *, seed: int = 0) -> Tensor:
    """Score units by chance, the baseline of every criterion: Mittal et al. 2018, arXiv:1801.10447.

    Args:
        name: The group's; each has numbers of its own.
        width: Its number of units.
        seed: The same seed gives the same scores on every machine.

    Returns:
        Shape (width,), uniform in [0, 1).

    Example:
        >>> bool((random("conv1", 8, seed=1) == random("conv1", 8, seed=1)).all())
        True
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(width, generator=generator)
