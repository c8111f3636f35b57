"""Positions and random numbers come back, in mid-epoch too, whether or not a schedule asks for the loaders early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data.distributed import DistributedSampler

from compress.data.loader import ResumableLoader, Tensors
from compress.distill import Classification, Distiller, WarmupCosine
from compress.surgery import RandomStates, ResumePoint
from tests.networks import Residual, images


class Batches(Callback):
    """Notes what each step saw; presses Ctrl-C, so to speak, at one of them."""

    def __init__(self, stop: tuple[int, int] | None = None) -> None:
        self.seen: list[tuple[int, int, float, float]] = []
        self.stop = stop

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        draw = float(torch.get_rng_state().float().sum())
        self.seen.append((trainer.current_epoch, index, float(batch[0].sum()), draw))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        if (trainer.current_epoch, arguments[-1]) == self.stop:
            next(c for c in trainer.callbacks if isinstance(c, ResumePoint))._interrupted = True  # type: ignore[attr-defined]


def fit(
    path: Path, *, seed: int, scheduled: bool, limit: float, stop: Any = None
) -> list[tuple[int, int, float, float]]:
    pl.seed_everything(seed, verbose=False)
    module = Distiller(
        Residual(8),
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        scheduler=WarmupCosine() if scheduled else None,
    )
    batches = Batches(stop)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_train_batches=limit,
        default_root_dir=path.parent,
        callbacks=[RandomStates(), batches, ResumePoint(path)],
    )
    rows = Tensors(*images(48))
    train = ResumableLoader(rows, batch_size=8, sampler=DistributedSampler(rows, 1, 0, shuffle=True))
    try:
        trainer.fit(module, train, ckpt_path=path if path.exists() else None, weights_only=True)
    except SystemExit:
        assert stop is not None
    return batches.seen


@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.parametrize("limit", [1.0, 4])
@pytest.mark.parametrize("stop", [(0, 1), (1, 0), (1, 2), (1, 3)])
def test_the_rest_of_the_epoch_follows(tmp_path: Path, scheduled: bool, limit: float, stop: tuple[int, int]) -> None:
    whole = fit(tmp_path / "whole.ckpt", seed=0, scheduled=scheduled, limit=limit)
    first = fit(tmp_path / "last.ckpt", seed=0, scheduled=scheduled, limit=limit, stop=stop)
    assert first[-1][:2] == stop
    rest = fit(tmp_path / "last.ckpt", seed=1, scheduled=scheduled, limit=limit)
    assert first + rest == whole
