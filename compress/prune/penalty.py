"""Regularisation of doomed units before they are removed: pure functions from weights to a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["PENALTIES", "group_lasso", "growing"]


def growing(weight: Tensor, strength: float) -> Tensor:
    r"""Pull towards zero in proportion to the weight, with a strength that grows until the removal.

    .. math:: \nabla \tfrac{\lambda_t}{2} \|w\|_2^2 = \lambda_t w          Wang et al. 2021, arXiv:2012.09243

    Args:
        weight: Slices of doomed units, shape (units, elements).
        strength: lambda at this step.

    Example:
        >>> growing(torch.tensor([[2.0, 0.0]]), 0.5)
        tensor([[1., 0.]])
    """
    return strength * weight


def group_lasso(weight: Tensor, strength: float) -> Tensor:
    r"""Pull each unit towards zero with the same force, however small it is.

    .. math:: \nabla \lambda \|w_u\|_2 = \lambda w_u / \|w_u\|_2          Wen et al. 2016, arXiv:1608.03665

    Args:
        weight: Slices of doomed units, shape (units, elements).
        strength: lambda at this step.

    Example:
        >>> group_lasso(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1.0)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return strength * weight / torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(1e-12)


PENALTIES: dict[str, Callable[[Tensor, float], Tensor]] = {"growing": growing, "group_lasso": group_lasso}
