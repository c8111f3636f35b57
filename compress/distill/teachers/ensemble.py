"""Several teachers as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.distill.lesson import pick
from compress.errors import DataError, RecipeError

__all__ = ["Ensemble", "confidence_weights"]

_NO_LABEL = -100


class Ensemble(nn.Module):
    """Several teachers, weighted the same for all samples or by how well each knows a sample.

    Losses between outputs are summed over teachers by these weights; losses between activations look at the first
    teacher. Called as a network, it gives the weighted mean of the teachers' outputs.

    Args:
        teachers: Networks with the same classes.
        weights: Weight of each; equal ones by default. They are brought to a sum of 1.
        weighting: ``"fixed"``, or ``"confidence"`` for weights from each sample's label (``confidence_weights``).

    Raises:
        RecipeError: when there are no teachers, or weights do not fit.

    Example:
        >>> Ensemble([nn.Linear(2, 3), nn.Linear(2, 3)])(torch.zeros(4, 2)).shape
        torch.Size([4, 3])
    """

    fixed: Tensor

    def __init__(
        self, teachers: Sequence[nn.Module], weights: Sequence[float] | None = None, weighting: str = "fixed"
    ) -> None:
        super().__init__()
        given = list(weights) if weights is not None else [1.0] * len(teachers)
        if not teachers:
            raise RecipeError("teacher.teachers: expected at least one network, got none. Name some.")
        if len(given) != len(teachers) or min(given) < 0 or sum(given) <= 0:
            raise RecipeError(
                f"teacher.weights: expected {len(teachers)} values of at least 0, not all 0, got {given}. "
                "Give one for each teacher, or leave them out."
            )
        if weighting not in ("fixed", "confidence"):
            raise RecipeError(f"teacher.weighting: expected fixed or confidence, got {weighting!r}. Choose one.")
        self.teachers = nn.ModuleList(teachers)
        self.weighting = weighting
        self.register_buffer("fixed", torch.tensor(given) / sum(given), persistent=False)

    def each(self, *inputs: Tensor, **named: Tensor) -> list[Any]:
        """Return what each teacher answers."""
        return [teacher(*inputs, **named) for teacher in self.teachers]

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Return the weighted mean of the outputs, (N, ...)."""
        outputs = [pick(answer) for answer in self.each(*inputs, **named)]
        return torch.stack([weight * answer for weight, answer in zip(self.fixed, outputs)]).sum(0)

    def sample_weights(self, answers: Sequence[Any], targets: Any) -> Tensor:
        """Return the weight of each of K teachers for each of N samples, shape (K, N); columns sum to 1.

        Raises:
            DataError: when teachers are weighted by confidence and targets are no classes (N,).
        """
        outputs = [pick(answer) for answer in answers]
        if self.weighting == "fixed":
            return self.fixed.to(outputs[0].device)[:, None].expand(-1, len(outputs[0]))
        if targets is not None and (not isinstance(targets, Tensor) or targets.dim() != 1):
            raise DataError(
                "batch: expected one class a sample for teachers weighted by confidence, got other targets. "
                "Set teacher.weighting to fixed."
            )
        return confidence_weights(outputs, targets)


def confidence_weights(outputs: Sequence[Tensor], targets: Tensor | None) -> Tensor:
    r"""Weigh teachers by their cross-entropy against a sample's label.

    .. math:: w_k = \frac{1}{K - 1} \left(1 - \frac{\exp(L_k)}{\sum_j \exp(L_j)}\right)

    Zhang et al. 2022 (CA-MKD), arXiv:2201.00007, equation 3. Samples without a label weigh all teachers the same.

    Args:
        outputs: Logits of each of K teachers, shape (N, C).
        targets: Classes, integers of shape (N,), -100 for none; or none at all.

    Returns:
        Weights, shape (K, N); columns sum to 1.

    Example:
        >>> sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> confidence_weights([sure, unsure], torch.tensor([0])).T
        tensor([[0.6666, 0.3334]])
    """
    num, first = len(outputs), outputs[0]
    equal = torch.full((num, len(first)), 1 / num, device=first.device)
    if targets is None or num == 1:
        return equal
    errors = torch.stack(
        [F.cross_entropy(o.float(), targets, ignore_index=_NO_LABEL, reduction="none") for o in outputs]
    )
    weights = (1 - errors.softmax(0)) / (num - 1)
    return torch.where(targets == _NO_LABEL, equal, weights)
