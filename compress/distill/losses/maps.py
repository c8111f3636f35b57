"""Losses between feature maps; the formulas are in ``distill.functional``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from compress.distill import functional as F
from compress.distill.lesson import Lesson, View
from compress.distill.losses.base import FeatureLoss
from compress.distill.weights import WeightSchedule
from compress.errors import RecipeError

__all__ = [
    "AttentionTransfer",
    "Flow",
    "Hint",
    "NeuronSelectivity",
    "Overhaul",
    "SimilarityPreserving",
]


class Hint(FeatureLoss):
    """Squared distance of activations (FitNets, Romero et al. 2015, arXiv:1412.6550).

    Args:
        layers: Student layer to teacher layer; a learned projector matches their channels.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    projects = True

    def __init__(self, layers: Mapping[str, str], weight: float = 1.0, schedule: WeightSchedule | None = None) -> None:
        super().__init__(layers, weight, schedule)

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:
        """Return the loss of activations of one shape."""
        return F.hint(student, teacher)


class AttentionTransfer(FeatureLoss):
    """Where in the image activations are large (Zagoruyko and Komodakis 2017, arXiv:1612.03928).

    Args:
        layers: Student layer to teacher layer.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    def __init__(
        self, layers: Mapping[str, str], weight: float = 100.0, schedule: WeightSchedule | None = None
    ) -> None:
        super().__init__(layers, weight, schedule)

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:
        """Return the loss of maps (N, C, ...) of one size."""
        return F.attention_transfer(student, teacher)


class SimilarityPreserving(FeatureLoss):
    """Which samples of a batch look alike (Tung and Mori 2019, arXiv:1907.09682).

    Args:
        layers: Student layer to teacher layer.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    def __init__(
        self, layers: Mapping[str, str], weight: float = 3000.0, schedule: WeightSchedule | None = None
    ) -> None:
        super().__init__(layers, weight, schedule)

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:
        """Return the loss of activations (N, ...)."""
        return F.similarity_preserving(student, teacher)


class NeuronSelectivity(FeatureLoss):
    """Distribution of the channels' spatial patterns (NST, Huang and Wang 2017, arXiv:1707.01219).

    Args:
        layers: Student layer to teacher layer.
        kernel: ``linear``, ``polynomial`` or ``gaussian``.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    def __init__(
        self,
        layers: Mapping[str, str],
        kernel: str = "polynomial",
        weight: float = 50.0,
        schedule: WeightSchedule | None = None,
    ) -> None:
        super().__init__(layers, weight, schedule)
        self.kernel = kernel

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:
        """Return the loss of maps (N, C, ...) of one size."""
        return F.neuron_selectivity(student, teacher, kernel=self.kernel)


class Flow(FeatureLoss):
    """How one layer's channels go with the next layer's (FSP, Yim et al. 2017, CVPR, section 3).

    Args:
        layers: Student layer to teacher layer, two pairs or more; each is compared together with the next one.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.

    Raises:
        RecipeError: when fewer than two pairs are named.
    """

    projects = True

    def __init__(self, layers: Mapping[str, str], weight: float = 1.0, schedule: WeightSchedule | None = None) -> None:
        super().__init__(layers, weight, schedule)

    def build(self, student: View, teacher: View, teacher_network: nn.Module | None) -> None:
        """Make projectors where channels differ."""
        if len(self.pairs) < 2:
            raise RecipeError(
                f"distill.losses.layers: expected two pairs or more for Flow, got {len(self.pairs)}. Add a deeper one."
            )
        super().build(student, teacher, teacher_network)

    def forward(self, lesson: Lesson) -> Tensor:
        """Return the mean over neighbouring pairs."""
        pairs = self.activations(lesson)
        values = [F.flow(first[0], second[0], first[1], second[1]) for first, second in pairwise(pairs)]
        return torch.stack(values).mean()


class Overhaul(FeatureLoss):
    """Activations before the ReLU, negative ones up to a margin (Heo et al. 2019, arXiv:1904.01866).

    Args:
        layers: Student layer to teacher layer; the teacher's are BatchNorms, from which the margins are computed.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    projects = True

    def __init__(self, layers: Mapping[str, str], weight: float = 1e-3, schedule: WeightSchedule | None = None) -> None:
        super().__init__(layers, weight, schedule)

    def build(self, student: View, teacher: View, teacher_network: nn.Module | None) -> None:
        """Make projectors where channels differ, and compute the margins.

        Raises:
            RecipeError: when a teacher layer is no BatchNorm with scale and shift, or the teacher is a cache.
        """
        super().build(student, teacher, teacher_network)
        layers = dict(teacher_network.named_modules()) if teacher_network is not None else {}
        for number, (_, theirs) in enumerate(self.pairs):
            norm = layers.get(theirs)
            weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
            if not hasattr(norm, "running_var") or weight is None or bias is None:
                raise RecipeError(
                    f"distill.losses.layers: expected BatchNorm layers of a live teacher for Overhaul, got {theirs!r} "
                    f"({type(norm).__name__}). Name the BatchNorm before a ReLU."
                )
            margin = F.margin_of(bias.detach().float(), weight.detach().float().abs())
            self.register_buffer(f"margin{number}", margin)

    def forward(self, lesson: Lesson) -> Tensor:
        """Return the mean over pairs."""
        values = [
            F.overhaul(student, teacher, getattr(self, f"margin{number}"))
            for number, (student, teacher) in enumerate(self.activations(lesson))
        ]
        return torch.stack(values).mean()
