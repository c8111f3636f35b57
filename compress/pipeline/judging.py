"""A network on the validation split, as measurements of single layers judge it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import nn
from torch.utils.data import DataLoader

from compress.distill import read_batch
from compress.pipeline.rundir import RunDirectory
from compress.prune.sensitivity import judging

__all__ = ["device_of", "judge", "validation"]


def device_of(run: RunDirectory) -> torch.device:
    """Return where the recipe's Trainer would put a network."""
    cpu = str(run.recipe.trainer.get("accelerator", "auto")) == "cpu" or not torch.cuda.is_available()
    return torch.device("cpu" if cpu else "cuda")


def validation(run: RunDirectory) -> tuple[DataLoader, int]:
    """Return the validation loader, and how many of its batches the Trainer would see."""
    run.recipe.data.prepare_data()
    run.recipe.data.setup("fit")
    loader = run.recipe.data.val_dataloader()
    limit = run.recipe.trainer.get("limit_val_batches")
    share = 1.0 if limit is None else limit
    num = share if isinstance(share, int) or share > 1 else share * len(loader)
    return loader, max(1, min(int(num), len(loader)))


def judge(run: RunDirectory, network: nn.Module, batches: Iterable[Any], device: torch.device) -> dict[str, float]:
    """Return the mean loss and the metrics of a network on the validation batches, in float32."""
    task = run.recipe.task
    metrics = task.metrics("").to(device)
    loss, num_samples = 0.0, 0
    with judging(network):
        for batch in batches:
            given = read_batch(move_data_to_device(batch, device))
            outputs = network(*given.inputs, **given.named)
            loss += given.size * float(task.loss(outputs, given.targets))
            metrics.update(outputs, given.targets)
            num_samples += given.size
    return {"loss": loss / num_samples, **{name: float(value) for name, value in metrics.compute().items()}}
