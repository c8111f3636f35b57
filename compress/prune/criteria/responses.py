"""Criteria that look at what units say."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.prune.criteria.activations import Activation

__all__ = ["activation_mean", "apoz", "correlation"]


def activation_mean(said: Activation) -> Tensor:
    r"""Score units by the mean magnitude of what they say.

    .. math:: I_u = \overline{|a_u|}          Molchanov et al. 2017, arXiv:1611.06440

    Args:
        said: What the units of a group have said.

    Returns:
        Shape (units,).

    Example:
        >>> activation_mean(Activation.of(torch.tensor([[1.0, 0.0], [3.0, -1.0]])))
        tensor([2.0000, 0.5000])
    """
    return said.magnitude


def apoz(said: Activation) -> Tensor:
    r"""Score units by how often they are not zero.

    .. math:: I_u = 1 - \overline{[a_u = 0]}          Hu et al. 2016, arXiv:1607.03250

    Says nothing behind activation functions that are never zero.

    Args:
        said: What the units of a group have said.

    Returns:
        Shape (units,), in [0, 1].

    Example:
        >>> apoz(Activation.of(torch.tensor([[1.0, 0.0], [3.0, -1.0]])))
        tensor([1.0000, 0.5000])
    """
    return 1 - said.zero_fraction


def correlation(said: Activation) -> Tensor:
    r"""Score units by how unlike they are to those that are left.

    Units go one at a time. Of the most alike pair that is left, that one goes whose sum of correlations with all units
    of the group is larger, and its score is

    .. math:: I_u = 1 - \max_{v \ne u \, \text{left}} |\rho_{uv}|

    so one of two equal units stays. After Singh et al. 2020, arXiv:1811.10559, who take correlations of filters and
    train between two steps; here they are those of activations. The last unit's score is 1.

    Args:
        said: What the units of a group have said, with their products.

    Returns:
        Shape (units,), in [0, 1].

    Example:
        >>> a, b = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, -2.0])
        >>> correlation(Activation.of(torch.stack([a, b, -2 * a], 1))).round(decimals=4)
        tensor([0., 1., 1.])
    """
    rho = said.correlation
    assert rho is not None, "a group with products"
    alike = rho.abs().cpu().numpy()  # many small steps, one after the other: faster outside of torch
    np.fill_diagonal(alike, -1.0)
    resemblance = alike.sum(1)
    partner = alike.argmax(1)
    nearest = alike.max(1)
    scores = torch.ones(len(alike))
    for _ in range(len(alike) - 1):
        closest = nearest.max()
        pair = np.flatnonzero(nearest >= closest - 1e-6)  # rounding must not decide between the two
        unit = pair[resemblance[pair].argmax()]
        scores[unit] = float(1 - closest)
        alike[unit], alike[:, unit], nearest[unit] = -1.0, -1.0, -1.0
        stale = np.flatnonzero((partner == unit) & (nearest >= 0))
        partner[stale] = alike[stale].argmax(1)
        nearest[stale] = alike[stale].max(1)
    return scores.to(rho.device)
