"""A loader over tensors in memory whose order is a pure function of seed and epoch, and whose position is saved."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

__all__ = ["ResumableLoader", "Tensors"]


class Tensors(Dataset):
    """Rows of tensors; a whole batch is fetched by one indexing operation.

    Args:
        tensors: All of the same length.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        rows = torch.as_tensor(indices)
        return tuple(tensor[rows] for tensor in self.tensors)


class ResumableLoader(DataLoader):
    """Batches of ``Tensors``; Lightning keeps the position in its checkpoint.

    The order comes from a ``DistributedSampler`` (of one replica in a single process), hence from seed and epoch
    alone, and nothing is ever drawn from the global random-number generator.

    Args:
        tensors: The rows.
        batch_size: Rows a batch, on each rank.
        shuffle: Whether each epoch has another order.
        seed: Of that order.
    """

    def __init__(self, tensors: Tensors, *, batch_size: int, shuffle: bool, seed: int = 0) -> None:
        rank, world = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        super().__init__(
            tensors,
            batch_size=batch_size,
            sampler=DistributedSampler(tensors, world, rank, shuffle=shuffle, seed=seed),
            collate_fn=_as_they_are,
            # Without one of its own, a loader draws a seed from the global generator at every epoch.
            generator=torch.Generator().manual_seed(seed),
        )
        self._position = 0
        self._skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Taken here, not at the first batch: an iterator that is thrown away takes its position along.
        skip, self._skip = self._skip, 0
        return self._batches(skip)

    def _batches(self, skip: int) -> Iterator[Any]:
        self._position = skip
        for batch in islice(super().__iter__(), skip, None):
            self._position += 1
            yield batch
        self._position = 0

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of the epoch have been given out."""
        return {"position": self._position % max(1, len(self))}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next epoch at that batch."""
        self._skip = state_dict["position"]


def _as_they_are(batch: Any) -> Any:
    return batch
