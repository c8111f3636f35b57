"""The LightningModule that trains a student, with or without a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from compress.distill.losses import DistillationLoss
from compress.distill.schedulers import LearningRateSchedule
from compress.distill.tasks import Task
from compress.distill.teacher import freeze
from compress.errors import RecipeError

__all__ = ["Distiller", "MakeOptimizer", "MakeScheduler"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = LearningRateSchedule | Callable[[Optimizer], LRScheduler]


class Distiller(pl.LightningModule):
    r"""Train a student on labels and on what a teacher says.

    .. math:: L = \sum_i w_i L_i(s, t) + (1 - \sum_i w_i) \, L_{task}(s, y)

    The teacher is frozen, runs without gradient, and is no part of checkpoints, optimisers or DDP. Without a teacher
    this is plain supervised training, so a baseline and a teacher are trained by the same code.

    Args:
        student: The network to train: inputs to outputs.
        task: Loss against labels, and metrics.
        optimizer: Makes an optimiser from parameters.
        scheduler: A learning-rate schedule over progress, or what makes a torch scheduler stepped each epoch.
        teacher: The network to learn from.
        losses: Losses between student and teacher, each with its weight; the weights sum to at most 1.
        channels_last: Give images to both networks in channels-last memory format, which CPUs and tensor cores prefer.

    Raises:
        RecipeError: when losses come without a teacher or their weights exceed 1.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        task: Task,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        teacher: nn.Module | None = None,
        losses: Sequence[DistillationLoss] = (),
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        total = sum(loss.weight for loss in losses)
        if total > 1 + 1e-9:
            raise RecipeError(
                f"distill.losses: expected weights that sum to at most 1, got {total:g}. The task loss has the rest."
            )
        if losses and teacher is None:
            raise RecipeError("teacher: expected a network to distil from, got none. Name one, or leave distill out.")
        self.student = student
        self.task = task
        self.losses = nn.ModuleList(losses)
        self.channels_last = channels_last
        self._task_weight = 1 - total
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        # In a tuple, a module is no submodule: not saved, not optimised, not moved, never put into training mode.
        self._teacher = (freeze(teacher),) if teacher is not None else ()
        self.val_metrics = task.metrics("val/")
        self.test_metrics = task.metrics("test/")

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher."""
        return self._teacher[0] if self._teacher else None

    def forward(self, *inputs: Tensor) -> Any:
        """Return the student's outputs."""
        return self.student(*inputs)

    def on_fit_start(self) -> None:
        """Bring the teacher to the student's device."""
        if self.teacher is not None:
            self.teacher.to(self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the weighted sum of all losses and log each part."""
        inputs, targets = self._arrange(batch[0]), batch[1]
        outputs = self(inputs)
        task_loss = self.task.loss(outputs, targets)
        total = self._task_weight * task_loss
        parts = {"train/task_loss": task_loss.detach()}
        if self.losses:
            with torch.no_grad():
                taught = self.teacher(inputs)  # type: ignore[misc]
            for loss in self.losses:
                value = loss(outputs, taught)
                total = total + loss.weight * value
                parts[f"train/{loss.name}_loss"] = value.detach()
        parts["train/loss"] = total.detach()
        self.log_dict(parts, on_step=False, on_epoch=True, batch_size=len(targets))
        return total

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the task's loss and metrics."""
        outputs = self(self._arrange(batch[0]))
        self.val_metrics.update(outputs, batch[1])
        self.log("val/loss", self.task.loss(outputs, batch[1]), batch_size=len(batch[1]), sync_dist=True)
        self.log_dict(self.val_metrics, prog_bar=True, batch_size=len(batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the task's metrics."""
        self.test_metrics.update(self(self._arrange(batch[0])), batch[1])
        self.log_dict(self.test_metrics, batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        """Return the optimiser over the student and all that the losses learn, and its schedule."""
        optimizer = self._make_optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        if self._make_scheduler is None:
            return optimizer
        if isinstance(self._make_scheduler, LearningRateSchedule):
            scheduler = self._make_scheduler.build(optimizer, int(self.trainer.estimated_stepping_batches))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        return {"optimizer": optimizer, "lr_scheduler": self._make_scheduler(optimizer)}

    def _arrange(self, inputs: Tensor) -> Tensor:
        if self.channels_last and inputs.dim() == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs
