"""Run by test_ddp.py: a fit on two processes that prunes, then quantises; each rank writes what it ended with.

Gradients are accumulated over two batches, and an average of the weights follows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging

from compress.distill import Classification, Distiller, SoftTarget, WarmupCosine
from compress.prune import StructuredPruning
from compress.quantize import QuantizationAwareTraining
from compress.surgery import history_of
from tests.networks import Residual, loader


class Compare(Callback):
    """Collects how far the ranks' parameters are apart after each step, and whether weights move."""

    def __init__(self) -> None:
        self.apart: list[float] = []
        self.kinds: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        flat = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        both = pl_module.all_gather(flat)
        assert isinstance(both, torch.Tensor)
        self.apart.append(float((both[0] - both[1]).abs().max()))
        self.kinds.append(len(history_of(pl_module)))


def main(folder: Path) -> None:
    pl.seed_everything(0, verbose=False)
    module = Distiller(
        Residual(),
        task=Classification(3),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        scheduler=WarmupCosine(),
        teacher=Residual(8),
        losses=[SoftTarget(weight=0.5)],
    )
    compare, average = Compare(), EMAWeightAveraging(decay=0.5)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        accumulate_grad_batches=2,
        default_root_dir=folder,
        callbacks=[
            StructuredPruning(0.5, schedule="linear", start=0.2, end=0.4, num_edits=3, round_to=2),
            QuantizationAwareTraining(start=0.6, freeze_batchnorm=0.9),
            average,
            compare,
        ],
    )
    trainer.fit(module, loader(num=96), loader(seed=1, shuffle=False))
    assert average._average_model is not None
    twin: Any = average._average_model.module
    torch.save(
        {
            "apart": compare.apart,
            "edits": compare.kinds,
            "history": history_of(module).to_list(),
            "state": {name: tensor.clone() for name, tensor in module.student.named_parameters()},
            "average": {name: p.detach().clone() for name, p in twin.student.named_parameters()},
            "moments": len(trainer.optimizers[0].state),
        },
        folder / f"rank{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
