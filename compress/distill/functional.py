"""Distillation losses as pure functions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["soft_target"]


def soft_target(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    r"""Compare softened class probabilities.

    .. math:: L = T^2 \, KL(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T))

    Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2. The factor T² keeps the size of the gradients
    independent of the temperature.

    Args:
        student: Logits s, shape (N, C).
        teacher: Logits t, shape (N, C).
        temperature: T > 0; higher softens more.

    Returns:
        Scalar mean over N, in nats, computed in float32 at least.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> soft_target(logits, logits)
        tensor(0.)
        >>> soft_target(logits, logits.flip(1), temperature=1.0)
        tensor(1.1504)
    """
    if not student.is_floating_point() or student.element_size() < 4:
        student, teacher = student.float(), teacher.float()
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.to(student.dtype) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
