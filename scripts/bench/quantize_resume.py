"""How long a fit of ResNet-18 takes from the start of its process to its first step, when it goes on.

python quantize_resume.py fp32|int8 begin FOLDER    trains for a step and leaves a checkpoint
python quantize_resume.py fp32|int8 go_on FOLDER    prints the seconds until the first step of the fit that goes on
"""

from __future__ import annotations

import time

START = time.perf_counter()

import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
from quantize_networks import Sizes, make  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from compress import QuantizationAwareTraining  # noqa: E402

_SIZES = Sizes(image=64)  # what a resume costs does not depend on it


class Classifier(pl.LightningModule):
    """ResNet-18 and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = make("resnet18", _SIZES)[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Print how long it took to get here, and return the loss."""
        print(f"seconds {time.perf_counter() - START}", flush=True)
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain descent."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main() -> None:
    precision, what, folder = sys.argv[1:]
    checkpoint = Path(folder) / f"{precision}.ckpt"
    x = make("resnet18", _SIZES)[1](4)
    loader = DataLoader(TensorDataset(x, torch.zeros(4, dtype=torch.int64)), batch_size=4)
    callbacks = [] if precision == "fp32" else [QuantizationAwareTraining("int8", start=0.0, attribute="network")]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1 if what == "begin" else 2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(Classifier(), loader, ckpt_path=checkpoint if what == "go_on" else None, weights_only=True)
    if what == "begin":
        trainer.save_checkpoint(checkpoint)


if __name__ == "__main__":
    main()
