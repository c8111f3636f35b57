"""The LightningModule that trains a student, with or without teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from compress.distill.example import example_batch
from compress.distill.features import FeatureTaps, find_layers
from compress.distill.kept import kept_channels, observer
from compress.distill.lesson import Batch, Lesson, View, num_samples, read_batch
from compress.distill.losses import DistillationLoss
from compress.distill.means import EpochMeans
from compress.distill.schedulers import LearningRateSchedule
from compress.distill.sources import TeacherSource, make_source
from compress.distill.tasks import Task
from compress.errors import RecipeError
from compress.measure.modes import kept_modes
from compress.surgery import Edit, apply_slices
from compress.surgery.compiled import original
from compress.surgery.slicing import Slices
from compress.surgery.timeline import progress

__all__ = ["Distiller", "MakeOptimizer", "MakeScheduler", "check_weights"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = LearningRateSchedule | Callable[[Optimizer], LRScheduler]

_AVERAGE, _MEANS = "compress_own_teacher", "compress_epoch_means"


class Distiller(pl.LightningModule):
    r"""Train a student on labels and on what teachers say.

    .. math:: L = w_0 \, L_{task}(s, y) + \sum_i w_i L_i(s, t)

    Losses between outputs stand in for labels: without a ``task_weight``, the task loss has what their weights leave
    of 1. Losses between activations come on top. Teachers are frozen, run without gradient, and are no part of
    checkpoints, optimisers or DDP. Without a teacher this is plain supervised training, so a baseline and a teacher are
    trained by the same code. Batches are what ``read_batch`` understands; samples without a label
    (class -100, NaN, or no targets at all) are taught by the teacher alone.

    Args:
        student: The network to train: inputs to outputs.
        task: Loss against labels, and metrics.
        optimizer: Makes an optimiser from parameters.
        scheduler: A learning-rate schedule over progress, or what makes a torch scheduler stepped each epoch.
        teacher: A network, a ``LiveTeacher``, an ``Ensemble``, an ``OutputCache``, or one of the student's own selves
            (``MovingAverage``, ``EarlierSelf``).
        losses: Losses between student and teacher, each with its weight.
        task_weight: Weight of the task loss; by default what the losses between outputs leave of 1.
        channels_last: Give images to the student in channels-last memory format, which CPUs and tensor cores prefer.

    Raises:
        RecipeError: when losses need a teacher and there is none, or weights contradict each other.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        task: Task,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        teacher: Any = None,
        losses: Sequence[DistillationLoss] = (),
        task_weight: float | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        check_weights(losses, task_weight)
        if teacher is None and any(loss.needs_teacher for loss in losses):
            raise RecipeError("teacher: expected a network to distil from, got none. Name one, or leave distill out.")
        self.student = student
        self.task = task
        self.losses = nn.ModuleList(losses)
        self.task_weight = task_weight
        self.channels_last = channels_last
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        # In a tuple, nothing is a submodule: not saved, not optimised, not moved, never put into training mode.
        self._source: tuple[TeacherSource, ...] = (make_source(teacher),) if teacher is not None else ()
        self._taps = FeatureTaps()
        self._prepared = False
        self._example: Batch | None = None
        self._names = _log_names(losses)
        self._means = EpochMeans()
        self.val_metrics = task.metrics("val/")
        self.test_metrics = task.metrics("test/")

    @property
    def source(self) -> TeacherSource | None:
        """What gives the teachers' answers."""
        return self._source[0] if self._source else None

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher, unless its answers come from a cache."""
        return self.source.network if self.source is not None else None

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Return the student's outputs."""
        return self.student(*inputs, **named)

    def setup(self, stage: str) -> None:
        """Prepare the losses before weights are restored."""
        if stage == "fit" and not self._prepared:
            self.prepare(partial(example_batch, self.trainer))

    def prepare(self, example: Callable[[], Any]) -> None:
        """Look up the layers that losses name and make what losses learn; ``setup`` does it before a fit.

        Args:
            example: Gives a batch; called only when a loss looks at activations.

        Raises:
            RecipeError: when a layer does not exist, or activations do not fit a loss.
        """
        self._prepared = True
        if self.source is not None:
            self.source.begin(original(self.student))
        for loss in self._each_loss():
            loss.resolve(self._find_student, self._find_teacher)
        needed = [loss.layers() for loss in self._each_loss()]
        self._taps = FeatureTaps([name for ours, _ in needed for name in ours])
        if self.source is not None:
            self.source.tap([name for _, theirs in needed for name in theirs])
        if not any(ours or theirs for ours, theirs in needed):
            return
        self._example = self._arrange(read_batch(example()))
        with torch.no_grad(), kept_modes(self.student, training=False):
            student = self._taps(self.student, *self._example.inputs, **self._example.named)
            teachers = self.source.rehearse(self._example) if self.source is not None else ()
        for loss in self._each_loss():
            loss.build(student, teachers[0] if teachers else View(None), self.teacher)

    def on_fit_start(self) -> None:
        """Bring the teacher to the student's device."""
        if self.source is not None:
            self.source.to(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the weighted sum of all losses and log each part."""
        lesson = self.lesson(batch)
        total, parts = self.objective(lesson)
        self.note(parts, num_samples(lesson.student.outputs))
        return total

    def note(self, parts: Mapping[str, Tensor], num: int) -> None:
        """Log the means of named scalars over the epoch, at its last step."""
        self._means.add(parts, num)
        if self.trainer.is_last_batch or self.trainer.global_step + 1 == self.trainer.max_steps:
            self.log_dict(self._means.take(), on_step=False, on_epoch=True, batch_size=1)

    def lesson(self, batch: Any) -> Lesson:
        """Run student and teachers on a batch.

        Args:
            batch: Whatever ``read_batch`` understands.
        """
        given = self._arrange(read_batch(batch))
        teachers, weights = self._teach(given)
        return Lesson(
            student=self._taps(self.student, *given.inputs, **given.named),
            teachers=teachers,
            targets=given.targets,
            mask=given.mask,
            index=given.keys[:, 0] if given.keys is not None else None,
            source=given.source,
            teacher_weights=weights,
            progress=self._progress(),
        )

    def objective(self, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of all losses, and each part by its name in logs."""
        losses = [
            (name, loss)
            for name, loss in zip(self._names, self._each_loss())
            if lesson.teachers or not loss.needs_teacher
        ]
        shared = sum(loss.weight_at(lesson.progress) for _, loss in losses if loss.shares)
        task_weight = max(0.0, 1 - shared) if self.task_weight is None else self.task_weight
        terms, parts = [], {}
        if lesson.targets is not None:
            value = self.task.loss(lesson.student.outputs, lesson.targets)
            terms.append(task_weight * value)
            parts["train/task_loss"] = value.detach()
        for name, loss in losses:
            value = loss(lesson)
            terms.append(loss.weight_at(lesson.progress) * value)
            parts[f"train/{name}_loss"] = value.detach()
        if not terms:
            raise RecipeError(
                "batch: expected labels or a teacher to learn from, got neither. Give targets, or name a teacher."
            )
        total = torch.stack(terms).sum()
        parts["train/loss"] = total.detach()
        return total, parts

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let a teacher that follows the student take its step, after the optimiser's."""
        if self.source is not None and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.source.follow(original(self.student))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the task's loss and metrics."""
        given = self._arrange(read_batch(batch))
        outputs = self(*given.inputs, **given.named)
        self.val_metrics.update(outputs, given.targets)
        self.log("val/loss", self.task.loss(outputs, given.targets), batch_size=given.size, sync_dist=True)
        self.log_dict(self.val_metrics, prog_bar=True, batch_size=given.size)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the task's metrics."""
        given = self._arrange(read_batch(batch))
        self.test_metrics.update(self(*given.inputs, **given.named), given.targets)
        self.log_dict(self.test_metrics, batch_size=given.size)

    def configure_optimizers(self) -> Any:
        """Return the optimiser over the student and all that the losses learn, and its schedule."""
        optimizer = self._make_optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        if self._make_scheduler is None:
            return optimizer
        if isinstance(self._make_scheduler, LearningRateSchedule):
            scheduler = self._make_scheduler.build(optimizer, int(self.trainer.estimated_stepping_batches))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        return {"optimizer": optimizer, "lr_scheduler": self._make_scheduler(optimizer)}

    def before_edit(self, edit: Edit, apply: Callable[[nn.Module, Edit], nn.Module]) -> Slices:
        """Cut what losses have learned on channels that an edit of the student removes.

        Args:
            edit: About to be applied to the student.
            apply: Carries it out.

        Returns:
            What was kept, by the names of this module's parameters.
        """
        student = original(self.student)
        if self.source is not None:
            self.source.edit(student, edit, apply)
        if self._example is None or not self._taps.names:
            return {}
        inputs = [tensor.to(self.device) for tensor in self._example.inputs]
        named = {name: tensor.to(self.device) for name, tensor in self._example.named.items()}
        kept = kept_channels(student, edit, apply, observer(self._taps, inputs, named))
        slices: dict[str, Mapping[str, Sequence[int]]] = {}
        for number, loss in enumerate(self._each_loss()):
            slices |= {f"{number}.{name}": what for name, what in loss.shrink(kept).items()}
        attributes = {
            name.rpartition(".")[0]: {"in_features": len(what["1"])} for name, what in slices.items() if "1" in what
        }
        apply_slices(self.losses, slices, attributes)
        return {f"losses.{name}": what for name, what in slices.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep a teacher that is made in this very fit, and the epoch's means so far."""
        checkpoint[_MEANS] = self._means.state_dict()
        if self.source is not None and (state := self.source.state()) is not None:
            checkpoint[_AVERAGE] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what ``on_save_checkpoint`` kept; edits have been replayed before."""
        self._means.load_state_dict(checkpoint.get(_MEANS, {}))
        if self.source is not None and _AVERAGE in checkpoint:
            self.source.restore(original(self.student), checkpoint[_AVERAGE])

    def _teach(self, batch: Batch) -> tuple[Sequence[View], Tensor | None]:
        return self.source.teach(batch) if self.source is not None else ((), None)

    def _progress(self) -> float:
        scheduled = any(loss.schedule is not None for loss in self._each_loss())
        return progress(self.trainer) if scheduled and self._trainer is not None else 0.0

    def _each_loss(self) -> Iterable[DistillationLoss]:
        return iter(self.losses)  # type: ignore[return-value, arg-type]

    def _find_student(self, pattern: str) -> Sequence[str]:
        return find_layers(self.student, pattern, where="distill.losses.layers (student)")

    def _find_teacher(self, pattern: str) -> Sequence[str]:
        assert self.source is not None
        return self.source.find(pattern)

    def _arrange(self, batch: Batch) -> Batch:
        if not self.channels_last:
            return batch
        inputs = tuple(
            tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
            for tensor in batch.inputs
        )
        return replace(batch, inputs=inputs)


def check_weights(losses: Sequence[DistillationLoss], task_weight: float | None) -> None:
    """Refuse weights that contradict each other.

    Raises:
        RecipeError: when nothing is left for the labels and nobody said so, or the task's weight is negative.
    """
    shared = sum(loss.weight for loss in losses if loss.shares)
    if task_weight is None and shared > 1 + 1e-9:
        raise RecipeError(
            f"distill.losses: expected weights of losses between outputs that sum to at most 1, got {shared:g}. "
            "The task loss has the rest; or give distill.task_weight."
        )
    if task_weight is not None and task_weight < 0:
        raise RecipeError(f"distill.task_weight: expected 0 or more, got {task_weight}. Leave it out for the default.")


def _log_names(losses: Sequence[DistillationLoss]) -> list[str]:
    names = [loss.name for loss in losses]
    return [name if names.count(name) == 1 else f"{name}_{names[:i].count(name)}" for i, name in enumerate(names)]
