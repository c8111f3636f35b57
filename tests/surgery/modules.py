"""LightningModules and loaders of a user who knows nothing of us, for the tests of surgery."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data.distributed import DistributedSampler

from compress.data.loader import ResumableLoader, Tensors
from compress.prune import StructuredPruning
from tests.networks import Residual, images

Make = Callable[[Iterable[nn.Parameter]], Optimizer]


class Foreign(pl.LightningModule):
    """A network under an attribute of its own, an optimiser and a scheduler that are given."""

    def __init__(self, network: nn.Module | None = None, make: Make | None = None) -> None:
        super().__init__()
        self.net = Residual(8) if network is None else network
        self.make = make or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)]


class SaveAfter(Callback):
    """Writes a full checkpoint right after given steps, in the middle of an epoch or at its end."""

    def __init__(self, folder: Path, steps: Iterable[int]) -> None:
        self.folder, self.steps = folder, set(steps)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        path = self.folder / f"step_{trainer.global_step}.ckpt"
        if trainer.global_step in self.steps and not path.exists():  # not again while gradients accumulate
            trainer.save_checkpoint(path)


class Moved(Callback):
    """Notes which weights did not move in a step, and the width of the first layer that is pruned."""

    def __init__(self) -> None:
        self.stuck: list[str] = []
        self.widths: list[int] = []
        self._before: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.stuck += [n for n, p in pl_module.named_parameters() if torch.equal(p, self._before[n])]
        name = next(name for name in self._before if name.endswith("conv1.weight"))
        self.widths.append(pl_module.get_parameter(name).shape[0])


def pruning(**changes: Any) -> StructuredPruning:
    values = {"start": 0.2, "end": 0.6, "num_edits": 3, "round_to": 2, "schedule": "linear", "attribute": "net"}
    return StructuredPruning(0.5, **{**values, **changes})


def resumable(num: int = 32, batch_size: int = 8) -> ResumableLoader:
    """Return a shuffled loader whose position a checkpoint holds."""
    rows = Tensors(*images(num))
    return ResumableLoader(rows, batch_size=batch_size, sampler=DistributedSampler(rows, 1, 0, shuffle=True))
