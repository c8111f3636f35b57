"""Three splits in memory and their loaders, whatever a sample is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from compress.data.keyed import KeyedSampler, split_keys
from compress.data.loader import ResumableLoader, Tensors
from compress.errors import DataError, RecipeError

__all__ = ["SplitDataModule", "TensorDataModule", "TensorSplit", "TensorSplits", "tensor_datasets"]


@dataclass(frozen=True)
class TensorSplit:
    """Inputs of a network and their classes.

    Args:
        inputs: One tensor for each input, shape (N, ...).
        targets: Integer classes, shape (N,).
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def __post_init__(self) -> None:
        if any(len(tensor) != len(self.targets) for tensor in self.inputs):
            raise DataError(
                f"data: expected one label for each of {len(self.inputs[0])} samples, got {len(self.targets)}. "
                "Check that both come from the same file set."
            )

    def take(self, indices: Any) -> TensorSplit:
        """Return the samples with these indices."""
        rows = torch.as_tensor(indices)
        return TensorSplit(tuple(tensor[rows] for tensor in self.inputs), self.targets[rows])


@dataclass(frozen=True)
class TensorSplits:
    """What a source gives: three disjoint splits and the names of the classes."""

    train: TensorSplit
    val: TensorSplit
    test: TensorSplit
    classes: Sequence[str]


class SplitDataModule(LightningDataModule):
    """Classification from memory; a subclass says in ``datasets`` what the splits are.

    Batches are ``(x, y)``, those of the training split ``(x, y, keys)``: keys int64 of shape (N, 2), each sample's
    index and view. The order of the training samples is a function of seed and epoch alone, and a fit that resumes
    goes on in the middle of an epoch. After ``setup`` there are ``labels``, the names of the classes, and
    ``num_classes``; and for the artefact ``preprocessing``, with the text of the files that it names in
    ``preprocessing_files``.

    Args:
        batch_size: Samples in a batch, on each device.
        seed: Of the order of the training samples.
        num_workers: Processes that prepare training batches; 0 for none.

    Raises:
        RecipeError: when ``batch_size`` is not positive or ``num_workers`` is negative.
    """

    def __init__(self, *, batch_size: int = 128, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise RecipeError(f"data.batch_size: expected a positive number, got {batch_size}. Use 128, say.")
        if num_workers < 0:
            raise RecipeError(f"data.num_workers: expected 0 or more, got {num_workers}. Use 0 for no processes.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.labels: list[str] = []
        self.preprocessing: dict[str, Any] = {}
        self.preprocessing_files: dict[str, str] = {}
        self._splits: dict[str, Tensors] = {}

    @abstractmethod
    def datasets(self) -> dict[str, Tensors]:
        """Return ``train``, ``val`` and ``test``, and set ``labels`` and whatever else there is after ``setup``.

        Their items are batches; ``train`` is asked for by key.

        Raises:
            DataError: when data are missing or malformed; the message says what to do.
        """

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.labels)

    def setup(self, stage: str | None = None) -> None:
        """Load the data, once."""
        if not self._splits:
            self._splits = self.datasets()

    def train_dataloader(self) -> DataLoader:
        """Return a loader of the training samples, shuffled anew in each epoch."""
        self.setup()
        samples = self._splits["train"]
        sampler = KeyedSampler(len(samples), shuffle=True, seed=self.seed)
        return ResumableLoader(
            samples, batch_size=self.batch_size, sampler=sampler, seed=self.seed, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader:
        """Return a loader of the validation samples, always in the same order."""
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader:
        """Return a loader of the test samples, always in the same order."""
        return self._in_order("test")

    def _in_order(self, name: str) -> DataLoader:
        self.setup()
        return ResumableLoader(self._splits[name], batch_size=self.batch_size)


class TensorDataModule(SplitDataModule):
    """A ``SplitDataModule`` of tensors as they are; a subclass says in ``load`` where they come from."""

    @abstractmethod
    def load(self) -> TensorSplits:
        """Return all samples.

        Raises:
            DataError: when they are missing or malformed; the message says what to do.
        """

    def datasets(self) -> dict[str, Tensors]:
        """Return the three splits."""
        splits = self.load()
        self.labels = list(splits.classes)
        return tensor_datasets(splits)


def tensor_datasets(splits: TensorSplits) -> dict[str, Tensors]:
    """Return data sets of samples that are given as they are.

    A batch's x is a tensor, or a tuple of tensors where the network has several inputs.

    Example:
        >>> split = TensorSplit((torch.zeros(2, 3), torch.ones(2, 3)), torch.tensor([0, 1]))
        >>> (x, mask), y, keys = tensor_datasets(TensorSplits(split, split, split, "ab"))["train"].__getitems__([1, 2])
        >>> y.tolist(), keys.tolist()
        ([1, 0], [[1, 0], [0, 1]])
    """
    return {"train": _Keyed(splits.train), "val": _Samples(splits.val), "test": _Samples(splits.test)}


class _Samples(Tensors):
    """Rows of a split; batches are ``(x, y)``."""

    def __init__(self, split: TensorSplit) -> None:
        super().__init__(*split.inputs, split.targets)

    def __getitem__(self, index: int) -> Any:
        x, *rest = self.__getitems__([index])
        return (tuple(part[0] for part in x) if isinstance(x, tuple) else x[0], *(part[0] for part in rest))

    def __getitems__(self, indices: list[int]) -> Any:
        *inputs, targets = super().__getitems__(indices)
        return tuple(inputs) if len(inputs) > 1 else inputs[0], targets


class _Keyed(_Samples):
    """Training samples, asked for by key; batches are ``(x, y, keys)``."""

    keyed = True

    def __getitems__(self, keys: list[int]) -> Any:
        pairs = split_keys(keys, len(self))
        return (*super().__getitems__(pairs[:, 0].tolist()), pairs)
