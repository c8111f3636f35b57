"""Contrastive representation distillation: a student's embedding finds its teacher's among many others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as nnF

from compress.distill import functional as F
from compress.distill.lesson import Lesson, View
from compress.distill.losses.base import FeatureLoss, check_positive
from compress.distill.projector import Projector
from compress.distill.weights import WeightSchedule
from compress.errors import DataError, RecipeError

__all__ = ["ContrastiveRepresentation"]


class ContrastiveRepresentation(FeatureLoss):
    """Tell the teacher's embedding of the same sample from those of others (CRD, Tian et al. 2020, arXiv:1910.10699).

    Both embeddings are projected to one space; negatives come from a memory of all training samples, so batches must
    carry keys, as those of ``compress.data`` and of ``keyed_loader`` do. Under DDP every rank's samples enter the
    memory.

    Args:
        layers: One pair, student layer to teacher layer: embeddings before the classifier.
        num_samples: Training samples.
        negatives: Negatives for each sample, fewer than ``num_samples``.
        dim: Size of the common space.
        temperature: Of the scores; above 0.
        momentum: Share of the old entry when the memory is updated, in [0, 1).
        weight: Factor in the total loss.
        schedule: How the weight changes over training.

    Raises:
        RecipeError: when a value is out of range.
    """

    student_memory: Tensor
    teacher_memory: Tensor
    normalizer: Tensor

    def __init__(
        self,
        layers: Mapping[str, str],
        num_samples: int,
        negatives: int = 1024,
        dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        weight: float = 0.8,
        schedule: WeightSchedule | None = None,
    ) -> None:
        super().__init__(layers, weight, schedule)
        check_positive("temperature", temperature)
        if not 1 <= negatives < num_samples:
            raise RecipeError(
                f"distill.losses.negatives: expected a number in [1, {num_samples}), got {negatives}. "
                "It must be smaller than distill.losses.num_samples, the number of training samples."
            )
        if dim < 1 or not 0 <= momentum < 1:
            raise RecipeError(
                f"distill.losses.dim, momentum: expected dim of at least 1 and momentum in [0, 1), got {dim} and "
                f"{momentum}. Use 128 and 0.5, say."
            )
        self.num_samples, self.negatives, self.dim = num_samples, negatives, dim
        self.temperature, self.momentum = temperature, momentum
        start = nnF.normalize(torch.randn(2, num_samples, dim), dim=-1)
        self.register_buffer("student_memory", start[0].clone())
        self.register_buffer("teacher_memory", start[1].clone())
        # Of the scores of student and of teacher; found from the first batch, as in section 3.3 of the paper.
        self.register_buffer("normalizer", torch.zeros(2))

    def build(self, student: View, teacher: View, teacher_network: nn.Module | None) -> None:
        """Make the two projections."""
        if len(self.pairs) != 1:
            raise RecipeError(
                f"distill.losses.layers: expected one pair for ContrastiveRepresentation, got {len(self.pairs)}. "
                "Add a second loss for a second pair."
            )
        ours, theirs = self.pairs[0]
        self.projectors["0"] = Projector(student.features[ours].shape[1], self.dim)
        self.projectors["teacher"] = Projector(teacher.features[theirs].shape[1], self.dim)

    def forward(self, lesson: Lesson) -> Tensor:
        """Return the sum of both directions.

        Raises:
            DataError: when batches carry no keys, or a key is beyond ``num_samples``.
        """
        index = lesson.index
        if index is None:
            raise DataError(
                "batch: expected keys of the samples for ContrastiveRepresentation, got none. "
                "Wrap the loader in compress.data.keyed_loader."
            )
        if int(index.max()) >= self.num_samples:
            raise DataError(
                f"distill.losses.num_samples: expected more than {int(index.max())}, got {self.num_samples}. "
                "Give the number of training samples."
            )
        ours, theirs = self.pairs[0]
        student = self._embed("0", lesson.student.features[ours])
        teacher = self._embed("teacher", lesson.teachers[0].features[theirs])
        others = torch.randint(self.num_samples - 1, (len(index), self.negatives), device=index.device)
        others = others + (others >= index[:, None]).long()  # never the sample itself
        value = self._contrast(student, self.teacher_memory, index, others, 0)
        value = value + self._contrast(teacher, self.student_memory, index, others, 1)
        if self.training:
            self._remember(index, student.detach(), teacher.detach())
        return value

    def _embed(self, projector: str, features: Tensor) -> Tensor:
        flat = features.float().flatten(2).mean(2) if features.dim() > 2 else features.float()
        return nnF.normalize(self.projectors[projector](flat).float(), dim=1)

    def _contrast(self, anchor: Tensor, memory: Tensor, index: Tensor, others: Tensor, side: int) -> Tensor:
        positive = (anchor * memory[index]).sum(1).div(self.temperature).exp()
        negative = torch.einsum("nd,nkd->nk", anchor, memory[others]).div(self.temperature).exp()
        if not self.normalizer[side]:
            self.normalizer[side] = torch.cat([positive[:, None], negative], 1).mean().detach() * self.num_samples
        normalizer = self.normalizer[side].clone()
        return F.noise_contrastive(positive / normalizer, negative / normalizer, num_samples=self.num_samples)

    @torch.no_grad()
    def _remember(self, index: Tensor, student: Tensor, teacher: Tensor) -> None:
        index, student, teacher = (_gather(tensor) for tensor in (index, student, teacher))
        for memory, fresh in ((self.student_memory, student), (self.teacher_memory, teacher)):
            mixed = self.momentum * memory[index] + (1 - self.momentum) * fresh
            memory[index] = nnF.normalize(mixed, dim=1)


def _gather(tensor: Tensor) -> Tensor:
    """Return the rows of all ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
