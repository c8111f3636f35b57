"""Feature losses that learn more than a projector: variational information, knowledge review."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as nnF

from compress.distill import functional as F
from compress.distill.lesson import Lesson, View
from compress.distill.losses.base import FeatureLoss
from compress.distill.projector import Projector, channel_dim
from compress.distill.weights import WeightSchedule
from compress.errors import RecipeError

__all__ = ["KnowledgeReview", "VariationalInformation"]


class VariationalInformation(FeatureLoss):
    """Predict the teacher's activations as Gaussians (VID, Ahn et al. 2019, arXiv:1904.05835).

    The mean comes from three 1x1 layers on the student's activation, the variance of each channel is learned.

    Args:
        layers: Student layer to teacher layer.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    def __init__(self, layers: Mapping[str, str], weight: float = 1.0, schedule: WeightSchedule | None = None) -> None:
        super().__init__(layers, weight, schedule)
        self.regressors = nn.ModuleDict()
        self.scales = nn.ParameterDict()

    def build(self, student: View, teacher: View, teacher_network: nn.Module | None) -> None:
        """Make a regressor and variances for each pair."""
        for number, (ours, theirs) in enumerate(self.pairs):
            dim = channel_dim(student.features[ours], teacher.features[theirs])
            have, want = student.features[ours].shape[dim], teacher.features[theirs].shape[dim]
            self.projectors[str(number)] = Projector(have, want, dim=dim)
            self.regressors[str(number)] = nn.Sequential(
                nn.ReLU(), Projector(want, want, dim=dim), nn.ReLU(), Projector(want, want, dim=dim)
            )
            # softplus gives the variance that the paper starts from, 5.
            self.scales[str(number)] = nn.Parameter(torch.full((want,), 5.0).expm1().log())

    def forward(self, lesson: Lesson) -> Tensor:
        """Return the mean negative log-likelihood over pairs."""
        values = []
        for number, (student, teacher) in enumerate(self.activations(lesson)):
            mean = self.regressors[str(number)](student)
            variance = nnF.softplus(self.scales[str(number)]) + 1e-5
            if channel_dim(mean, teacher) == 2:  # tokens: the formula has channels in dimension 1
                mean, teacher = mean.movedim(2, 1), teacher.movedim(2, 1)
            values.append(F.variational(teacher, mean, variance))
        return torch.stack(values).mean()


class KnowledgeReview(FeatureLoss):
    """Deep student layers together with shallow ones against the teacher's (ReviewKD, Chen et al. 2021).

    Source: arXiv:2104.09044. From the deepest pair to the shallowest, an attention-based fusion joins the student's map
    with what came from deeper, and the result is compared at several sizes.

    Args:
        layers: Student layer to teacher layer, from shallow to deep; maps (N, C, H, W).
        channels: Width of the fusion.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.

    Raises:
        RecipeError: when ``channels`` is not positive.
    """

    def __init__(
        self,
        layers: Mapping[str, str],
        channels: int = 64,
        weight: float = 1.0,
        schedule: WeightSchedule | None = None,
    ) -> None:
        super().__init__(layers, weight, schedule)
        if channels < 1:
            raise RecipeError(f"distill.losses.channels: expected at least 1, got {channels}. Use 64, say.")
        self.channels = channels
        self.fusions = nn.ModuleDict()

    def build(self, student: View, teacher: View, teacher_network: nn.Module | None) -> None:
        """Make a projector and a fusion for each pair."""
        for number, (ours, theirs) in enumerate(self.pairs):
            if student.features[ours].dim() != 4:
                raise RecipeError(
                    f"distill.losses.layers: expected maps (N, C, H, W) for KnowledgeReview, got "
                    f"{tuple(student.features[ours].shape)} from {ours!r}. Name convolutional layers."
                )
            self.projectors[str(number)] = Projector(student.features[ours].shape[1], self.channels)
            deepest = number == len(self.pairs) - 1
            self.fusions[str(number)] = _Fusion(self.channels, teacher.features[theirs].shape[1], deepest=deepest)

    def forward(self, lesson: Lesson) -> Tensor:
        """Return the mean over pairs."""
        values = []
        deeper: Tensor | None = None
        for number, (student, teacher) in reversed(list(enumerate(self.activations(lesson)))):
            result, deeper = self.fusions[str(number)](student, deeper)
            values.append(F.hierarchical_context(result, teacher))
        return torch.stack(values).mean()


class _Fusion(nn.Module):
    """Attention-based fusion of a map with one from deeper (Chen et al. 2021, section 3.3)."""

    def __init__(self, channels: int, out_channels: int, *, deepest: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.attention = None if deepest else nn.Conv2d(2 * channels, 2, 1)
        self.out = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, x: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the map to compare and the fused map for the next shallower pair."""
        x = self.norm(x)
        if self.attention is not None and deeper is not None:
            deeper = nnF.interpolate(deeper, x.shape[2:], mode="nearest")
            share = torch.sigmoid(self.attention(torch.cat([x, deeper], dim=1)))
            x = x * share[:, :1] + deeper * share[:, 1:]
        return self.out(x), x
