"""A loader whose order is a pure function of seed and epoch, and whose position is saved."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

__all__ = ["ResumableLoader", "Tensors", "replicas"]


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
    """A loader whose order its sampler draws from seed and epoch; Lightning keeps the position in its checkpoint.

    Nothing is ever drawn from the global random-number generator.

    Args:
        dataset: Rows; with ``__getitems__`` and without a ``collate_fn``, whole batches.
        batch_size: Rows a batch, on each rank.
        sampler: A ``DistributedSampler``, also in a single process; by default one in the order of the rows.
        seed: Of the generator that seeds worker processes.
        arguments: Of ``DataLoader``.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        sampler: DistributedSampler | None = None,
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        rank, world = replicas()
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=sampler or DistributedSampler(dataset, world, rank, shuffle=False),
            # Without one of its own, a loader draws a seed from the global generator at every epoch.
            generator=torch.Generator().manual_seed(seed),
            **{"collate_fn": _as_they_are, **arguments},
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


def replicas() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _as_they_are(batch: Any) -> Any:
    return batch
