"""Train: the teacher where it has no weights, the student alone for comparison, and the student that is compressed."""

from __future__ import annotations

import copy
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import nn

from compress.pipeline.preflight import load_weights
from compress.pipeline.rundir import RunDirectory
from compress.pipeline.teaching import Teaching, teaching
from compress.pipeline.training import keep, train
from compress.surgery import Edit, history_of, save_snapshot

__all__ = ["StageSnapshots", "fit", "fit_baseline"]


def fit(run: RunDirectory) -> None:
    """Do all training that a run directory does not have yet.

    Leaves ``checkpoints/{teacher,assistant0,...,baseline,distilled,pruned,final}.pt``, as far as the recipe has these
    stages, and ``logs/{teacher,assistant0,...,baseline,student}.json`` with the curves.
    """
    recipe = run.recipe
    done = run.snapshot("final").exists()
    taught = teaching(run) if not done and recipe.teacher is not None else Teaching(None, recipe.data)
    epochs = recipe.trainer.get("max_epochs")
    if recipe.baseline:
        fit_baseline(run)
    if not done:
        given = (recipe.prune, recipe.sparsify, recipe.quantize)
        editors = [copy.deepcopy(editor) for editor in given if editor is not None]
        losses = recipe.distill.losses
        module = train(
            run,
            "student",
            _student(run),
            max_epochs=epochs,
            teacher=taught.teacher,
            losses=[loss for loss in losses if taught.teacher is not None or not loss.needs_teacher],
            data=taught.data,
            callbacks=[*editors, StageSnapshots(run)],
            loggers=_loggers(run),
        )
        keep(run, "final", module)


def fit_baseline(run: RunDirectory) -> None:
    """Train the student alone, where a run directory does not have it yet."""
    if not run.snapshot("baseline").exists():
        epochs = run.recipe.trainer.get("max_epochs")
        module = train(run, "baseline", _student(run), max_epochs=epochs)
        keep(run, "baseline", module)


class StageSnapshots(Callback):
    """Saves the network as it is before the first edit (distilled) and before capture (pruned)."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def on_before_masking(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save before units are held at zero, long before an edit cuts them off."""
        self._save(trainer, pl_module, "distilled")

    def on_before_edit(self, trainer: pl.Trainer, pl_module: pl.LightningModule, edit: Edit) -> None:
        """Save when an edit is the first of its kind."""
        history = history_of(pl_module)
        if not history.count(edit.kind):
            self._save(trainer, pl_module, "pruned" if history.count("prune") else "distilled")

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        path = self.run.snapshot(stage)
        # What is there is the same, from before a stop, or from before units were held at zero.
        if trainer.is_global_zero and not path.exists():
            save_snapshot(path, pl_module.student, history_of(pl_module))  # type: ignore[arg-type]


def _student(run: RunDirectory) -> nn.Module:
    """Return the student as it is before training."""
    student = copy.deepcopy(run.recipe.student)
    if run.recipe.student_checkpoint is not None:
        load_weights(student, run.recipe.student_checkpoint, key="student_checkpoint")
    return student


def _loggers(run: RunDirectory) -> list[Any]:
    given = run.recipe.trainer.get("logger")
    if not given or given is True:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]
