"""Whatever a callback has seen and planned is in the checkpoint: a resumed fit equals an uninterrupted one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from compress.data import keyed_loader
from compress.prune import Removal, StructuredPruning, Target
from compress.surgery import RandomStates, ResumePoint, history_of
from tests.networks import Residual, images, trainer
from tests.prune.test_callback import Foreign

SETTINGS: dict[str, dict[str, Any]] = {
    "penalty": {"removal": Removal(penalty="growing", strength=1.0, lead=0.2)},
    "soft": {"removal": Removal("soft")},
    "gradients": {"criterion": "taylor"},
    "activations": {"criterion": "activation_mean", "removal": Removal(recalibrate=3)},
    "sensitivity": {"allocation": "sensitivity", "target": Target(macs=0.5)},
}


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def fit(folder: Path, settings: dict[str, Any], stop: int | None = None) -> Foreign:
    pl.seed_everything(0, verbose=False)
    network = Residual()
    module, path = Foreign(network), folder / "resume.ckpt"
    callbacks: list[Callback] = [
        StructuredPruning(
            0.5, schedule="linear", start=0.3, end=0.6, num_edits=2, round_to=2, attribute="backbone", **settings
        ),
        RandomStates(),
        *([Stop(stop)] if stop is not None else []),
        ResumePoint(path),
    ]
    run = trainer(max_epochs=6, callbacks=callbacks, enable_checkpointing=True)
    loader = keyed_loader(DataLoader(TensorDataset(*images()), batch_size=12, shuffle=True), seed=0)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        run.fit(module, loader, ckpt_path=path if path.exists() else None, weights_only=True)
    return module


@pytest.mark.parametrize("name", SETTINGS)
def test_resuming_is_bit_for_bit(name: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = fit(tmp_path / "whole", SETTINGS[name])
    assert history_of(whole).count("prune") == (1 if name == "soft" else 2)
    # 24 steps, four an epoch: between the choice and the edit, or between two edits.
    fit(tmp_path / "stopped", SETTINGS[name], stop=10)
    again = fit(tmp_path / "stopped", SETTINGS[name])
    assert history_of(again) == history_of(whole)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
