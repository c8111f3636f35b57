"""The teacher of a run: trained where it has no weights, through assistants, live or from stored outputs."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import nn

from compress.distill import LiveTeacher, OwnTeacher, ResponseLoss
from compress.errors import RecipeError
from compress.files import replacing
from compress.measure.machine import user_cache
from compress.pipeline.preflight import load_weights
from compress.pipeline.rundir import RunDirectory
from compress.pipeline.storing import stored_outputs
from compress.pipeline.training import keep, train
from compress.surgery import History, save_snapshot

__all__ = ["Teaching", "cache_teacher", "teaching"]

# Trainer arguments that do not change what a teacher becomes.
_NO_MATTER = {"max_epochs", "logger", "default_root_dir", "enable_progress_bar", "enable_model_summary", "profiler"}


@dataclass(frozen=True)
class Teaching:
    """What a student is taught with.

    Args:
        teacher: What a ``Distiller`` takes as its teacher.
        data: Where its batches come from.
    """

    teacher: Any
    data: LightningDataModule


def teaching(run: RunDirectory) -> Teaching:
    """Return the teacher of a run, ready to teach; what it lacks is trained or written first."""
    spec = run.recipe.teacher
    assert spec is not None
    if isinstance(spec.model, OwnTeacher):
        return Teaching(copy.deepcopy(spec.model), run.recipe.data)
    network = _network(run)
    for number, assistant in enumerate(spec.assistants):
        network = _assistant(run, number, assistant, network)
    live = _live(run, network)
    if not spec.cache:
        return Teaching(live, run.recipe.data)
    return Teaching(*stored_outputs(run, live, (user_cache() or run.path) / "outputs"))


def cache_teacher(run: RunDirectory) -> None:
    """Store a teacher's outputs; the teacher is trained first where it has no weights.

    Raises:
        RecipeError: when the recipe has no teacher whose outputs could be stored.
    """
    spec = run.recipe.teacher
    if spec is None or not spec.cache:
        raise RecipeError("teacher.cache: expected a teacher whose outputs are stored, got none. Set it to true.")
    teaching(run)


def _network(run: RunDirectory) -> nn.Module:
    spec = run.recipe.teacher
    assert spec is not None
    kept = run.snapshot("teacher")
    assert isinstance(spec.model, nn.Module)
    finished = spec.max_epochs == 0 or not any(True for _ in spec.model.parameters())
    if not kept.exists() and (spec.checkpoint is not None or finished):
        if spec.checkpoint is not None:
            load_weights(spec.model, spec.checkpoint, key="teacher.checkpoint")
        save_snapshot(kept, spec.model, History())
    key = _key(run)
    folder = user_cache()
    shared = folder / "teachers" / f"{key}.pt" if key and folder else None
    if not kept.exists() and shared is not None and shared.exists():
        run.console.print(f"teacher: trained by an earlier run of this recipe, taken from {shared}", soft_wrap=True)
        _copy(shared, kept)
    if not kept.exists():
        module = train(run, "teacher", copy.deepcopy(spec.model), max_epochs=spec.max_epochs)
        keep(run, "teacher", module)
        if shared is not None and run.is_main_process:
            _copy(kept, shared)
        return module.student
    return run.network("teacher")[0]


def _assistant(run: RunDirectory, number: int, assistant: nn.Module, teacher: nn.Module) -> nn.Module:
    """Teach an assistant (Mirzadeh et al. 2020, arXiv:1902.03393); it has no layers that feature losses could name."""
    spec = run.recipe.teacher
    assert spec is not None
    stage = f"assistant{number}"
    if not run.snapshot(stage).exists():
        losses = [loss for loss in run.recipe.distill.losses if isinstance(loss, ResponseLoss)]
        student, taught = copy.deepcopy(assistant), _live(run, teacher)
        module = train(run, stage, student, max_epochs=spec.max_epochs, teacher=taught, losses=losses)
        keep(run, stage, module)
        return module.student
    return run.network(stage)[0]


def _live(run: RunDirectory, network: nn.Module) -> LiveTeacher:
    spec = run.recipe.teacher
    assert spec is not None
    precision = spec.precision
    if precision is None and spec.cache and "bf16" in str(run.recipe.trainer.get("precision")):
        precision = "bf16"  # outputs are stored outside the Trainer, whose precision a live teacher shares
    channels_last = run.recipe.distill.channels_last
    return LiveTeacher(network, precision=precision, compile=spec.compile, channels_last=channels_last)


def _key(run: RunDirectory) -> str | None:
    config = run.recipe.config
    if config is None:
        return None  # a recipe built from objects has no description of what made them
    names = ("data", "task", "optimizer", "scheduler", "seed")
    made_by = {
        **{name: config.get(name) for name in names},
        "teacher": {name: config["teacher"].get(name) for name in ("model", "checkpoint", "max_epochs")},
        "trainer": {name: value for name, value in config["trainer"].items() if name not in _NO_MATTER},
        "channels_last": config["distill"].get("channels_last"),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(made_by, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
