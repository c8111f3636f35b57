"""Criteria that look at weights and gradients: by how much the loss would change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.prune.criteria.members import Member, with_role
from compress.prune.criteria.roles import READS

__all__ = ["has_gradient", "hessian", "taylor"]


def taylor(group: Sequence[Member]) -> Tensor:
    r"""Score units by the squared first-order change of the loss when they are set to zero.

    .. math:: I_u = \Big(\sum_{w \in R_u} \overline{w g}\Big)^2          Molchanov et al. 2019, arXiv:1906.10771

    R are the weights that read the unit. Their sum of w g is that of the activation times its gradient, which is what
    a gate behind the normalisation gives; weights before a BatchNorm sum up to zero whatever the unit is worth. The
    mean over steps is taken before squaring. Scores compare between groups as they are.

    Args:
        group: The members of a group, with their products.

    Returns:
        Shape (units,).

    Example:
        >>> taylor([Member("a", 1, torch.ones(2, 2), "reads", product=torch.tensor([[1.0, -3.0], [2.0, 1.0]]))])
        tensor([4., 9.])
    """
    known = [member for member in group if member.product is not None]
    sums = [member.product.sum(1) for member in with_role(known, READS) if member.product is not None]
    return torch.stack(sums).sum(0).square()


def hessian(group: Sequence[Member]) -> Tensor:
    r"""Score units by the second-order change of the loss when their weights are set to zero.

    .. math:: I_u = \sum_{w \in group} \tfrac{1}{2} h_{ww} w^2, \quad h_{ww} \approx \overline{g^2}

    Optimal brain damage, LeCun et al. 1990 (no arXiv id), with the diagonal of the Hessian taken from squared
    gradients as in Theis et al. 2018, arXiv:1801.05787. Scores compare between groups as they are.

    Args:
        group: The members of a group, with their squares.

    Returns:
        Shape (units,).

    Example:
        >>> hessian([Member("a", 0, torch.tensor([[2.0], [1.0]]), square=torch.tensor([[1.0], [3.0]]))])
        tensor([2.0000, 1.5000])
    """
    sums = [(member.square * member.weight.square()).sum(1) for member in group if member.square is not None]
    return 0.5 * torch.stack(sums).sum(0)


def has_gradient(group: Sequence[Member]) -> bool:
    """Say whether any weight of the units has been given a gradient."""
    return any(member.product is not None for member in group)
