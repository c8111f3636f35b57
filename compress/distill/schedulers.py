"""Learning rates as functions of training progress, so that a recipe need not count steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from compress.errors import RecipeError

__all__ = ["LearningRateSchedule", "WarmupCosine"]


class LearningRateSchedule(ABC):
    """A factor on the optimiser's learning rate, by progress in [0, 1]."""

    @abstractmethod
    def factor(self, progress: float) -> float:
        """Return the factor at a progress."""

    def build(self, optimizer: Optimizer, num_steps: int) -> LambdaLR:
        """Return a scheduler to be stepped after each of ``num_steps`` optimiser steps."""
        return LambdaLR(optimizer, lambda step: self.factor(min(1.0, step / max(1, num_steps))))


class WarmupCosine(LearningRateSchedule):
    """Rise linearly, then fall along half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983).

    Args:
        warmup: Fraction of training spent rising, in [0, 1).
        final: Factor at the end.

    Raises:
        RecipeError: when a value is out of range.

    Example:
        >>> schedule = WarmupCosine(warmup=0.1)
        >>> schedule.factor(0.05), schedule.factor(0.1), round(schedule.factor(0.55), 6), schedule.factor(1.0)
        (0.5, 1.0, 0.5, 0.0)
    """

    def __init__(self, warmup: float = 0.1, final: float = 0.0) -> None:
        if not 0 <= warmup < 1:
            raise RecipeError(f"scheduler.warmup: expected a value in [0, 1), got {warmup}. Use 0.1, say.")
        self.warmup = warmup
        self.final = final

    def factor(self, progress: float) -> float:
        """Return the factor at a progress."""
        if progress < self.warmup:
            return progress / self.warmup
        fall = (progress - self.warmup) / (1 - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * fall))
