"""Two samples of the data that a Trainer is about to fit, taken without disturbing loaders or random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from compress.errors import DataError

__all__ = ["example_batch"]


def example_batch(trainer: pl.Trainer) -> Any:
    """Return a batch of two training samples.

    Raises:
        DataError: when the loader is of an unknown kind.
    """
    with torch.random.fork_rng(devices=[]):
        return _batch(trainer.fit_loop._data_source.dataloader())


def _batch(loader: Any) -> Any:
    if isinstance(loader, Mapping):
        return {name: _batch(part) for name, part in loader.items()}
    if hasattr(loader, "iterables"):  # Lightning's CombinedLoader
        return _batch(loader.iterables)
    if not isinstance(loader, DataLoader):
        raise DataError(
            f"train_dataloader: expected a DataLoader or a mapping of them, got {type(loader).__name__}. "
            "Losses on activations look at two samples before training."
        )
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        return next(iter(loader))
    # Not through the loader's iterator: that would start its workers.
    if hasattr(dataset, "__getitems__"):
        return loader.collate_fn(dataset.__getitems__([0, 1]))
    return loader.collate_fn([dataset[0], dataset[1]])
