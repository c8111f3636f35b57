"""Formulas between what a student and a teacher answer, computed in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.distill.functional.precision import check_same_shape, full_precision, weighted_mean

__all__ = [
    "bounded_regression",
    "decoupled",
    "dist",
    "logit_mse",
    "multi_label",
    "soft_labels",
    "soft_target",
    "standardized_soft_target",
]

_NO_LABEL = -100


def soft_target(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, sample_weights: Tensor | None = None
) -> Tensor:
    r"""Compare softened class probabilities.

    .. math:: L = T^2 \, KL(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T))

    Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2. The factor T² keeps the size of the gradients
    independent of the temperature.

    Args:
        student: Logits s, shape (N, C).
        teacher: Logits t, shape (N, C).
        temperature: T > 0; higher softens more.
        sample_weights: Factor of each sample's loss, shape (N,).

    Returns:
        Scalar mean over N, in nats.

    Raises:
        RecipeError: when the shapes differ.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> soft_target(logits, logits)
        tensor(0.)
        >>> soft_target(logits, logits.flip(1), temperature=1.0)
        tensor(1.1504)
    """
    check_same_shape("soft_target", student, teacher)
    student, teacher = full_precision(student, teacher)
    return temperature**2 * weighted_mean(_divergence(student / temperature, teacher / temperature), sample_weights)


def standardized_soft_target(
    student: Tensor, teacher: Tensor, *, temperature: float = 2.0, sample_weights: Tensor | None = None
) -> Tensor:
    r"""Compare softened probabilities of logits that were brought to mean 0 and deviation 1 for each sample.

    .. math:: L = T^2 \, KL(\mathrm{softmax}(Z(t) / T) \,\|\, \mathrm{softmax}(Z(s) / T)), \quad
              Z(x) = (x - \bar x) / \sigma(x)

    Sun et al. 2024, arXiv:2403.01427, algorithms 1 and 2. The student need not reach the teacher's scale of logits.

    Args:
        student: Logits s, shape (N, C).
        teacher: Logits t, shape (N, C).
        temperature: T > 0.
        sample_weights: Factor of each sample's loss, shape (N,).

    Returns:
        Scalar mean over N, in nats.

    Raises:
        RecipeError: when the shapes differ.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> standardized_soft_target(logits, 10 * logits + 3).abs() < 1e-6
        tensor(True)
    """
    check_same_shape("standardized_soft_target", student, teacher)
    student, teacher = (_standardize(logits) / temperature for logits in full_precision(student, teacher))
    return temperature**2 * weighted_mean(_divergence(student, teacher), sample_weights)


def decoupled(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    sample_weights: Tensor | None = None,
) -> Tensor:
    r"""Compare the target class with all others, and the others among themselves, each with its own weight.

    .. math:: L = T^2 \, (\alpha \, KL(b^t \| b^s) + \beta \, KL(\hat p^t \| \hat p^s))

    b = (p_y, 1 - p_y) for the target class y, and p̂ the probabilities of the other classes, normalised to a sum of 1.
    Zhao et al. 2022, arXiv:2203.08679, equation 7; T² as in the authors' experiments. With α = 1 and β = 1 - p_y of the
    teacher this is ``soft_target``.

    Args:
        student: Logits s, shape (N, C).
        teacher: Logits t, shape (N, C).
        targets: Classes y, integers of shape (N,); where it is -100, the teacher's most probable class.
        alpha: Weight of the target class.
        beta: Weight of the others.
        temperature: T > 0.
        sample_weights: Factor of each sample's loss, shape (N,).

    Returns:
        Scalar mean over N, in nats.

    Raises:
        RecipeError: when the shapes differ.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> decoupled(logits, logits.flip(1), torch.tensor([2]), alpha=0.0, beta=1.0, temperature=1.0)
        tensor(0.4621)
    """
    check_same_shape("decoupled", student, teacher)
    student, teacher = (logits / temperature for logits in full_precision(student, teacher))
    targets = torch.where(targets == _NO_LABEL, teacher.argmax(1), targets)[:, None]
    others = torch.arange(student.shape[1] - 1, device=student.device)[None].expand(len(student), -1)
    others = others + (others >= targets).long()
    student_others, teacher_others = student.gather(1, others), teacher.gather(1, others)
    # Logits of "the target" and "any other": their softmax is the binary distribution, without leaving log space.
    binary = _divergence(_binary(student, student_others, targets), _binary(teacher, teacher_others, targets))
    value = alpha * binary + beta * _divergence(student_others, teacher_others)
    return temperature**2 * weighted_mean(value, sample_weights)


def dist(
    student: Tensor, teacher: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    r"""Compare probabilities by correlation, over the classes of a sample and over the samples of a class.

    .. math:: L = T^2 \, (\beta \, \tfrac{1}{N} \sum_n (1 - \rho(p^s_{n:}, p^t_{n:}))
              + \gamma \, \tfrac{1}{C} \sum_c (1 - \rho(p^s_{:c}, p^t_{:c})))

    ρ is Pearson's correlation. Huang et al. 2022, arXiv:2205.10536, equations 8 to 10; T² as in ``soft_target``.

    Args:
        student: Logits s, shape (N, C).
        teacher: Logits t, shape (N, C).
        beta: Weight of the relation between classes.
        gamma: Weight of the relation within a class; it needs N > 1.
        temperature: T > 0.

    Returns:
        Scalar.

    Raises:
        RecipeError: when the shapes differ.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
        >>> dist(logits, logits).round(decimals=5)
        tensor(0.)
    """
    check_same_shape("dist", student, teacher)
    student, teacher = (logits.div(temperature).softmax(1) for logits in full_precision(student, teacher))
    between, within = _correlation(student, teacher), _correlation(student.T, teacher.T)
    return temperature**2 * (beta * (1 - between).mean() + gamma * (1 - within).mean())


def logit_mse(student: Tensor, teacher: Tensor, *, sample_weights: Tensor | None = None) -> Tensor:
    r"""Compare logits by squared distance.

    .. math:: L = \tfrac{1}{C} \, \|s - t\|_2^2

    Kim et al. 2021, arXiv:2105.08919, section 3.2; divided by the number of classes.

    Args:
        student: Logits s, shape (N, C).
        teacher: Logits t, shape (N, C).
        sample_weights: Factor of each sample's loss, shape (N,).

    Returns:
        Scalar mean over N.

    Raises:
        RecipeError: when the shapes differ.

    Example:
        >>> logit_mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(2.)
    """
    check_same_shape("logit_mse", student, teacher)
    student, teacher = full_precision(student, teacher)
    return weighted_mean((student - teacher).square(), sample_weights)


def soft_labels(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, sample_weights: Tensor | None = None
) -> Tensor:
    r"""Take the teacher's probabilities for labels: cross-entropy against them.

    .. math:: L = - \sum_c \mathrm{softmax}(t / T)_c \, \log \mathrm{softmax}(s)_c

    Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2, with the temperature on the teacher alone: the student's
    probabilities are those that it is used with.

    Args:
        student: Logits s, shape (N, C).
        teacher: Logits t, shape (N, C).
        temperature: T > 0, of the teacher.
        sample_weights: Factor of each sample's loss, shape (N,).

    Returns:
        Scalar mean over N, in nats; its least value is the entropy of the teacher's probabilities.

    Raises:
        RecipeError: when the shapes differ.

    Example:
        >>> soft_labels(torch.zeros(1, 4), torch.tensor([[9.0, 0.0, 0.0, 0.0]]))
        tensor(1.3863)
    """
    check_same_shape("soft_labels", student, teacher)
    student, teacher = full_precision(student, teacher)
    value = -(teacher.div(temperature).softmax(-1) * student.log_softmax(-1)).sum(-1)
    return weighted_mean(value, sample_weights)


def multi_label(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, sample_weights: Tensor | None = None
) -> Tensor:
    r"""Compare the probability of each label by itself, for samples that may have several.

    .. math:: L = T^2 \sum_c KL([\sigma(t_c / T), 1 - \sigma(t_c / T)] \,\|\, [\sigma(s_c / T), 1 - \sigma(s_c / T)])

    Yang et al. 2023, arXiv:2308.06453, equation 3 (multi-label logits distillation).

    Args:
        student: Logits s, shape (N, C).
        teacher: Logits t, shape (N, C).
        temperature: T > 0.
        sample_weights: Factor of each sample's loss, shape (N,).

    Returns:
        Scalar mean over N, in nats.

    Raises:
        RecipeError: when the shapes differ.

    Example:
        >>> multi_label(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(0.)
    """
    check_same_shape("multi_label", student, teacher)
    student, teacher = (logits / temperature for logits in full_precision(student, teacher))
    present = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    absent = teacher.neg().sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return temperature**2 * weighted_mean((present + absent).sum(-1), sample_weights)


def bounded_regression(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor | None = None,
    *,
    margin: float = 0.0,
    sample_weights: Tensor | None = None,
) -> Tensor:
    r"""Count a student's error only where it is not better than the teacher's by a margin.

    .. math:: L = \|s - y\|^2 \text{ if } \|s - y\|^2 + m > \|t - y\|^2 \text{ else } 0

    Chen et al. 2017, Learning Efficient Object Detection Models with Knowledge Distillation (NeurIPS), equation 4.
    Where y is unknown, the teacher's numbers stand in for it: ``‖s - t‖²``. ``‖·‖²`` is the mean over a sample's
    numbers.

    Args:
        student: Numbers s, shape (N, ...).
        teacher: Numbers t, shape (N, ...).
        targets: Numbers y, shape (N, ...); NaN is unknown, and without any all are.
        margin: m of at least 0.
        sample_weights: Factor of each sample's loss, shape (N,).

    Returns:
        Scalar mean over N.

    Raises:
        RecipeError: when the shapes differ.

    Example:
        >>> bounded_regression(torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor([[0.0]]))
        tensor(0.)
    """
    check_same_shape("bounded_regression", student, teacher)
    student, teacher = (numbers.flatten(1) for numbers in full_precision(student, teacher))
    if targets is None:
        return weighted_mean((student - teacher).square(), sample_weights)
    targets = targets.to(student).view_as(student)
    known = ~targets.isnan().any(1)
    goal = torch.where(known[:, None], targets, teacher)
    error, bound = (student - goal).square().mean(1), (teacher - goal).square().mean(1)
    return weighted_mean(error * ((error + margin > bound) | ~known), sample_weights)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)) of each row."""
    log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)


def _standardize(logits: Tensor) -> Tensor:
    centred = logits - logits.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True).sqrt() + 1e-7)


def _binary(logits: Tensor, others: Tensor, targets: Tensor) -> Tensor:
    return torch.cat([logits.gather(1, targets), others.logsumexp(1, keepdim=True)], dim=1)


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return Pearson's correlation of each row."""
    return F.cosine_similarity(first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True), eps=1e-12)
