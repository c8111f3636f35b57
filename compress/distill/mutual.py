"""Two students that learn from each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.distill.distiller import Distiller, MakeOptimizer, MakeScheduler
from compress.distill.lesson import Lesson, View, read_batch
from compress.distill.losses import DistillationLoss, ResponseLoss
from compress.distill.tasks import Task
from compress.errors import RecipeError

__all__ = ["MutualDistiller"]


class MutualDistiller(Distiller):
    """Deep mutual learning: each network is the other's teacher (Zhang et al. 2018, arXiv:1706.00384, equation 5).

    Both are trained by labels and by what the other one says at that moment; ``student`` is the one that is validated,
    pruned, quantised and kept.

    Args:
        student: The network to keep.
        peer: The one that learns beside it; it may be larger.
        task: Loss against labels, and metrics.
        optimizer: Makes an optimiser from the parameters of both.
        scheduler: A learning-rate schedule.
        losses: Losses between outputs, used in both directions.
        task_weight: Weight of the task loss; by default what the losses leave of 1.
        channels_last: Give images to the networks in channels-last memory format.

    Raises:
        RecipeError: when a loss is not between outputs.
    """

    def __init__(
        self,
        student: nn.Module,
        peer: nn.Module,
        *,
        task: Task,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        losses: Sequence[DistillationLoss],
        task_weight: float | None = None,
        channels_last: bool = False,
    ) -> None:
        wrong = [type(loss).__name__ for loss in losses if not isinstance(loss, ResponseLoss)]
        if wrong or not losses:
            got = ", ".join(wrong) or "none"
            raise RecipeError(
                f"distill.losses: expected losses between outputs for mutual learning, got {got}. Use SoftTarget, say."
            )
        super().__init__(
            student,
            task=task,
            optimizer=optimizer,
            scheduler=scheduler,
            channels_last=channels_last,
            task_weight=task_weight,
            losses=(),
        )
        self.losses = nn.ModuleList(losses)
        self._names = [loss.name for loss in losses]
        self.peer = peer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of both networks' losses and log each part."""
        given = self._arrange(read_batch(batch))
        ours = View(self.student(*given.inputs, **given.named))
        theirs = View(self.peer(*given.inputs, **given.named))
        common = Lesson(
            student=ours,
            teachers=[_detached(theirs)],
            targets=given.targets,
            mask=given.mask,
            progress=self._progress(),
        )
        total, parts = self.objective(common)
        own = Lesson(
            student=theirs, teachers=[_detached(ours)], targets=given.targets, mask=given.mask, progress=common.progress
        )
        peer_total, peer_parts = self.objective(own)
        parts |= {name.replace("train/", "train/peer_"): value for name, value in peer_parts.items()}
        self.note(parts, given.size)
        return torch.stack([total, peer_total]).sum()


def _detached(view: View) -> View:
    outputs = view.outputs
    if isinstance(outputs, Tensor):
        return View(outputs.detach())
    if isinstance(outputs, dict):
        return View({name: tensor.detach() for name, tensor in outputs.items()})
    return View([tensor.detach() for tensor in outputs])
