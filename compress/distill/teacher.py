"""The teacher: frozen, in eval mode, and held where neither optimisers nor checkpoints nor DDP find it."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

__all__ = ["freeze"]

Network = TypeVar("Network", bound=nn.Module)


def freeze(network: Network) -> Network:
    """Put a network into eval mode and take the gradients of its parameters away, in place.

    Example:
        >>> any(parameter.requires_grad for parameter in freeze(nn.Linear(2, 2)).parameters())
        False
    """
    return network.eval().requires_grad_(False)
