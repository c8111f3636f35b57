"""Bring a student's activation to the shape of a teacher's: learned, and no part of the student."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Projector", "channel_dim", "match_size"]


def channel_dim(first: Tensor, second: Tensor) -> int:
    """Return the dimension of two activations that holds channels.

    It is 1 for (N, C) and for (N, C, H, W, ...). Of (N, A, B) it is 1 where the activations agree in B alone, as those
    of 1-D convolutions do, and 2 otherwise, as for tokens (N, L, D).
    """
    if first.dim() == 3 and not (first.shape[2] == second.shape[2] and first.shape[1] != second.shape[1]):
        return 2
    return 1


def match_size(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Pool the larger of two maps (N, C, ...) to the smaller one's size.

    Example:
        >>> import torch
        >>> [tuple(t.shape) for t in match_size(torch.ones(1, 2, 8, 8), torch.ones(1, 3, 4, 4))]
        [(1, 2, 4, 4), (1, 3, 4, 4)]
    """
    if first.dim() not in (3, 4, 5) or first.dim() != second.dim() or first.shape[2:] == second.shape[2:]:
        return first, second
    size = tuple(min(pair) for pair in zip(first.shape[2:], second.shape[2:]))
    pool: Any = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}[first.dim()]
    return pool(first, size), pool(second, size)


class Projector(nn.Module):
    """A linear map of the channels: a 1x1 convolution on maps, a linear layer on embeddings and tokens.

    Args:
        in_features: Channels of the activation.
        out_features: Channels of the result.
        dim: The dimension that holds channels.
    """

    def __init__(self, in_features: int, out_features: int, *, dim: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.dim = dim

    def start_as_identity(self) -> None:
        """Begin with what changes nothing, where both widths are one."""
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, ...) or (N, L, C) to as many channels as asked for."""
        return self.linear(x.movedim(self.dim, -1)).movedim(-1, self.dim)
