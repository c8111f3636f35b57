"""Samples with keys: index and view, from which alone all augmentation is drawn.

A key is one integer for a sampler, ``view * num_samples + index``, and a pair ``(index, view)`` in a batch. So a
sample's augmented view is the same in any order, in any worker process and on any number of ranks, and what a teacher
says to it can be stored.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from compress.data.loader import ResumableLoader, replicas
from compress.errors import DataError

__all__ = ["KeyedDataset", "KeyedSampler", "keyed_loader", "keyed_uniform", "split_keys"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def keyed_uniform(seed: int, index: Tensor, view: Tensor, num: int) -> Tensor:
    """Return numbers that are a function of seed, sample and view alone, uniform in [0, 1).

    Each is a hash of its coordinates (SplitMix64, Steele et al. 2014, OOPSLA), so none depends on another.

    Args:
        seed: Any integer.
        index: Samples, integers of shape (N,).
        view: View of each, integers of shape (N,).
        num: Numbers for each sample.

    Returns:
        float64, shape (N, num).

    Example:
        >>> one = keyed_uniform(0, torch.tensor([7]), torch.tensor([1]), 2)
        >>> many = keyed_uniform(0, torch.tensor([3, 7]), torch.tensor([0, 1]), 2)
        >>> bool((one[0] == many[1]).all())
        True
    """
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + _GOLDEN)
        state = _mix(state ^ (view.cpu().numpy().astype(np.uint64) + _GOLDEN))
        state = _mix(state ^ (index.cpu().numpy().astype(np.uint64) + _GOLDEN))
        steps = (np.arange(num, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
        bits = _mix(state[:, None] + steps)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def split_keys(keys: Sequence[int] | Tensor, num_samples: int) -> Tensor:
    """Return pairs (index, view), shape (N, 2), of a sampler's integers.

    Example:
        >>> split_keys([3, 13], 10)
        tensor([[3, 0],
                [3, 1]])
    """
    given = torch.as_tensor(keys, dtype=torch.int64)
    return torch.stack([given % num_samples, given // num_samples], dim=1)


class KeyedSampler(DistributedSampler):
    """The order of an epoch, from seed and epoch alone, with a view for each sample.

    Args:
        num_samples: Samples of the data set.
        shuffle: Whether each epoch has another order.
        seed: Of that order.
        num_views: Views that epochs take in turn; without it each epoch has a view of its own.
        view: The one view of all epochs.

    Example:
        >>> sampler = KeyedSampler(3, shuffle=False, num_views=2)
        >>> sampler.set_epoch(3)
        >>> list(sampler)
        [3, 4, 5]
    """

    def __init__(
        self, num_samples: int, *, shuffle: bool, seed: int = 0, num_views: int | None = None, view: int | None = None
    ) -> None:
        rank, world = replicas()
        super().__init__(range(num_samples), world, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.num_all = num_samples
        self.num_views = num_views
        self.view = view

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        view = self.epoch if self.num_views is None else self.epoch % self.num_views
        first = (self.view if self.view is not None else view) * self.num_all
        return (first + index for index in super().__iter__())


class KeyedDataset(Dataset):
    """A data set whose items are asked for by key; whatever an item draws is drawn from generators seeded by it.

    Those are torch's, numpy's and Python's global generators of this process, which are put back afterwards.

    Args:
        dataset: Indexed by integers.
        seed: Of all draws.
    """

    keyed = True

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int) -> tuple[Any, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int]) -> list[tuple[Any, int]]:
        pairs = split_keys(keys, len(self.dataset))
        # Three numbers below 2**32: numpy's generator takes no larger seed.
        seeds = (keyed_uniform(self.seed, pairs[:, 0], pairs[:, 1], 3) * 2**32).to(torch.int64).tolist()
        items = []
        with _generators_restored():
            for key, index, own in zip(keys, pairs[:, 0].tolist(), seeds):
                torch.manual_seed(own[0])
                np.random.seed(own[1])
                random.seed(own[2])
                items.append((self.dataset[index], key))
        return items


def keyed_loader(
    loader: DataLoader, *, seed: int, num_views: int | None = None, view: int | None = None
) -> ResumableLoader:
    """Return a loader of the same samples whose batches carry keys and whose augmentation is drawn by them.

    The order is that of ``KeyedSampler``, shuffled where the loader shuffles; a batch ``(x, y)`` becomes
    ``(x, y, keys)`` with keys (index, view) of shape (N, 2), a mapping gets an entry ``keys``.

    Args:
        loader: Any loader of a data set with indices.
        seed: Of the order and of the augmentation; a data module of this package keeps its own.
        num_views: Views that epochs take in turn; without it each epoch has a view of its own.
        view: The one view of all epochs.

    Raises:
        DataError: when the data set has no indices, or the order or the batches are the user's own.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(4.0), torch.arange(4))
        >>> x, y, keys = next(iter(keyed_loader(DataLoader(data, batch_size=2), seed=0)))
        >>> keys.tolist()
        [[0, 0], [1, 0]]
    """
    _check(loader)
    dataset: Any = loader.dataset
    sampler = loader.sampler
    shuffle = sampler.shuffle if isinstance(sampler, DistributedSampler) else isinstance(sampler, RandomSampler)
    collate: Callable[[Any], Any] | None = loader.collate_fn
    if not getattr(dataset, "keyed", False):
        collate = _Collate(loader.collate_fn, len(dataset))
        dataset = KeyedDataset(dataset, seed)
    elif isinstance(sampler, KeyedSampler):
        seed = sampler.seed
    assert loader.batch_size is not None
    return ResumableLoader(
        dataset,
        batch_size=loader.batch_size,
        sampler=KeyedSampler(len(dataset), shuffle=shuffle, seed=seed, num_views=num_views, view=view),
        num_workers=loader.num_workers,
        collate_fn=collate,
        drop_last=loader.drop_last,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


class _Collate:
    """Collates items as the loader would, and adds their keys."""

    def __init__(self, collate: Callable[[list[Any]], Any], num_samples: int) -> None:
        self.collate = collate
        self.num_samples = num_samples

    def __call__(self, items: list[tuple[Any, int]]) -> Any:
        batch = self.collate([item for item, _ in items])
        keys = split_keys([key for _, key in items], self.num_samples)
        if isinstance(batch, Mapping):
            return {**batch, "keys": keys}
        if isinstance(batch, Tensor):
            return batch, None, keys
        if len(batch) > 2:
            raise DataError(
                f"batch: expected (inputs, targets) to add keys to, got {len(batch)} parts. "
                "Give several inputs as a tuple: ((x1, x2), y)."
            )
        return (*batch, *[None] * (2 - len(batch)), keys)


def _check(loader: DataLoader) -> None:
    if not isinstance(loader, DataLoader):
        raise DataError(
            f"train_dataloader: expected a DataLoader for a cached teacher, got {type(loader).__name__}. "
            "Return one loader, or turn the cache off."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise DataError(
            "train_dataloader: expected a data set with indices for a cached teacher, got an iterable one. "
            "Load it as a map-style data set, or turn the cache off."
        )
    known = (RandomSampler, SequentialSampler, DistributedSampler)
    sampler = loader.sampler
    own_batches = type(loader.batch_sampler) is not BatchSampler
    if not isinstance(sampler, known) or own_batches or getattr(sampler, "replacement", False):
        which = loader.batch_sampler if own_batches else sampler
        raise DataError(
            f"train_dataloader: expected shuffled or sequential batches for a cached teacher, got an order by "
            f"{type(which).__name__}. Use shuffle=True, or turn the cache off."
        )


@contextmanager
def _generators_restored() -> Iterator[None]:
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
