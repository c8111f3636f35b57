"""Train: the teacher where it has no weights, the student alone for comparison, and the student that is compressed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, RichProgressBar
from torch import nn

from compress.distill import DistillationLoss, Distiller
from compress.errors import RunError
from compress.pipeline.preflight import load_weights
from compress.pipeline.rundir import RunDirectory
from compress.surgery import Edit, History, RandomStates, ResumePoint, history_of, save_snapshot

__all__ = ["Curves", "StageSnapshots", "cache_folder", "fit"]


# Trainer arguments that do not change what a teacher becomes.
_NO_MATTER = {"max_epochs", "logger", "default_root_dir", "enable_progress_bar", "enable_model_summary", "profiler"}


def fit(run: RunDirectory) -> None:
    """Do all training that a run directory does not have yet.

    Leaves ``checkpoints/{teacher,baseline,distilled,pruned,final}.pt``, as far as the recipe has these stages, and
    ``logs/{teacher,baseline,student}.json`` with the curves.
    """
    recipe = run.recipe
    teacher = _teacher(run) if recipe.teacher is not None else None
    epochs = recipe.trainer.get("max_epochs")
    if recipe.baseline and not run.snapshot("baseline").exists():
        module = _train(run, "baseline", copy.deepcopy(recipe.student), max_epochs=epochs)
        _keep(run, "baseline", module)
    if not run.snapshot("final").exists():
        editors = [copy.deepcopy(editor) for editor in (recipe.prune, recipe.quantize) if editor is not None]
        module = _train(
            run,
            "student",
            copy.deepcopy(recipe.student),
            max_epochs=epochs,
            teacher=teacher,
            losses=recipe.distill.losses if teacher is not None else (),
            callbacks=[*editors, StageSnapshots(run)],
            loggers=_loggers(run),
        )
        _keep(run, "final", module)


def cache_folder() -> Path:
    """Return the folder where trained teachers are kept: ``$COMPRESS_CACHE`` or ``~/.cache/compress``."""
    return Path(os.environ.get("COMPRESS_CACHE", Path.home() / ".cache" / "compress"))


class Curves(Callback):
    """Keeps every epoch's metrics in the checkpoint, so that a resumed fit has the whole curve."""

    def __init__(self) -> None:
        self.curves: dict[str, list[list[float]]] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch's metrics, by name, as ``[epochs done, value]``."""
        for name, value in trainer.callback_metrics.items():
            self.curves.setdefault(name, []).append([trainer.current_epoch + 1, float(value)])

    def state_dict(self) -> dict[str, Any]:
        """Return the curves."""
        return self.curves

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves."""
        self.curves = state_dict


class StageSnapshots(Callback):
    """Saves the network as it is before the first edit (distilled) and before capture (pruned)."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def on_before_edit(self, trainer: pl.Trainer, pl_module: pl.LightningModule, edit: Edit) -> None:
        """Save when an edit is the first of its kind."""
        history = history_of(pl_module)
        if trainer.is_global_zero and not history.count(edit.kind):
            stage = "pruned" if history.count("prune") else "distilled"
            save_snapshot(self.run.snapshot(stage), pl_module.student, history)  # type: ignore[arg-type]


def _teacher(run: RunDirectory) -> nn.Module:
    spec = run.recipe.teacher
    assert spec is not None
    kept = run.snapshot("teacher")
    if not kept.exists() and spec.checkpoint is not None:
        load_weights(spec.model, Path(spec.checkpoint))
        save_snapshot(kept, spec.model, History())
    key = _teacher_key(run)
    shared = cache_folder() / "teachers" / f"{key}.pt" if key else None
    if not kept.exists() and shared is not None and shared.exists():
        run.console.print(f"teacher: trained by an earlier run of this recipe, taken from {shared}")
        _copy(shared, kept)
    if not kept.exists():
        module = _train(run, "teacher", copy.deepcopy(spec.model), max_epochs=spec.max_epochs)
        _keep(run, "teacher", module)
        if shared is not None and run.is_main_process:
            _copy(kept, shared)
        return module.student
    return run.network("teacher")[0]


def _train(
    run: RunDirectory,
    phase: str,
    student: nn.Module,
    *,
    max_epochs: int | None,
    teacher: nn.Module | None = None,
    losses: Sequence[DistillationLoss] = (),
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Any] = (),
) -> Distiller:
    recipe = run.recipe
    pl.seed_everything(recipe.seed, workers=True, verbose=False)
    module = _module(run, student, teacher=teacher, losses=copy.deepcopy(losses))
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
    if phase != "student":
        arguments["max_steps"] = -1
    if arguments.get("enable_progress_bar") is not False:
        arguments["callbacks"].append(RichProgressBar(leave=False))
    arguments["callbacks"].append(ResumePoint(resume))
    trainer = pl.Trainer(**arguments)
    if run.is_main_process:
        goes_on = f", going on from {resume}" if resume.exists() else ""
        run.console.rule(f"[bold]fit: {phase}[/] ({max_epochs} epochs{goes_on})")
    try:
        trainer.fit(module, datamodule=recipe.data, ckpt_path=resume if resume.exists() else None, weights_only=True)
    except SystemExit as error:  # Lightning ends the process on Ctrl-C; the command line has more to say
        raise KeyboardInterrupt from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise RunError(
            f"{resume}: expected a checkpoint of this recipe, got one of another network. "
            "Start a new run, or resume without changes to the student, the teacher and the callbacks."
        ) from error
    if run.is_main_process:
        run.write_json(f"logs/{phase}", curves.curves)
    return module


def _module(
    run: RunDirectory,
    student: nn.Module,
    teacher: nn.Module | None = None,
    losses: Sequence[DistillationLoss] = (),
) -> Distiller:
    recipe = run.recipe
    return Distiller(
        student,
        task=recipe.task,
        optimizer=recipe.optimizer,
        scheduler=recipe.scheduler,
        teacher=teacher,
        losses=losses,
        channels_last=recipe.distill.channels_last,
    )


def _keep(run: RunDirectory, stage: str, module: Distiller) -> None:
    if run.is_main_process:
        save_snapshot(run.snapshot(stage), module.student, history_of(module))
        resume = run.resume_point("student" if stage == "final" else stage)
        resume.unlink(missing_ok=True)


def _teacher_key(run: RunDirectory) -> str | None:
    config = run.recipe.config
    if config is None:
        return None  # a recipe built from objects has no description of what made them
    names = ("teacher", "data", "task", "optimizer", "scheduler", "seed")
    made_by = {
        **{name: config.get(name) for name in names},
        "trainer": {name: value for name, value in config["trainer"].items() if name not in _NO_MATTER},
        "channels_last": config["distill"].get("channels_last"),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(made_by, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _loggers(run: RunDirectory) -> list[Any]:
    given = run.recipe.trainer.get("logger")
    if not given or given is True:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)
