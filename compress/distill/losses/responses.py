"""Losses between what the student and its teachers answer; the formulas are in ``distill.functional``."""

from __future__ import annotations

from torch import Tensor

from compress.distill import functional as F
from compress.distill.lesson import Lesson
from compress.distill.losses.base import ResponseLoss, check_positive
from compress.distill.weights import WeightSchedule
from compress.errors import RecipeError

__all__ = [
    "DIST",
    "BoundedRegression",
    "DecoupledSoftTarget",
    "LogitMSE",
    "MultiLabelSoftTarget",
    "SoftLabels",
    "SoftTarget",
    "StandardizedSoftTarget",
    "TokenSoftTarget",
]


class _Softened(ResponseLoss):
    def __init__(
        self,
        temperature: float,
        weight: float,
        schedule: WeightSchedule | None = None,
        output: str | None = None,
    ) -> None:
        super().__init__(weight, schedule, output)
        check_positive("temperature", temperature)
        self.temperature = temperature


class SoftTarget(_Softened):
    """Softened class probabilities of the teacher as targets (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        temperature: Softens both distributions; above 0.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
        output: Which output, where the networks return several.

    Raises:
        RecipeError: when a value is out of range.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        weight: float = 0.9,
        schedule: WeightSchedule | None = None,
        output: str | None = None,
    ) -> None:
        super().__init__(temperature, weight, schedule, output)

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson, sample_weights: Tensor | None) -> Tensor:
        """Return the loss of logits (N, C)."""
        return F.soft_target(student, teacher, temperature=self.temperature, sample_weights=sample_weights)


class StandardizedSoftTarget(_Softened):
    """Soft targets of logits that were standardised first, so that their scale does not matter (Sun et al. 2024).

    Source: arXiv:2403.01427.

    Args:
        temperature: Softens both distributions; above 0.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
        output: Which output, where the networks return several.

    Raises:
        RecipeError: when a value is out of range.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        weight: float = 0.9,
        schedule: WeightSchedule | None = None,
        output: str | None = None,
    ) -> None:
        super().__init__(temperature, weight, schedule, output)

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson, sample_weights: Tensor | None) -> Tensor:
        """Return the loss of logits (N, C)."""
        return F.standardized_soft_target(student, teacher, temperature=self.temperature, sample_weights=sample_weights)


class DecoupledSoftTarget(_Softened):
    """Soft targets taken apart into the target class and the others (DKD, Zhao et al. 2022, arXiv:2203.08679).

    Args:
        alpha: Weight of the target class against all others; 0 or more.
        beta: Weight of the others among themselves; 0 or more.
        temperature: Softens both distributions; above 0.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
        output: Which output, where the networks return several.

    Raises:
        RecipeError: when a value is out of range.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        weight: float = 0.5,
        schedule: WeightSchedule | None = None,
        output: str | None = None,
    ) -> None:
        super().__init__(temperature, weight, schedule, output)
        if min(alpha, beta) < 0:
            raise RecipeError(
                f"distill.losses.alpha, beta: expected 0 or more, got {alpha} and {beta}. Use 1 and 8, say."
            )
        self.alpha, self.beta = alpha, beta

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson, sample_weights: Tensor | None) -> Tensor:
        """Return the loss of logits (N, C)."""
        return F.decoupled(
            student,
            teacher,
            _targets(lesson, self.output, student),
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            sample_weights=sample_weights,
        )


class DIST(_Softened):
    """Correlation instead of equality, between classes and within them (Huang et al. 2022, arXiv:2205.10536).

    Args:
        beta: Weight of the relation between the classes of a sample.
        gamma: Weight of the relation between the samples of a class.
        temperature: Softens both distributions; above 0.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
        output: Which output, where the networks return several.

    Raises:
        RecipeError: when a value is out of range.
    """

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        weight: float = 0.5,
        schedule: WeightSchedule | None = None,
        output: str | None = None,
    ) -> None:
        super().__init__(temperature, weight, schedule, output)
        self.beta, self.gamma = beta, gamma

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson, sample_weights: Tensor | None) -> Tensor:
        """Return the loss of logits (N, C); a relation over the batch has one weight a teacher, the mean."""
        value = F.dist(student, teacher, beta=self.beta, gamma=self.gamma, temperature=self.temperature)
        return value if sample_weights is None else value * sample_weights.mean()


class LogitMSE(ResponseLoss):
    """Squared distance of logits (Kim et al. 2021, arXiv:2105.08919).

    Args:
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
        output: Which output, where the networks return several.
    """

    def __init__(self, weight: float = 0.5, schedule: WeightSchedule | None = None, output: str | None = None) -> None:
        super().__init__(weight, schedule, output)

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson, sample_weights: Tensor | None) -> Tensor:
        """Return the loss of logits (N, C)."""
        return F.logit_mse(student, teacher, sample_weights=sample_weights)


class SoftLabels(_Softened):
    """The teacher's probabilities as labels: training without any (Ba and Caruana 2014, arXiv:1312.6184).

    Args:
        temperature: Softens the teacher's probabilities; above 0.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
        output: Which output, where the networks return several.

    Raises:
        RecipeError: when a value is out of range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        weight: float = 1.0,
        schedule: WeightSchedule | None = None,
        output: str | None = None,
    ) -> None:
        super().__init__(temperature, weight, schedule, output)

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson, sample_weights: Tensor | None) -> Tensor:
        """Return the loss of logits (N, C)."""
        return F.soft_labels(student, teacher, temperature=self.temperature, sample_weights=sample_weights)


class MultiLabelSoftTarget(_Softened):
    """Soft targets of each label by itself, for samples with several (Yang et al. 2023, arXiv:2308.06453).

    Args:
        temperature: Softens both distributions; above 0.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
        output: Which output, where the networks return several.

    Raises:
        RecipeError: when a value is out of range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        weight: float = 0.5,
        schedule: WeightSchedule | None = None,
        output: str | None = None,
    ) -> None:
        super().__init__(temperature, weight, schedule, output)

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson, sample_weights: Tensor | None) -> Tensor:
        """Return the loss of logits (N, C), one binary decision each."""
        return F.multi_label(student, teacher, temperature=self.temperature, sample_weights=sample_weights)


class BoundedRegression(ResponseLoss):
    """Learn from the teacher's numbers where the student is not yet better than the teacher (Chen et al. 2017).

    Source: Learning Efficient Object Detection Models with Knowledge Distillation, NeurIPS 2017, equation 4.

    Args:
        margin: How much better than the teacher the student must be to be left alone; 0 or more.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
        output: Which output, where the networks return several.

    Raises:
        RecipeError: when a value is out of range.
    """

    def __init__(
        self,
        margin: float = 0.0,
        weight: float = 0.5,
        schedule: WeightSchedule | None = None,
        output: str | None = None,
    ) -> None:
        super().__init__(weight, schedule, output)
        if margin < 0:
            raise RecipeError(f"distill.losses.margin: expected 0 or more, got {margin}. Use 0, say.")
        self.margin = margin

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson, sample_weights: Tensor | None) -> Tensor:
        """Return the loss of numbers (N, ...)."""
        targets = lesson.targets[self.output] if isinstance(lesson.targets, dict) else lesson.targets
        return F.bounded_regression(student, teacher, targets, margin=self.margin, sample_weights=sample_weights)


class TokenSoftTarget(_Softened):
    """Soft targets of every token of a sequence; padding does not count.

    Source: Kim and Rush 2016, arXiv:1606.07947, section 3.1 (word-level).

    Args:
        temperature: Softens both distributions; above 0.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
        output: Which output, where the networks return several.

    Raises:
        RecipeError: when a value is out of range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        weight: float = 0.5,
        schedule: WeightSchedule | None = None,
        output: str | None = None,
    ) -> None:
        super().__init__(temperature, weight, schedule, output)

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson, sample_weights: Tensor | None) -> Tensor:
        """Return the loss of logits (N, L, V); sequences of a batch share one weight a teacher, the mean."""
        value = F.token_soft_target(student, teacher, lesson.mask, temperature=self.temperature)
        return value if sample_weights is None else value * sample_weights.mean()


def _targets(lesson: Lesson, output: str | None, student: Tensor) -> Tensor:
    targets = lesson.targets[output] if isinstance(lesson.targets, dict) else lesson.targets
    if targets is None:
        return student.new_full((len(student),), -100).long()
    return targets
