"""Formulas between relations of the samples of a batch; widths of student and teacher may differ in all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.distill.functional.precision import full_precision

__all__ = ["correlation_congruence", "probabilistic_transfer", "relational_angle", "relational_distance"]


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compare the distances between samples, relative to their mean.

    .. math:: L = \overline{l_\delta(\psi^s_{ij}, \psi^t_{ij})}_{i \ne j}, \quad
              \psi_{ij} = \|x_i - x_j\|_2 / \overline{\|x_i - x_j\|_2}

    l_δ is Huber's loss with δ = 1. Park et al. 2019 (RKD-D), arXiv:1904.05068, equations 4 to 6; the mean over pairs.

    Args:
        student: Embeddings, shape (N, ...), N > 1.
        teacher: Embeddings, shape (N, ...).

    Returns:
        Scalar mean.

    Example:
        >>> x = torch.randn(4, 3)
        >>> relational_distance(x, 2 * x).round(decimals=6)
        tensor(0.)
    """
    distances = [torch.pdist(rows.flatten(1)) for rows in full_precision(student, teacher)]
    ours, theirs = (distance / distance.mean().clamp(min=1e-12) for distance in distances)
    return F.smooth_l1_loss(ours, theirs)


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compare the angles that triplets of samples form.

    .. math:: L = \overline{l_\delta(\cos \angle^s_{ijk}, \cos \angle^t_{ijk})}, \quad
              \cos \angle_{ijk} = \langle e_{ij}, e_{kj} \rangle, \quad e_{ij} = (x_i - x_j) / \|x_i - x_j\|

    Park et al. 2019 (RKD-A), arXiv:1904.05068, equations 7 and 8; the mean over triplets of different samples. Memory
    grows with N³.

    Args:
        student: Embeddings, shape (N, ...), N > 2.
        teacher: Embeddings, shape (N, ...).

    Returns:
        Scalar mean.

    Example:
        >>> x = torch.randn(4, 3)
        >>> relational_angle(x, 2 * x).round(decimals=6)
        tensor(0.)
    """
    ours, theirs = (_angles(rows.flatten(1)) for rows in full_precision(student, teacher))
    num = len(ours)
    # Where two of the three are one sample, both sides are 0 or both are 1: nothing is added.
    return F.smooth_l1_loss(ours, theirs, reduction="sum") / max(1, num * (num - 1) * (num - 2))


def correlation_congruence(student: Tensor, teacher: Tensor, *, gamma: float = 0.4, order: int = 2) -> Tensor:
    r"""Compare the correlation of samples under a Gaussian kernel, by its Taylor series.

    .. math:: L = \tfrac{1}{N^2} \|K_s - K_t\|_F^2, \quad
              K_{ij} = \sum_{p=0}^{P} e^{-2 \gamma} \frac{(2 \gamma)^p}{p!} (x_i^\top x_j)^p

    Embeddings are normalised. Peng et al. 2019, arXiv:1904.01802, equations 7, 9 and 10.

    Args:
        student: Embeddings, shape (N, ...).
        teacher: Embeddings, shape (N, ...).
        gamma: γ of the kernel exp(-γ‖x_i - x_j‖²).
        order: P of at least 1.

    Returns:
        Scalar.

    Example:
        >>> x = torch.randn(4, 3)
        >>> correlation_congruence(x, 2 * x).round(decimals=6)
        tensor(0.)
    """
    similarities = [_cosines(rows.flatten(1)) for rows in full_precision(student, teacher)]
    terms = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]
    ours, theirs = (torch.stack([w * cos.pow(p) for p, w in enumerate(terms)]).sum(0) for cos in similarities)
    return (ours - theirs).square().mean()


def probabilistic_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compare which samples are neighbours, as probabilities.

    .. math:: L = \tfrac{1}{N} \sum_i \sum_{j \ne i} p_{j|i} \log \frac{p_{j|i}}{q_{j|i}}, \quad
              p_{j|i} = \frac{K(x_i, x_j)}{\sum_{k \ne i} K(x_i, x_k)}, \quad K(a, b) = \tfrac{1}{2} (\cos(a, b) + 1)

    p is the teacher's and q the student's. Passalis and Tefas 2018 (PKT), arXiv:1803.10837, equations 3 to 6; the mean
    over samples.

    Args:
        student: Embeddings, shape (N, ...), N > 1.
        teacher: Embeddings, shape (N, ...).

    Returns:
        Scalar mean over N, in nats.

    Example:
        >>> x = torch.randn(4, 3)
        >>> probabilistic_transfer(x, 2 * x).round(decimals=6)
        tensor(0.)
    """
    ours, theirs = (_neighbours(rows.flatten(1)) for rows in full_precision(student, teacher))
    return (theirs * (theirs.clamp(min=1e-7).log() - ours.clamp(min=1e-7).log())).sum(1).mean()


def _cosines(rows: Tensor) -> Tensor:
    rows = F.normalize(rows, dim=1)
    return rows @ rows.T


def _angles(rows: Tensor) -> Tensor:
    """Return cos of the angle at the first of three samples, shape (N, N, N)."""
    directions = F.normalize(rows[None] - rows[:, None], dim=2)
    return directions @ directions.transpose(1, 2)


def _neighbours(rows: Tensor) -> Tensor:
    kernel = (_cosines(rows) + 1) / 2
    kernel = kernel * (1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))
    return kernel / kernel.sum(1, keepdim=True).clamp(min=1e-7)
