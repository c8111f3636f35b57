"""The base of our data modules: raw images in memory, whole batches by one index operation.

The order of the samples is a function of the seed and the epoch alone, and so is each sample's augmentation: a fit
that resumes sees what an uninterrupted one would, in any number of worker processes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.data.augment import flip_images, shift_images
from compress.data.keyed import keyed_uniform, split_keys
from compress.data.loader import Tensors
from compress.data.samples import SplitDataModule
from compress.errors import DataError, RecipeError

__all__ = ["ArrayDataModule", "ImageSplit", "ImageSplits"]


@dataclass(frozen=True)
class ImageSplit:
    """Raw images and their classes.

    Args:
        images: Shape (N, H, W) or (N, H, W, C), as stored.
        labels: Integer classes, shape (N,).
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise DataError(
                f"data: expected one label for each of {len(self.images)} images, got {len(self.labels)}. "
                "Check that both come from the same file set."
            )

    def take(self, indices: np.ndarray) -> ImageSplit:
        """Return the samples with these indices."""
        return ImageSplit(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class ImageSplits:
    """What a source gives: three disjoint splits and the names of the classes."""

    train: ImageSplit
    val: ImageSplit
    test: ImageSplit
    classes: Sequence[str]


class ArrayDataModule(SplitDataModule):
    """Image classification from memory; a subclass says in ``load`` where the images come from.

    Batches are ``(x, y)``: x float32 of shape (N, C, H, W), normalised by ``preprocessing``; y int64 of shape (N,).
    Those of the training split are ``(x, y, keys)``: keys int64 of shape (N, 2), each sample's index and view. After
    ``setup`` there are:

    - ``labels``, the names of the classes, and ``num_classes``;
    - ``input_shape``, (C, H, W);
    - ``preprocessing``, ``{"scale", "mean", "std", "layout"}``: ``x = (raw * scale - mean) / std`` for raw images laid
      out as ``layout`` says; mean and std are those of the training images, one for each channel.

    Training images are augmented, each epoch anew, by draws from (seed, index, view) alone; validation and test images
    never are.

    Args:
        batch_size: Samples in a batch, on each device.
        seed: Of the split and of the order of the training images.
        shift: Training images move up to this many pixels in each direction.
        flip: Half of the training images are mirrored left to right.
        scale: Factor that brings raw values to [0, 1].
        num_workers: Processes that prepare training batches; 0 for none.

    Raises:
        RecipeError: when ``batch_size`` is not positive, or ``shift`` or ``num_workers`` is negative.
    """

    def __init__(
        self,
        *,
        batch_size: int = 128,
        seed: int = 0,
        shift: int = 0,
        flip: bool = False,
        scale: float = 1 / 255,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if shift < 0:
            raise RecipeError(f"data.shift: expected 0 or more pixels, got {shift}. Use 0 for no shifts.")
        self.shift = shift
        self.flip = flip
        self.input_shape: tuple[int, ...] = ()
        self._scale = scale

    @abstractmethod
    def load(self) -> ImageSplits:
        """Return all raw images.

        Raises:
            DataError: when they are missing or malformed; the message says what to do.
        """

    def datasets(self) -> dict[str, Tensors]:
        """Return the three splits; training images are augmented."""
        source = self.load()
        mean, std = _moments(source.train.images, self._scale)
        splits: dict[str, Tensors] = {
            name: _Images(getattr(source, name), scale=self._scale, mean=mean, std=std) for name in ("val", "test")
        }
        splits["train"] = _Augmented(
            source.train, scale=self._scale, mean=mean, std=std, seed=self.seed, shift=self.shift, flip=self.flip
        )
        self.labels = list(source.classes)
        self.preprocessing = {"scale": self._scale, "mean": mean, "std": std, "layout": "NCHW"}
        self.input_shape = tuple(splits["train"].tensors[0].shape[1:])
        return splits

    def held_out(self, num: int) -> Tensor:
        """Return the first ``num`` validation inputs (all, when there are fewer), shape (num, C, H, W)."""
        self.setup()
        split = self._splits["val"]
        return split.__getitems__(list(range(min(num, len(split)))))[0]


class _Images(Tensors):
    """Raw images, (N, C, H, W), and labels, (N,); what is taken from them is normalised."""

    def __init__(self, split: ImageSplit, *, scale: float, mean: list[float], std: list[float]) -> None:
        images = torch.from_numpy(np.ascontiguousarray(split.images))
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
        super().__init__(images, torch.from_numpy(np.array(split.labels, dtype=np.int64)))
        self._scale = scale
        self._mean = torch.tensor(mean)[:, None, None]
        self._std = torch.tensor(std)[:, None, None]

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(rows[0] for rows in self.__getitems__([index]))

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        images, labels = super().__getitems__(indices)
        return (images.to(torch.float32) * self._scale - self._mean) / self._std, labels


class _Augmented(_Images):
    """Training images, asked for by key; batches are ``(x, y, keys)``."""

    keyed = True

    def __init__(self, split: ImageSplit, *, seed: int, shift: int, flip: bool, **preprocessing: Any) -> None:
        super().__init__(split, **preprocessing)
        self._seed = seed
        self._shift = shift
        self._flip = flip
        # What a raw value of zero becomes.
        self._background = (-self._mean / self._std).flatten()

    def __getitems__(self, keys: list[int]) -> tuple[Tensor, ...]:
        pairs = split_keys(keys, len(self))
        x, y = super().__getitems__(pairs[:, 0].tolist())
        if self._shift or self._flip:
            draws = keyed_uniform(self._seed, pairs[:, 0], pairs[:, 1], 3)
            if self._shift:
                offsets = (draws[:, :2] * (2 * self._shift + 1)).floor().long() - self._shift
                x = shift_images(x, offsets, fill=self._background)
            if self._flip:
                x = flip_images(x, draws[:, 2] < 0.5)
        return x, y, pairs


def _moments(images: np.ndarray, scale: float) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of (N, H, W[, C]) images, to four places."""
    pixels = images.reshape(-1, images.shape[3] if images.ndim == 4 else 1)
    mean = pixels.mean(axis=0, dtype=np.float64) * scale
    std = np.array([channel.std(dtype=np.float64) for channel in pixels.T]) * scale
    if not (std > 1e-4).all():
        raise DataError(
            f"data: expected training images that vary in every channel, got standard deviations {std.tolist()}. "
            "Check the files."
        )
    return mean.round(4).tolist(), std.round(4).tolist()
