"""What all distillation losses have in common."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.distill.lesson import Lesson, View, pick
from compress.distill.projector import Projector, channel_dim, match_size
from compress.distill.weights import WeightSchedule
from compress.errors import RecipeError
from compress.surgery.slicing import Slices

__all__ = ["DistillationLoss", "FeatureLoss", "ResponseLoss", "check_positive"]

FindLayers = Callable[[str], Sequence[str]]


class DistillationLoss(nn.Module):
    """Base of the losses between a student and its teachers.

    Args:
        weight: Factor in the total loss, 0 or more.
        schedule: How the weight changes over training.

    Attributes:
        shares: Whether the loss stands in for labels, so that the task loss has what its weight leaves of 1.
        needs_teacher: Whether there is nothing to compare without a teacher.

    Raises:
        RecipeError: when the weight is negative.
    """

    shares = False
    needs_teacher = True

    def __init__(self, weight: float, schedule: WeightSchedule | None = None) -> None:
        super().__init__()
        if not weight >= 0:
            raise RecipeError(f"distill.losses.weight: expected 0 or more, got {weight}. Use 0.9, say.")
        self.weight = weight
        self.schedule = schedule

    @property
    def name(self) -> str:
        """What the loss is called in logs: its class in snake case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    def weight_at(self, progress: float) -> float:
        """Return the weight at a progress of training in [0, 1]."""
        return self.weight * (self.schedule.factor(progress) if self.schedule is not None else 1.0)

    def resolve(self, student: FindLayers, teacher: FindLayers) -> None:
        """Look up the layers that the loss names; the functions raise ``RecipeError`` where nothing matches."""

    def layers(self) -> tuple[Sequence[str], Sequence[str]]:
        """Return the names of the activations needed of the student and of the teacher, after ``resolve``."""
        return (), ()

    def build(self, student: View, teacher: View, teacher_network: nn.Module | None) -> None:
        """Make what the loss learns, from an example.

        Args:
            student: What the student says to two samples.
            teacher: What the first teacher says to them.
            teacher_network: The teacher, unless its outputs come from a cache.
        """

    def shrink(self, kept: Mapping[str, Sequence[int]]) -> Slices:
        """Say what to keep of the loss's parameters when channels of student layers go.

        Args:
            kept: Kept channels by layer.

        Returns:
            Slices by the names of this module's parameters.
        """
        return {}

    @abstractmethod
    def forward(self, lesson: Lesson) -> Tensor:
        """Return the scalar loss of a batch."""


class ResponseLoss(DistillationLoss):
    """Base of the losses between outputs; with several teachers, the sum over them by their weights.

    Args:
        weight: Factor in the total loss, 0 or more.
        schedule: How the weight changes over training.
        output: Which output, where the networks return several.
    """

    shares = True

    def __init__(self, weight: float, schedule: WeightSchedule | None = None, output: str | None = None) -> None:
        super().__init__(weight, schedule)
        self.output = output

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson, sample_weights: Tensor | None) -> Tensor:
        """Return the loss between two outputs.

        Args:
            student: Output of the student.
            teacher: Output of one teacher.
            lesson: Everything else about the batch.
            sample_weights: Weight of each sample, shape (N,), or none for equal weights of 1.
        """

    def forward(self, lesson: Lesson) -> Tensor:
        """Return the loss of a batch."""
        student = pick(lesson.student.outputs, self.output)
        weights = lesson.teacher_weights
        values = [
            self.compare(student, pick(view.outputs, self.output), lesson, None if weights is None else weights[number])
            for number, view in enumerate(lesson.teachers)
        ]
        return torch.stack(values).sum() if weights is not None else torch.stack(values).mean()


class FeatureLoss(DistillationLoss):
    """Base of the losses between activations: the mean over pairs of layers.

    Args:
        layers: Student layer to teacher layer. Names may hold wildcards, which must then match equally many layers.
        weight: Factor in the total loss, 0 or more.
        schedule: How the weight changes over training.

    Attributes:
        projects: Whether a learned projector brings the student's channels to the teacher's.

    Raises:
        RecipeError: when no layers are named.
    """

    projects = False

    def __init__(self, layers: Mapping[str, str], weight: float, schedule: WeightSchedule | None = None) -> None:
        super().__init__(weight, schedule)
        if not layers:
            raise RecipeError(
                f"distill.losses.layers: expected pairs 'student layer: teacher layer', got none. "
                f"Name the activations that {type(self).__name__} compares."
            )
        self.named = dict(layers)
        self.pairs: list[tuple[str, str]] = []
        self.projectors = nn.ModuleDict()

    def resolve(self, student: FindLayers, teacher: FindLayers) -> None:
        """Look up the layers."""
        self.pairs = []
        for student_pattern, teacher_pattern in self.named.items():
            ours, theirs = student(student_pattern), teacher(teacher_pattern)
            if len(ours) != len(theirs):
                raise RecipeError(
                    f"distill.losses.layers: expected {student_pattern!r} and {teacher_pattern!r} to match equally "
                    f"many layers, got {len(ours)} ({', '.join(ours)}) and {len(theirs)} ({', '.join(theirs)}). "
                    "Name the pairs one by one."
                )
            self.pairs += zip(ours, theirs)

    def layers(self) -> tuple[Sequence[str], Sequence[str]]:
        """Return the names of the activations needed."""
        return [ours for ours, _ in self.pairs], [theirs for _, theirs in self.pairs]

    def build(self, student: View, teacher: View, teacher_network: nn.Module | None) -> None:
        """Make projectors: the identity where widths agree, for the student may become narrower in mid-fit."""
        if not self.projects:
            return
        for number, (ours, theirs) in enumerate(self.pairs):
            dim = channel_dim(student.features[ours], teacher.features[theirs])
            have, want = student.features[ours].shape[dim], teacher.features[theirs].shape[dim]
            self.projectors[str(number)] = Projector(have, want, dim=dim)
            if have == want:
                self.projectors[str(number)].start_as_identity()  # type: ignore[operator]

    def shrink(self, kept: Mapping[str, Sequence[int]]) -> Slices:
        """Keep the projectors' inputs that the student keeps."""
        return {
            f"projectors.{number}.linear.weight": {"1": kept[ours]}
            for number, (ours, _) in enumerate(self.pairs)
            if ours in kept and str(number) in self.projectors
        }

    def activations(self, lesson: Lesson) -> list[tuple[Tensor, Tensor]]:
        """Return the pairs of activations, the student's projected, the larger map of each pair pooled."""
        pairs = []
        for number, (ours, theirs) in enumerate(self.pairs):
            student, teacher = lesson.student.features[ours], lesson.teachers[0].features[theirs]
            if channel_dim(student, teacher) == 1:
                student, teacher = match_size(student, teacher)
            if str(number) in self.projectors:
                student = self.projectors[str(number)](student)
            pairs.append((student, teacher))
        return pairs

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:
        """Return the loss between two activations."""
        raise NotImplementedError

    def forward(self, lesson: Lesson) -> Tensor:
        """Return the loss of a batch."""
        return torch.stack([self.compare(*pair, lesson) for pair in self.activations(lesson)]).mean()


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not above 0.

    Raises:
        RecipeError: naming the key.
    """
    if not value > 0:
        raise RecipeError(f"distill.losses.{name}: expected a value above 0, got {value}. Use 4, say.")
