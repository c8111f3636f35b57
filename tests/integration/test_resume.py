"""A fit that died goes on bit for bit: from any epoch, in the middle of pruning and of quantization-aware training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from compress.distill import Classification, Distiller, SoftTarget, WarmupCosine
from compress.prune import StructuredPruning
from compress.quantize import QuantizationAwareTraining
from compress.surgery import Captured, RandomStates, ResumePoint, history_of
from tests.networks import Residual, loader

EPOCHS = 6


class KeepEach(Callback):
    """Copies the resume point after every epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shutil.copy(self.path, self.path.with_name(f"before_epoch_{trainer.current_epoch}.ckpt"))


def build(seed: int = 0) -> Distiller:
    pl.seed_everything(7)
    teacher = Residual(8)
    pl.seed_everything(seed)  # all that a checkpoint must make good for
    return Distiller(
        Residual(),
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        scheduler=WarmupCosine(),
        teacher=teacher,
        losses=[SoftTarget(weight=0.5)],
    )


def fit(
    module: Distiller, path: Path, resume: Path | None = None, extra: tuple[Any, ...] = (), accelerator: str = "cpu"
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=path.parent,
        callbacks=[
            StructuredPruning(0.5, schedule="linear", start=0.1, end=0.5, num_edits=3, round_to=2),
            QuantizationAwareTraining(start=0.6, freeze_batchnorm=0.8),
            RandomStates(),
            ResumePoint(path),
            *extra,
        ],
    )
    trainer.fit(module, loader(), loader(seed=1, shuffle=False), ckpt_path=resume, weights_only=True)
    return trainer


def weights(module: Distiller) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.student.state_dict().items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Distiller]:
    folder = tmp_path_factory.mktemp("fit")
    module = build()
    fit(module, folder / "last.ckpt", extra=(KeepEach(folder / "last.ckpt"),))
    return folder, module


def test_the_fit_prunes_and_quantizes(uninterrupted: tuple[Path, Distiller]) -> None:
    _, module = uninterrupted
    history = history_of(module)
    assert history.count("prune") == 3
    assert history.count("quantize") == 1
    assert isinstance(module.student, Captured)
    assert module.student.state_dict()["conv1.weight"].shape == (16, 8, 3, 3)


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_resumed_equals_uninterrupted(uninterrupted: tuple[Path, Distiller], epoch: int, tmp_path: Path) -> None:
    folder, module = uninterrupted
    resumed = build(seed=99)
    fit(resumed, tmp_path / "last.ckpt", resume=folder / f"before_epoch_{epoch}.ckpt")
    expected, got = weights(module), weights(resumed)
    assert list(expected) == list(got)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
