"""A network's modes, each module's its own: a frozen BatchNorm inside a network in training comes back frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["kept_modes"]


@contextmanager
def kept_modes(network: nn.Module, *, training: bool | None = None) -> Iterator[nn.Module]:
    """Give a network, all of it in one mode, and put each module's own mode back.

    Args:
        network: Captured graphs, too, which refuse ``train()`` below the top.
        training: The mode within the context; without it that is left alone.

    Example:
        >>> network = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with kept_modes(network, training=False):
        ...     network[0].training
        False
        >>> network[0].training, network[1].training
        (True, False)
    """
    modes = [(module, module.training) for module in network.modules()]
    if training is not None:
        network.train(training)
    try:
        yield network
    finally:
        for module, mode in modes:
            module.training = mode
