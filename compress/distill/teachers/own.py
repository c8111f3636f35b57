"""Teachers that a student makes of itself during the fit."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from compress.distill.teachers.live import freeze
from compress.errors import RecipeError
from compress.surgery import Edit

__all__ = ["EarlierSelf", "MovingAverage", "OwnTeacher"]

Apply = Callable[[nn.Module, Edit], nn.Module]


class OwnTeacher(ABC):
    """A teacher made of the student; it is no module, so nothing trains it.

    Attributes:
        network: The teacher, once there is one.
    """

    network: nn.Module | None = None

    @abstractmethod
    def begin(self, student: nn.Module) -> None:
        """Meet the student before the fit."""

    def follow(self, student: nn.Module) -> None:
        """Take note of a step of the optimiser."""

    @abstractmethod
    def edit(self, student: nn.Module, edit: Edit, apply: Apply) -> None:
        """Take note of an edit that the student is about to get."""


class MovingAverage(OwnTeacher):
    r"""The average of the student's past weights teaches it (Tarvainen and Valpola 2017, arXiv:1703.01780).

    .. math:: \theta'_t = \alpha \theta'_{t-1} + (1 - \alpha) \theta_t

    BatchNorm statistics are averaged alike. When channels are pruned, the average is pruned along; when the student is
    quantised, the average stays in floats.

    Args:
        decay: alpha in [0, 1); early in training it is at most (1 + t) / (10 + t) at step t, so that the first
            weights do not stay.

    Raises:
        RecipeError: when the decay is out of range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise RecipeError(f"teacher.decay: expected a value in [0, 1), got {decay}. Use 0.999, say.")
        self.decay = decay

    def begin(self, student: nn.Module) -> None:
        """Start from the student."""
        self.network = freeze(copy.deepcopy(student))
        self.network.register_buffer("num_averaged", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Move towards the student."""
        assert self.network is not None
        steps = self.network.get_buffer("num_averaged")
        steps += 1
        keep = min(self.decay, (1 + int(steps)) / (10 + int(steps)))
        theirs = {**dict(student.named_parameters()), **dict(student.named_buffers())}
        for name, average in [*self.network.named_parameters(), *self.network.named_buffers()]:
            if name not in theirs:
                continue  # the counter, or what quantization has folded away
            if average.is_floating_point():
                average.lerp_(theirs[name].to(average), 1 - keep)
            else:
                average.copy_(theirs[name])

    def edit(self, student: nn.Module, edit: Edit, apply: Apply) -> None:
        """Prune along."""
        if self.network is not None and (edit.data.get("slices") or edit.data.get("blocks")):
            steps = self.network.get_buffer("num_averaged")
            self.network = freeze(apply(self.network, edit))
            self.network.register_buffer("num_averaged", steps)  # a captured graph keeps only what it reads


class EarlierSelf(OwnTeacher):
    """The student as it was before its first edit teaches what is left of it.

    Until that edit there is no teacher and labels alone count: the unpruned, unquantised self then guides the recovery
    (as in Zhang et al. 2019, arXiv:1905.08094, of depth; here of width and precision).

    Args:
        before: The kind of edit that counts, ``prune`` or ``quantize``: with the second, what was pruned, and is still
            in floats, teaches itself in integers. The first of any by default.

    Raises:
        RecipeError: when there is no such kind.
    """

    def __init__(self, before: str | None = None) -> None:
        if before not in (None, "prune", "quantize"):
            raise RecipeError(f"teacher.before: expected prune or quantize, got {before!r}. Leave it out for either.")
        self.before = before

    def begin(self, student: nn.Module) -> None:
        """Wait for an edit."""

    def edit(self, student: nn.Module, edit: Edit, apply: Apply) -> None:
        """Keep the student as it is before its first edit, of the kind that counts."""
        if self.network is None and self.before in (None, edit.kind):
            self.network = freeze(copy.deepcopy(student))
