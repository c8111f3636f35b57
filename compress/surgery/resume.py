"""Callbacks that let a killed or interrupted fit go on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint

__all__ = ["RandomStates", "ResumePoint"]


class RandomStates(Callback):
    """Keep the states of all random-number generators in the checkpoint and restore them on resume."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the states of Python's, NumPy's, torch's and each CUDA device's generator."""
        version, keys, gauss = random.getstate()
        name, words, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
        return {
            "python": [version, list(keys), gauss],
            "numpy": [name, torch.from_numpy(np.array(words, dtype=np.int64)), position, has_gauss, cached],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the fit starts: building the loaders and the module draws numbers, too."""
        self._restored = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore what the checkpoint held."""
        if self._restored is None:
            return
        state, self._restored = self._restored, None
        fit_loop = trainer.fit_loop
        fetcher, middle = fit_loop._data_fetcher, fit_loop.restarted_mid_epoch
        if middle and fetcher is not None and fit_loop._combined_loader_states_to_load:
            # Lightning gives loaders their positions when it makes them, and forgets it when a schedule asked for the
            # number of steps, and so for the loaders, before the checkpoint was read.
            fit_loop._load_combined_loader_states()
            iter(fetcher)
        _set_generators(state)
        if not middle and fetcher is not None and trainer.global_step > 0:
            # A loader without a generator of its own draws a seed whenever an epoch begins. Lightning has begun this
            # epoch before the states were restored, and will not do it again.
            iter(fetcher)


class ResumePoint(Checkpoint):
    """Keep one full checkpoint from which a fit goes on bit for bit.

    It is written at the start, after every epoch and, on the first Ctrl-C in a single process, after the step that
    is under way; then ``KeyboardInterrupt`` is raised. A second Ctrl-C stops at once.

    Args:
        path: File to write, always under a temporary name first.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._interrupted = False
        self._previous: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write a first checkpoint and listen to Ctrl-C."""
        if not self.path.exists():
            self._save(trainer)
        if trainer.world_size == 1:
            self._previous = signal.signal(signal.SIGINT, self._on_interrupt)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint and stop, when Ctrl-C was pressed and the gradients are all spent."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        last = batch_idx + 1 == trainer.num_training_batches  # the epoch's end will write one in a moment
        if self._interrupted and stepped and not last:
            self._save(trainer)
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write a checkpoint."""
        self._save(trainer)
        if self._interrupted:
            raise KeyboardInterrupt
        last_step = trainer.global_step == trainer.max_steps
        if trainer.current_epoch + 1 == trainer.max_epochs or last_step or trainer.should_stop:
            self._release()  # nothing is left to write: what comes now, calibration say, may be stopped at once

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back."""
        self._release()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give Ctrl-C back."""
        self._release()

    def _save(self, trainer: pl.Trainer) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, self.path)

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._interrupted:
            self._release()
            raise KeyboardInterrupt
        self._interrupted = True

    def _release(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


def _set_generators(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([entry.cpu() for entry in state["cuda"]])
