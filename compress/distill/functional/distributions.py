"""Formulas between distributions: of activations given others, of embeddings among others, of two domains."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.distill.functional.precision import check_same_shape, full_precision

__all__ = ["correlation_alignment", "maximum_mean_discrepancy", "noise_contrastive", "variational"]

_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def variational(teacher: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    r"""Return the negative log-likelihood of the teacher's activations under Gaussians that the student predicts.

    .. math:: L = \overline{\log \sigma_c + \frac{(t - \mu)^2}{2 \sigma_c^2}}

    Ahn et al. 2019 (VID), arXiv:1904.05835, equation 6, without its constant; the mean over elements.

    Args:
        teacher: Activations t, shape (N, C, ...).
        mean: Predictions μ, of the same shape.
        variance: σ² of each channel, above 0, shape (C,).

    Returns:
        Scalar mean, in nats.

    Raises:
        RecipeError: when the shapes differ.

    Example:
        >>> variational(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(2))
        tensor(0.5000)
    """
    check_same_shape("variational", mean, teacher)
    mean, teacher, variance = full_precision(mean, teacher, variance)
    variance = variance.view(-1, *[1] * (mean.dim() - 2))
    return 0.5 * (variance.log() + (teacher - mean).square() / variance).mean()


def noise_contrastive(positive: Tensor, negative: Tensor, *, num_samples: int) -> Tensor:
    r"""Tell each sample's own score from those of K others.

    .. math:: L = - \log h(p) - \sum_k \log (1 - h(n_k)), \quad h(x) = \frac{x}{x + K / M}

    Tian et al. 2020 (CRD), arXiv:1910.10699, equations 11 and 19.

    Args:
        positive: Normalised scores p > 0 of the same sample, shape (N,).
        negative: Scores n of others, shape (N, K).
        num_samples: M, samples that others are drawn from.

    Returns:
        Scalar mean over N, in nats.

    Example:
        >>> noise_contrastive(torch.ones(1), torch.zeros(1, 4), num_samples=4)
        tensor(0.6931)
    """
    positive, negative = full_precision(positive, negative)
    ratio = negative.shape[1] / num_samples
    own = (positive / (positive + ratio)).clamp(min=1e-12).log()
    others = (ratio / (negative + ratio)).log().sum(1)
    return -(own + others).mean()


def maximum_mean_discrepancy(source: Tensor, target: Tensor) -> Tensor:
    r"""Return the squared distance between two sets of embeddings in a kernel's space.

    .. math:: L = \overline{k(s, s')} + \overline{k(t, t')} - 2 \, \overline{k(s, t)}

    Gretton et al. 2012, JMLR 13, equation 5 (biased). k is the mean of five Gaussian kernels with bandwidths ¼ to 4
    times the mean squared distance, as in Long et al. 2015, arXiv:1502.02791.

    Args:
        source: Embeddings, shape (N, D).
        target: Embeddings, shape (M, D).

    Returns:
        Scalar of at least 0.

    Example:
        >>> x = torch.randn(4, 3)
        >>> maximum_mean_discrepancy(x, x).abs().round(decimals=6)
        tensor(0.)
    """
    source, target = full_precision(source, target)
    rows = torch.cat([source, target])
    distance = (rows[:, None] - rows[None]).square().sum(-1)
    bandwidth = distance.mean().clamp(min=1e-12)
    kernel = torch.stack([torch.exp(-distance / (factor * bandwidth)) for factor in _BANDWIDTHS]).mean(0)
    num = len(source)
    return kernel[:num, :num].mean() + kernel[num:, num:].mean() - 2 * kernel[:num, num:].mean()


def correlation_alignment(source: Tensor, target: Tensor) -> Tensor:
    r"""Return the distance between the covariances of two sets of embeddings.

    .. math:: L = \frac{1}{4 D^2} \|C_s - C_t\|_F^2

    Sun and Saenko 2016 (Deep CORAL), arXiv:1607.01719, equations 1 to 3.

    Args:
        source: Embeddings, shape (N, D), N > 1.
        target: Embeddings, shape (M, D), M > 1.

    Returns:
        Scalar.

    Example:
        >>> x = torch.randn(4, 3)
        >>> correlation_alignment(x, x + 5).round(decimals=6)
        tensor(0.)
    """
    ours, theirs = (_covariance(rows) for rows in full_precision(source, target))
    return (ours - theirs).square().mean() / 4


def _covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0)
    return centred.T @ centred / max(1, len(rows) - 1)
