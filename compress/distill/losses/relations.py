"""Losses between relations of the samples of a batch; the formulas are in ``distill.functional``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from compress.distill import functional as F
from compress.distill.lesson import Lesson
from compress.distill.losses.base import FeatureLoss
from compress.distill.weights import WeightSchedule

__all__ = ["CorrelationCongruence", "ProbabilisticTransfer", "RelationalAngle", "RelationalDistance"]


class RelationalDistance(FeatureLoss):
    """Distances between the samples of a batch (RKD-D, Park et al. 2019, arXiv:1904.05068).

    Args:
        layers: Student layer to teacher layer; embeddings, as those before the classifier.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    def __init__(self, layers: Mapping[str, str], weight: float = 25.0, schedule: WeightSchedule | None = None) -> None:
        super().__init__(layers, weight, schedule)

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:
        """Return the loss of embeddings (N, ...)."""
        return F.relational_distance(student, teacher)


class RelationalAngle(FeatureLoss):
    """Angles between triplets of a batch (RKD-A, Park et al. 2019, arXiv:1904.05068); memory grows with N³.

    Args:
        layers: Student layer to teacher layer; embeddings, as those before the classifier.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    def __init__(self, layers: Mapping[str, str], weight: float = 50.0, schedule: WeightSchedule | None = None) -> None:
        super().__init__(layers, weight, schedule)

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:
        """Return the loss of embeddings (N, ...)."""
        return F.relational_angle(student, teacher)


class CorrelationCongruence(FeatureLoss):
    """Correlation between the samples of a batch under a Gaussian kernel (Peng et al. 2019, arXiv:1904.01802).

    Args:
        layers: Student layer to teacher layer; embeddings, as those before the classifier.
        gamma: Of the kernel.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    def __init__(
        self,
        layers: Mapping[str, str],
        gamma: float = 0.4,
        weight: float = 100.0,
        schedule: WeightSchedule | None = None,
    ) -> None:
        super().__init__(layers, weight, schedule)
        self.gamma = gamma

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:
        """Return the loss of embeddings (N, ...)."""
        return F.correlation_congruence(student, teacher, gamma=self.gamma)


class ProbabilisticTransfer(FeatureLoss):
    """Which samples are neighbours, as probabilities (PKT, Passalis and Tefas 2018, arXiv:1803.10837).

    Args:
        layers: Student layer to teacher layer; embeddings, as those before the classifier.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    def __init__(
        self, layers: Mapping[str, str], weight: float = 30000.0, schedule: WeightSchedule | None = None
    ) -> None:
        super().__init__(layers, weight, schedule)

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:
        """Return the loss of embeddings (N, ...)."""
        return F.probabilistic_transfer(student, teacher)
