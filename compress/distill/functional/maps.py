"""Formulas between feature maps. Students are projected to the teacher's channels before, where a formula needs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.distill.functional.precision import check_same_shape, full_precision
from compress.errors import RecipeError

__all__ = [
    "attention_transfer",
    "flow",
    "hierarchical_context",
    "hint",
    "margin_of",
    "margin_relu",
    "neuron_selectivity",
    "overhaul",
    "similarity_preserving",
]


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compare activations by squared distance.

    .. math:: L = \tfrac{1}{2} \, \overline{(s - t)^2}

    Romero et al. 2015 (FitNets), arXiv:1412.6550, equation 3, with the mean instead of the sum over elements, so that
    its weight does not depend on the size of the map.

    Args:
        student: Activations s, projected; shape (N, C, ...).
        teacher: Activations t, of the same shape.

    Returns:
        Scalar mean.

    Raises:
        RecipeError: when the shapes differ.

    Example:
        >>> hint(torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2))
        tensor(0.5000)
    """
    check_same_shape("hint", student, teacher)
    student, teacher = full_precision(student, teacher)
    return 0.5 * (student - teacher).square().mean()


def attention_transfer(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    r"""Compare where activations are large.

    .. math:: L = \overline{(Q_s / \|Q_s\|_2 - Q_t / \|Q_t\|_2)^2}, \quad Q = \sum_c |A_c|^p

    Zagoruyko and Komodakis 2017, arXiv:1612.03928, section 3.1; the mean over positions of the squared difference, as
    in the authors' experiments, instead of its norm. Channels may differ.

    Args:
        student: Maps A, shape (N, C, ...).
        teacher: Maps A, shape (N, D, ...), equally large.
        power: p > 0.

    Returns:
        Scalar mean over N and positions.

    Raises:
        RecipeError: when the sizes differ.

    Example:
        >>> x = torch.randn(2, 3, 4, 4)
        >>> attention_transfer(x, 2 * x).round(decimals=6)
        tensor(0.)
    """
    student, teacher = (_flat(maps) for maps in full_precision(student, teacher))
    attention = [F.normalize(_energy(maps, power), dim=1) for maps in (student, teacher)]
    check_same_shape("attention_transfer", *attention)
    return (attention[0] - attention[1]).square().mean()


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compare which samples of a batch look alike.

    .. math:: L = \tfrac{1}{N^2} \|\tilde G_s - \tilde G_t\|_F^2, \quad G = X X^\top

    Each row of G̃ is a row of G, normalised. Tung and Mori 2019, arXiv:1907.09682, equations 1 to 4. Shapes may differ
    in all but N.

    Args:
        student: Activations, shape (N, ...).
        teacher: Activations, shape (N, ...).

    Returns:
        Scalar.

    Example:
        >>> x = torch.randn(4, 3, 2, 2)
        >>> similarity_preserving(x, 2 * x).round(decimals=6)
        tensor(0.)
    """
    student, teacher = (maps.flatten(1) for maps in full_precision(student, teacher))
    ours, theirs = (F.normalize(rows @ rows.T, dim=1) for rows in (student, teacher))
    check_same_shape("similarity_preserving", ours, theirs)
    return (ours - theirs).square().mean()


def neuron_selectivity(student: Tensor, teacher: Tensor, *, kernel: str = "polynomial") -> Tensor:
    r"""Compare the distributions of the channels' spatial patterns by maximum mean discrepancy.

    .. math:: L = \tfrac{1}{C^2} \sum_{ij} k(s_i, s_j) + \tfrac{1}{D^2} \sum_{ij} k(t_i, t_j)
              - \tfrac{2}{CD} \sum_{ij} k(s_i, t_j)

    Channels are normalised over positions. Huang and Wang 2017, arXiv:1707.01219, equation 6 and section 4.2. The
    Gaussian kernel's bandwidth is the mean squared distance between channels of both.

    Args:
        student: Maps, shape (N, C, ...).
        teacher: Maps, shape (N, D, ...), equally large.
        kernel: ``linear`` (xᵀy), ``polynomial`` ((xᵀy)²) or ``gaussian``.

    Returns:
        Scalar mean over N.

    Raises:
        RecipeError: when the kernel is unknown.

    Example:
        >>> x = torch.randn(2, 3, 4, 4)
        >>> neuron_selectivity(x, x[:, [2, 0, 1]]).round(decimals=6).abs()
        tensor(0.)
    """
    if kernel not in _KERNELS:
        raise RecipeError(f"kernel: expected one of {', '.join(_KERNELS)}, got {kernel!r}. Use polynomial, say.")
    student, teacher = (F.normalize(_flat(maps), dim=2) for maps in full_precision(student, teacher))
    patterns = torch.cat([student, teacher], dim=1)
    values = _KERNELS[kernel](patterns)
    num = student.shape[1]
    ours, theirs = values[:, :num, :num].mean((1, 2)), values[:, num:, num:].mean((1, 2))
    return (ours + theirs - 2 * values[:, :num, num:].mean((1, 2))).mean()


def flow(student_first: Tensor, student_last: Tensor, teacher_first: Tensor, teacher_last: Tensor) -> Tensor:
    r"""Compare how the channels of one layer go with those of a deeper one.

    .. math:: L = \|G_s - G_t\|_F^2, \quad G_{ij} = \frac{1}{HW} \sum_{x} F^{first}_i(x) \, F^{last}_j(x)

    Yim et al. 2017 (FSP), CVPR, equations 1 and 2. The larger of two maps is max-pooled to the smaller one's size.

    Args:
        student_first: Maps, shape (N, C, H, W).
        student_last: Maps, shape (N, D, h, w).
        teacher_first: Maps, shape (N, C, ...).
        teacher_last: Maps, shape (N, D, ...).

    Returns:
        Scalar mean over N.

    Raises:
        RecipeError: when channels differ.

    Example:
        >>> a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)
        >>> flow(a, b, a, b)
        tensor(0.)
    """
    maps = full_precision(student_first, student_last, teacher_first, teacher_last)
    ours, theirs = _gram(maps[0], maps[1]), _gram(maps[2], maps[3])
    check_same_shape("flow", ours, theirs)
    return (ours - theirs).square().sum((1, 2)).mean()


def margin_relu(x: Tensor, margin: Tensor) -> Tensor:
    """Return max(x, margin), channel by channel (Heo et al. 2019, arXiv:1904.01866, equation 2).

    Args:
        x: Maps, shape (N, C, ...).
        margin: Shape (C,), at most 0.

    Example:
        >>> margin_relu(torch.tensor([[-2.0, 1.0]]), torch.tensor([-0.5, -0.5]))
        tensor([[-0.5000,  1.0000]])
    """
    return torch.maximum(x, margin.to(x).view(-1, *[1] * (x.dim() - 2)))


def margin_of(mean: Tensor, std: Tensor) -> Tensor:
    r"""Return the mean of the negative values of normal distributions.

    .. math:: m = E[x \mid x < 0] = \mu - \sigma \, \phi(\mu / \sigma) / \Phi(-\mu / \sigma)

    Heo et al. 2019, arXiv:1904.01866, equation 3; mean and deviation of a channel are shift and scale of the teacher's
    BatchNorm.

    Args:
        mean: μ, shape (C,).
        std: σ of at least 0, shape (C,).

    Returns:
        Margins, shape (C,), at most 0.

    Example:
        >>> margin_of(torch.zeros(1), torch.ones(1))
        tensor([-0.7979])
    """
    mu, sigma = mean.double(), std.double().clamp(min=1e-6)
    z = (mu / sigma).clamp(max=1e4)
    # In log space: far out both densities vanish, their ratio does not.
    log_ratio = -z.square() / 2 - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(-z)
    return (mu - sigma * log_ratio.exp()).clamp(max=0).to(mean)


def overhaul(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    r"""Compare activations before the ReLU; what both cut off does not count.

    .. math:: L = \sum_i \begin{cases} 0 & s_i \le \tilde t_i \le 0 \\ (s_i - \tilde t_i)^2 & \text{otherwise}
              \end{cases}, \quad \tilde t = \max(t, m)

    Heo et al. 2019, arXiv:1904.01866, equations 2 and 4.

    Args:
        student: Activations s, projected; shape (N, C, ...).
        teacher: Activations t, of the same shape.
        margin: m, shape (C,), at most 0.

    Returns:
        Scalar mean over N.

    Raises:
        RecipeError: when the shapes differ.

    Example:
        >>> overhaul(torch.tensor([[-3.0, 1.0]]), torch.tensor([[-1.0, 2.0]]), torch.tensor([-0.5, -0.5]))
        tensor(1.)
    """
    check_same_shape("overhaul", student, teacher)
    student, teacher = full_precision(student, teacher)
    goal = margin_relu(teacher, margin)
    counts = (student > goal) | (goal > 0)
    return ((student - goal).square() * counts).flatten(1).sum(1).mean()


def hierarchical_context(student: Tensor, teacher: Tensor, *, levels: Sequence[int] = (4, 2, 1)) -> Tensor:
    r"""Compare maps as they are and pooled to several sizes, each next size with half the weight.

    .. math:: L = \frac{\sum_l 2^{-l} \, \mathrm{MSE}(P_l(s), P_l(t))}{\sum_l 2^{-l}}, \quad P_0(x) = x

    Chen et al. 2021 (ReviewKD), arXiv:2104.09044, section 3.3.

    Args:
        student: Maps s, projected; shape (N, C, H, W).
        teacher: Maps t, of the same shape.
        levels: Sizes to pool to; those not below the smaller of H and W are left out.

    Returns:
        Scalar mean.

    Raises:
        RecipeError: when the shapes differ.

    Example:
        >>> hierarchical_context(torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))
        tensor(1.)
    """
    check_same_shape("hierarchical_context", student, teacher)
    student, teacher = full_precision(student, teacher)
    distances = [F.mse_loss(student, teacher)]
    for size in levels:
        if size < min(student.shape[2:]):
            ours, theirs = (F.adaptive_avg_pool2d(maps, size) for maps in (student, teacher))
            distances.append(F.mse_loss(ours, theirs))
    weights = [0.5**level for level in range(len(distances))]
    return torch.stack([w * value for w, value in zip(weights, distances)]).sum() / sum(weights)


def _energy(maps: Tensor, power: float) -> Tensor:
    return maps.square().sum(1) if power == 2 else maps.abs().pow(power).sum(1)


def _flat(maps: Tensor) -> Tensor:
    """Return (N, C, positions)."""
    return maps.flatten(2) if maps.dim() > 2 else maps[:, :, None]


def _gram(first: Tensor, last: Tensor) -> Tensor:
    if first.shape[2:] != last.shape[2:]:
        size = [min(pair) for pair in zip(first.shape[2:], last.shape[2:])]
        first, last = (F.adaptive_max_pool2d(maps, size) for maps in (first, last))
    first, last = first.flatten(2), last.flatten(2)
    return first @ last.transpose(1, 2) / first.shape[2]


def _gaussian(patterns: Tensor) -> Tensor:
    distance = (patterns[:, :, None] - patterns[:, None]).square().sum(-1)
    return torch.exp(-distance / (2 * distance.mean((1, 2), keepdim=True).clamp(min=1e-12)))


_KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda patterns: patterns @ patterns.transpose(1, 2),
    "polynomial": lambda patterns: (patterns @ patterns.transpose(1, 2)).square(),
    "gaussian": _gaussian,
}
