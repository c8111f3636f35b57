"""How far a fit has got, whichever way its end is set and whoever steps its optimisers."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import GradientAccumulationScheduler

from compress.errors import EditError

__all__ = ["length", "progress"]


def length(trainer: pl.Trainer) -> tuple[float, float]:
    """Return how many optimiser steps and how many epochs a fit runs, whichever limit ends it.

    In manual optimisation, steps are batches. Epochs are not a number (NaN) where a loader has no length.

    Raises:
        EditError: when the Trainer has no end, or the loader no length to reckon it from.
    """
    steps = float(trainer.estimated_stepping_batches)
    if steps in (math.inf, -1):
        raise _endless(trainer)
    each = (
        math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if math.isfinite(trainer.num_training_batches)
        else math.nan
    )
    return steps, steps / each if each else math.nan


def progress(trainer: pl.Trainer) -> float:
    """Return the fraction of training done, in [0, 1]; it never falls during a fit.

    With one optimiser that Lightning steps, it is the fraction of optimiser steps. In manual optimisation Lightning
    counts every optimiser's steps, and while accumulation is scheduled a step changes its size: there it is the
    fraction of batches, or of ``max_steps`` where that limit comes first.

    Raises:
        EditError: when the Trainer has no end, or the loader no length to reckon it from, so that no fraction exists.
    """
    if _steps_are_even(trainer):
        total = trainer.estimated_stepping_batches
        fractions = [trainer.global_step / total] if total not in (float("inf"), 0, -1) else []
    else:
        fractions = _fractions(trainer)
    if not fractions:
        raise _endless(trainer)
    return min(1.0, max(fractions))


def _endless(trainer: pl.Trainer) -> EditError:
    if trainer.max_epochs not in (None, -1) and trainer.num_training_batches == math.inf:
        return EditError(
            "trainer.max_steps: expected a number, since the training loader has no length and what fraction of "
            f"{trainer.max_epochs} epochs is done cannot be told, got none. Set max_steps, or limit_train_batches to "
            "a number of batches."
        )
    return EditError("trainer.max_epochs: expected a bounded fit, got none. Set max_epochs or max_steps.")


def _steps_are_even(trainer: pl.Trainer) -> bool:
    if not trainer.lightning_module.automatic_optimization:
        return False
    schedules = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    return all(len(schedule.scheduling) == 1 for schedule in schedules)


def _fractions(trainer: pl.Trainer) -> list[float]:
    fractions = []
    if trainer.max_steps != -1:
        fractions.append(trainer.global_step / max(1, trainer.max_steps))
    if trainer.max_epochs not in (None, -1):
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()  # as Lightning does when asked for its number of steps
        batches = trainer.num_training_batches
        if batches not in (float("inf"), 0):
            epochs: Any = trainer.fit_loop.epoch_progress.current
            begun = epochs.started > epochs.completed  # otherwise the last epoch's count of batches still stands there
            done = epochs.completed * batches + (trainer.fit_loop.epoch_loop.batch_idx if begun else 0)
            fractions.append(done / (batches * max(1, trainer.max_epochs or 1)))
    return fractions
