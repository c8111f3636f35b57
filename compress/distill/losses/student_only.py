"""Losses in which the student teaches itself or is aligned with itself: exits, source and target domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.distill import functional as F
from compress.distill.lesson import Lesson, View, pick
from compress.distill.losses.base import DistillationLoss, FindLayers, check_positive
from compress.distill.tasks import hard_target
from compress.distill.weights import WeightSchedule
from compress.errors import DataError, RecipeError
from compress.surgery.slicing import Slices

__all__ = ["CorrelationAlignment", "Exits", "MaximumMeanDiscrepancy"]


class _OnStudent(DistillationLoss):
    """Base of losses that look at activations of the student alone."""

    needs_teacher = False

    def __init__(self, layers: Sequence[str], weight: float, schedule: WeightSchedule | None = None) -> None:
        super().__init__(weight, schedule)
        if not layers:
            raise RecipeError("distill.losses.layers: expected names of student layers, got none. Name at least one.")
        self.named = list(layers)
        self.found: list[str] = []

    def resolve(self, student: FindLayers, teacher: FindLayers) -> None:
        """Look up the layers."""
        self.found = [name for pattern in self.named for name in student(pattern)]

    def layers(self) -> tuple[Sequence[str], Sequence[str]]:
        """Return the names of the activations needed."""
        return self.found, ()


class Exits(_OnStudent):
    """Classifiers on inner layers, taught by labels and by the last layer (Zhang et al. 2019, arXiv:1905.08094).

    The student's own depth teaches its shallow part; the classifiers are no part of the student.

    Args:
        layers: Student layers that get a classifier.
        soft: Share of the last layer's softened answers in each exit's loss, in [0, 1]; labels have the rest.
        temperature: Of these answers; above 0.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.

    Raises:
        RecipeError: when a value is out of range.
    """

    def __init__(
        self,
        layers: Sequence[str],
        soft: float = 0.5,
        temperature: float = 3.0,
        weight: float = 0.3,
        schedule: WeightSchedule | None = None,
    ) -> None:
        super().__init__(layers, weight, schedule)
        check_positive("temperature", temperature)
        if not 0 <= soft <= 1:
            raise RecipeError(f"distill.losses.soft: expected a value in [0, 1], got {soft}. Use 0.5, say.")
        self.soft, self.temperature = soft, temperature
        self.heads = nn.ModuleDict()

    def build(self, student: View, teacher: View, teacher_network: nn.Module | None) -> None:
        """Make a classifier for each layer."""
        num_classes = pick(student.outputs).shape[-1]
        for number, name in enumerate(self.found):
            self.heads[str(number)] = nn.Linear(_pooled(student.features[name]).shape[1], num_classes)

    def shrink(self, kept: Mapping[str, Sequence[int]]) -> Slices:
        """Keep the classifiers' inputs that the student keeps."""
        return {f"heads.{number}.weight": {"1": kept[name]} for number, name in enumerate(self.found) if name in kept}

    def forward(self, lesson: Lesson) -> Tensor:
        """Return the mean over exits."""
        last = pick(lesson.student.outputs).detach()
        values = []
        for number, name in enumerate(self.found):
            logits = self.heads[str(number)](_pooled(lesson.student.features[name]))
            value = self.soft * F.soft_target(logits, last, temperature=self.temperature)
            if lesson.targets is not None:
                value = value + (1 - self.soft) * hard_target(logits, lesson.targets)
            values.append(value)
        return torch.stack(values).mean()


class MaximumMeanDiscrepancy(_OnStudent):
    """Distance between a source and a target domain in the student's activations (Gretton et al. 2012, JMLR 13).

    For a teacher that knows one domain and data from another (Long et al. 2015, arXiv:1502.02791). Batches are
    ``{"source": batch, "target": batch}``.

    Args:
        layers: Student layers whose activations shall be alike in both domains.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    def __init__(self, layers: Sequence[str], weight: float = 1.0, schedule: WeightSchedule | None = None) -> None:
        super().__init__(layers, weight, schedule)

    def forward(self, lesson: Lesson) -> Tensor:
        """Return the mean over layers.

        Raises:
            DataError: when the batch does not say which rows are from which domain.
        """
        return torch.stack([F.maximum_mean_discrepancy(*pair) for pair in _domains(self, lesson)]).mean()


class CorrelationAlignment(_OnStudent):
    """Distance between the covariances of two domains in the student's activations (Sun and Saenko 2016).

    Source: arXiv:1607.01719. Batches are ``{"source": batch, "target": batch}``.

    Args:
        layers: Student layers whose activations shall be alike in both domains.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    def __init__(self, layers: Sequence[str], weight: float = 1.0, schedule: WeightSchedule | None = None) -> None:
        super().__init__(layers, weight, schedule)

    def forward(self, lesson: Lesson) -> Tensor:
        """Return the mean over layers.

        Raises:
            DataError: when the batch does not say which rows are from which domain.
        """
        return torch.stack([F.correlation_alignment(*pair) for pair in _domains(self, lesson)]).mean()


def _domains(loss: _OnStudent, lesson: Lesson) -> list[tuple[Tensor, Tensor]]:
    if lesson.source is None:
        raise DataError(
            f"batch: expected {{'source': batch, 'target': batch}} for {type(loss).__name__}, got one domain. "
            "Give Lightning a CombinedLoader or a dict of loaders with these names."
        )
    features = [_pooled(lesson.student.features[name]) for name in loss.found]
    return [(flat[lesson.source], flat[~lesson.source]) for flat in features]


def _pooled(features: Tensor) -> Tensor:
    """Return (N, C) of (N, C, ...); of tokens (N, L, D) the mean over L."""
    if features.dim() == 3:
        return features.mean(1)
    return features.flatten(2).mean(2) if features.dim() > 3 else features
