"""Distillation losses as modules that a recipe can name, each with its weight."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from compress.distill.functional import soft_target
from compress.errors import RecipeError

__all__ = ["DistillationLoss", "SoftTarget"]


class DistillationLoss(nn.Module):
    """Base of the losses between a student and a teacher.

    Args:
        weight: Factor in the total loss, in [0, 1].

    Raises:
        RecipeError: when the weight is out of range.
    """

    name: str
    """What the loss is called in logs."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise RecipeError(f"distill.losses.weight: expected a value in [0, 1], got {weight}. Use 0.9, say.")
        self.weight = weight

    @abstractmethod
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the scalar loss of a batch."""


class SoftTarget(DistillationLoss):
    """Softened class probabilities of the teacher as targets (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        temperature: Softens both distributions; above 0.
        weight: Factor in the total loss, in [0, 1].

    Raises:
        RecipeError: when a value is out of range.
    """

    name = "soft_target"

    def __init__(self, temperature: float = 4.0, weight: float = 0.9) -> None:
        super().__init__(weight)
        if temperature <= 0:
            raise RecipeError(f"distill.losses.temperature: expected a value above 0, got {temperature}. Use 4, say.")
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of logits of shape (N, C)."""
        return soft_target(student, teacher, temperature=self.temperature)
