"""Run by test_ddp.py: a fit on two processes with feature losses; each rank writes what it ended with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from compress.data import keyed_loader
from compress.distill import Classification, ContrastiveRepresentation, Distiller, Hint, SoftTarget
from compress.prune import StructuredPruning
from compress.quantize import QuantizationAwareTraining
from compress.surgery import history_of
from tests.networks import Residual, loader, trainer


class Keyed(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        # Made here, where the processes know of each other.
        return keyed_loader(loader(num=96), seed=0)


class Compare(Callback):
    """Collects how far the ranks' parameters are apart after each step, and which samples this rank has seen."""

    def __init__(self) -> None:
        self.apart: list[float] = []
        self.indices: list[int] = []
        self.num_reduced = 0
        self.memory = torch.empty(0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.num_reduced = sum(p.requires_grad for p in trainer.strategy.model.parameters())  # type: ignore[union-attr]
        self.memory = pl_module.get_buffer("losses.2.student_memory").clone()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        flat = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        both = pl_module.all_gather(flat)
        assert isinstance(both, torch.Tensor)
        self.apart.append(float((both[0] - both[1]).abs().max()))
        if trainer.current_epoch == 0:
            self.indices += batch[2][:, 0].tolist()


def main(folder: Path) -> None:
    pl.seed_everything(0, verbose=False)
    module = Distiller(
        Residual(),
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        teacher=Residual(12),
        losses=[
            SoftTarget(weight=0.5),
            Hint({"norm1": "norm1"}),
            ContrastiveRepresentation({"relu": "relu"}, num_samples=96, negatives=8, dim=4),
        ],
    )
    compare = Compare()
    fit = trainer(
        max_epochs=5,
        devices=2,
        strategy="ddp",
        default_root_dir=folder,
        callbacks=[
            StructuredPruning(0.5, start=0.4, end=0.4, num_edits=1, round_to=4),
            QuantizationAwareTraining(start=0.7),
            compare,
        ],
    )
    fit.fit(module, datamodule=Keyed())
    torch.save(
        {
            "apart": compare.apart,
            "indices": compare.indices,
            "num_reduced": compare.num_reduced,
            "memory_before": compare.memory,
            "memory": module.get_buffer("losses.2.student_memory"),
            "history": history_of(module).to_list(),
            "parameters": {name: tensor.detach().clone() for name, tensor in module.named_parameters()},
        },
        folder / f"rank{fit.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
