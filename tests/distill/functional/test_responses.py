from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.distill import soft_target


def from_the_paper(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hinton et al. 2015, equation 1 and section 2.1, term by term: T² Σ p (log p - log q), averaged over samples."""
    p = (teacher.double() / temperature).exp()
    p = p / p.sum(1, keepdim=True)
    q = (student.double() / temperature).exp()
    q = q / q.sum(1, keepdim=True)
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_equals_the_paper(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    value = soft_target(student, teacher, temperature=temperature)
    assert torch.allclose(value, from_the_paper(student, teacher, temperature), rtol=1e-12)


def test_gradient() -> None:
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: soft_target(s, teacher), student)


def test_half_precision_is_computed_in_full() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(64, 10), torch.randn(64, 10)
    half = soft_target(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32
    assert torch.allclose(half, from_the_paper(student.bfloat16(), teacher.bfloat16(), 4.0).float(), rtol=1e-5)
