"""Losses between transformers; the formulas are in ``distill.functional``. Padding does not count in any of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.distill import functional as F
from compress.distill.lesson import Lesson
from compress.distill.losses.base import FeatureLoss
from compress.distill.weights import WeightSchedule
from compress.errors import RecipeError

__all__ = ["AttentionMaps", "CosineEmbedding", "HiddenStates", "SelfAttentionRelation"]


class HiddenStates(FeatureLoss):
    """Squared distance of token representations (TinyBERT, Jiao et al. 2020, arXiv:1909.10351, equation 8).

    Args:
        layers: Student layer to teacher layer; a learned projector matches their widths.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    projects = True

    def __init__(self, layers: Mapping[str, str], weight: float = 1.0, schedule: WeightSchedule | None = None) -> None:
        super().__init__(layers, weight, schedule)

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:
        """Return the loss of tokens (N, L, D)."""
        return F.hidden_states(student, teacher, lesson.mask)


class CosineEmbedding(FeatureLoss):
    """Directions of representations (DistilBERT, Sanh et al. 2019, arXiv:1910.01108).

    Args:
        layers: Student layer to teacher layer; a learned projector matches their widths.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    projects = True

    def __init__(self, layers: Mapping[str, str], weight: float = 1.0, schedule: WeightSchedule | None = None) -> None:
        super().__init__(layers, weight, schedule)

    def compare(self, student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:
        """Return the loss of embeddings (N, D) or tokens (N, L, D)."""
        return F.cosine_embedding(student, teacher, lesson.mask if student.dim() == 3 else None)


class AttentionMaps(FeatureLoss):
    """Squared distance of attention maps (TinyBERT, Jiao et al. 2020, arXiv:1909.10351, equation 7).

    Args:
        layers: Student layer to teacher layer, with ``:1`` where a layer returns its map as second; equally many heads.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.
    """

    def __init__(self, layers: Mapping[str, str], weight: float = 1.0, schedule: WeightSchedule | None = None) -> None:
        super().__init__(layers, weight, schedule)

    def forward(self, lesson: Lesson) -> Tensor:
        """Return the mean over pairs of maps (N, heads, L, L)."""
        ours, theirs = lesson.student.features, lesson.teachers[0].features
        values = [F.attention_maps(ours[first], theirs[second], lesson.mask) for first, second in self.pairs]
        return torch.stack(values).mean()


class SelfAttentionRelation(FeatureLoss):
    """Relations between the queries, keys or values of tokens (MiniLMv2, Wang et al. 2021, arXiv:2012.15828).

    Args:
        layers: Student layer to teacher layer: the projections to queries, keys and values, one pair each.
        num_heads: Relation heads, which need not be either network's attention heads; divides both widths.
        weight: Factor in the total loss.
        schedule: How the weight changes over training.

    Raises:
        RecipeError: when ``num_heads`` is not positive.
    """

    def __init__(
        self,
        layers: Mapping[str, str],
        num_heads: int = 12,
        weight: float = 1.0,
        schedule: WeightSchedule | None = None,
    ) -> None:
        super().__init__(layers, weight, schedule)
        if num_heads < 1:
            raise RecipeError(f"distill.losses.num_heads: expected at least 1, got {num_heads}. Use 12, say.")
        self.num_heads = num_heads

    def forward(self, lesson: Lesson) -> Tensor:
        """Return the mean over pairs of projections (N, L, D)."""
        ours, theirs = lesson.student.features, lesson.teachers[0].features
        values = [
            F.self_attention_relation(ours[first], theirs[second], num_heads=self.num_heads, mask=lesson.mask)
            for first, second in self.pairs
        ]
        return torch.stack(values).mean()
