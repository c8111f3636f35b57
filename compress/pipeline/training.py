"""One phase of training: a Trainer, a Distiller, and a checkpoint from which the phase goes on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import LightningDataModule
from pytorch_lightning.callbacks import Callback, RichProgressBar, StochasticWeightAveraging, WeightAveraging
from rich.text import Text
from torch import nn

from compress.distill import DistillationLoss, Distiller
from compress.errors import RunError
from compress.pipeline.rundir import RunDirectory
from compress.surgery import ModelEditor, RandomStates, ResumePoint, history_of, save_snapshot

__all__ = ["Curves", "keep", "train"]


def train(
    run: RunDirectory,
    phase: str,
    student: nn.Module,
    *,
    max_epochs: int | None,
    teacher: Any = None,
    losses: Sequence[DistillationLoss] = (),
    data: LightningDataModule | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Any] = (),
) -> Distiller:
    """Train a student, going on from where an earlier process stopped.

    Args:
        run: The run directory.
        phase: What is trained: ``teacher``, ``assistant0``, ``baseline`` or ``student``.
        student: The network.
        max_epochs: How long.
        teacher: What teaches it.
        losses: What it learns from the teacher; they are copied.
        data: Gives the batches; the recipe's data without it.
        callbacks: Of the Trainer, besides the recipe's.
        loggers: Where curves go, besides ``logs/<phase>.json``.

    Raises:
        RunError: when the checkpoint belongs to another recipe.
    """
    recipe = run.recipe
    pl.seed_everything(recipe.seed, workers=True, verbose=False)
    module = _module(run, student, teacher, copy.deepcopy(losses))
    curves = Curves()
    resume = run.resume_point(phase)
    resume.parent.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {
        **recipe.trainer,
        "max_epochs": max_epochs,
        "default_root_dir": str(run.path),
        "logger": list(loggers) or False,
        "enable_checkpointing": True,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": [*callbacks, *copy.deepcopy(recipe.trainer.get("callbacks") or []), curves, RandomStates()],
    }
    if phase not in ("student", "baseline"):  # the limit is the student's, and the baseline gets as much
        arguments["max_steps"] = -1
    if arguments.get("enable_progress_bar") is not False:
        arguments["callbacks"].append(RichProgressBar(leave=False))
    arguments["callbacks"].append(ResumePoint(resume))
    trainer = pl.Trainer(**arguments)
    if run.is_main_process:
        goes_on = f", going on from {resume}" if resume.exists() else ""
        run.console.rule(Text.assemble((f"fit: {phase}", "bold"), f" ({max_epochs} epochs{goes_on})"))
    try:
        trainer.fit(
            module, datamodule=data or recipe.data, ckpt_path=resume if resume.exists() else None, weights_only=True
        )
    except SystemExit as error:  # Lightning ends the process on Ctrl-C; the command line has more to say
        raise KeyboardInterrupt from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise RunError(
            f"{resume}: expected a checkpoint of this recipe, got one of another network. "
            "Start a new run, or resume without changes to the student, the teacher and the callbacks."
        ) from error
    if not curves.ended:
        _end(trainer, module)
    if run.is_main_process:
        run.write_json(f"logs/{phase}", curves.curves)
    return module


def keep(run: RunDirectory, stage: str, module: Distiller) -> None:
    """Save the network of a stage and let its checkpoint go."""
    if run.is_main_process:
        save_snapshot(run.snapshot(stage), module.student, history_of(module))
        resume = run.resume_point("student" if stage == "final" else stage)
        resume.unlink(missing_ok=True)


class Curves(Callback):
    """Keeps every epoch's metrics in the checkpoint, so that a resumed fit has the whole curve.

    Attributes:
        ended: Whether the fit went through its end, which Lightning leaves out where all epochs were done before.
    """

    def __init__(self) -> None:
        self.curves: dict[str, list[list[float]]] = {}
        self.ended = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch's metrics, by name, as ``[epochs done, value]``."""
        for name, value in trainer.callback_metrics.items():
            self.curves.setdefault(name, []).append([trainer.current_epoch + 1, float(value)])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that there was an end."""
        self.ended = True

    def state_dict(self) -> dict[str, Any]:
        """Return the curves."""
        return self.curves

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves."""
        self.curves = state_dict


def _end(trainer: pl.Trainer, module: Distiller) -> None:
    """Do what the end of a fit does to a network, for one that was stopped between its last epoch and that."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, RandomStates):
            callback.on_train_start(trainer, module)  # the same batches calibrate
    device = module.device
    module.to(trainer.strategy.root_device)  # from which Lightning has taken it already
    for callback in callbacks:
        # With BatchNorm, SWA has become the weights an epoch before the last, which the checkpoint is from.
        if isinstance(callback, StochasticWeightAveraging) and callback._model_contains_batch_norm:
            continue
        if isinstance(callback, ModelEditor | WeightAveraging | StochasticWeightAveraging):
            callback.on_train_end(trainer, module)
    module.to(device)


def _module(run: RunDirectory, student: nn.Module, teacher: Any, losses: Sequence[DistillationLoss]) -> Distiller:
    recipe = run.recipe
    return Distiller(
        student,
        task=recipe.task,
        optimizer=recipe.optimizer,
        scheduler=recipe.scheduler,
        teacher=teacher,
        losses=losses,
        task_weight=recipe.distill.task_weight if losses else None,
        channels_last=recipe.distill.channels_last,
    )
