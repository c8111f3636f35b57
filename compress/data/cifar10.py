"""CIFAR-10 from two parquet files or the Hugging Face hub, whichever is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import track

from compress.data.arrays import ArrayDataModule, ImageSplit, ImageSplits
from compress.data.splits import stratified_split
from compress.errors import DataError, RecipeError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["CIFAR10"]

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SHAPE = (32, 32, 3)
_HUB = "uoft-cs/cifar10"
_FILES = {"train": "train.parquet", "test": "test.parquet"}
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMN = "label"


class CIFAR10(ArrayDataModule):
    """Small photographs, (3, 32, 32), in 10 classes: 50,000 to train and validate, 10,000 to test.

    Source: Krizhevsky 2009, *Learning multiple layers of features from tiny images*. The files are looked for in
    ``root``; without one in ``$COMPRESS_DATA/cifar10``, then on the Hugging Face hub. ``shift: 4`` and ``flip: true``
    are what is customary: crops of images with four black pixels around them, half of them mirrored.

    Args:
        root: Folder with ``train.parquet`` and ``test.parquet``, whose columns are ``image`` (or ``img``; encoded
            images, as Hugging Face writes them) and ``label``.
        batch_size: Samples in a batch, on each device.
        seed: Of the stratified choice of validation images and of the order of the training images.
        num_val: Images of the training set that are kept for validation.
        shift: Training images move up to this many pixels in each direction.
        flip: Half of the training images are mirrored left to right.
        num_train: Train on this many of the other images, with each class's share; all by default.
        num_workers: Processes that prepare training batches; 0 for none.

    Raises:
        RecipeError: when ``num_val`` or ``num_train`` is not positive.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        seed: int = 0,
        num_val: int = 5000,
        shift: int = 0,
        flip: bool = False,
        num_train: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, shift=shift, flip=flip, num_workers=num_workers)
        for name, value in (("num_val", num_val), ("num_train", num_train)):
            if value is not None and value < 1:
                raise RecipeError(f"data.{name}: expected a positive number, got {value}. Use 5000, say.")
        self.root = root
        self.num_val = num_val
        self.num_train = num_train

    def load(self) -> ImageSplits:
        """Return the images, with ``num_val`` of the training set split off.

        Raises:
            DataError: when there are no files, a file is damaged, or nothing is left to train on.
        """
        folder = _find(self.root)
        train, test = (_read_hub(name) if folder is None else _read_file(folder / _FILES[name]) for name in _FILES)
        total, num_train = len(train.labels), self.num_train
        if self.num_val >= total:
            raise DataError(
                f"data.num_val: expected fewer than the {total} training images, got {self.num_val}. Use 5000, say."
            )
        if num_train is not None and num_train > total - self.num_val:
            raise DataError(
                f"data.num_train: expected at most {total - self.num_val} images, got {num_train}. "
                "Leave it out for all."
            )
        rest, val = stratified_split(train.labels, self.num_val, seed=self.seed)
        if num_train is not None:
            rest = rest[stratified_split(train.labels[rest], num_train, seed=self.seed)[1]]
        return ImageSplits(train=train.take(rest), val=train.take(val), test=test, classes=_CLASSES)


def _find(root: str | None) -> Path | None:
    """Return the folder with the files, or None when only the hub is left."""
    if root is not None:
        missing = [file for file in _FILES.values() if not (Path(root) / file).is_file()]
        if missing:
            raise DataError(
                f"data.root: expected a folder with {' and '.join(_FILES.values())}, got {root} without "
                f"{' and '.join(missing)}. Give the folder that holds both, or leave root out."
            )
        return Path(root)
    here = os.environ.get("COMPRESS_DATA")
    folder = Path(here) / "cifar10" if here else None
    return folder if folder is not None and (folder / _FILES["train"]).is_file() else None


def _read_file(path: Path) -> ImageSplit:
    import datasets
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path}: expected a parquet file, got {type(error).__name__}: {str(error)[:200]}. Fetch it again."
        ) from error
    # In memory: load_dataset would leave a second copy of the file in its cache.
    return _read(datasets.Dataset(datasets.table.InMemoryTable(table)), str(path))


def _read_hub(name: str) -> ImageSplit:
    import datasets

    try:
        dataset = datasets.load_dataset(_HUB, split=name)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            "data: expected CIFAR-10 in $COMPRESS_DATA/cifar10 or on the Hugging Face hub, got neither (hub: "
            f"{type(error).__name__}). Put {' and '.join(_FILES.values())} into a folder and set data.root to it."
        ) from error
    return _read(dataset, _HUB)


def _read(dataset: Dataset, source: str) -> ImageSplit:
    """Decode every image; the split is uint8, (N, 32, 32, 3)."""
    import datasets
    import pyarrow

    column = next((name for name in _IMAGE_COLUMNS if name in dataset.column_names), None)
    if column is None or _LABEL_COLUMN not in dataset.column_names:
        raise DataError(
            f"{source}: expected columns image (or img) and label, got {', '.join(dataset.column_names)}. "
            "Rename the columns."
        )
    labels = np.asarray(dataset.with_format(None)[_LABEL_COLUMN][:])
    if len(labels) == 0 or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(_CLASSES):
        got = sorted({str(label) for label in labels.tolist()})[:12]
        raise DataError(f"{source}, column label: expected classes 0 to 9, got {got}. Fetch the file again.")
    images = np.empty((len(labels), *_SHAPE), dtype=np.uint8)
    decoder = datasets.Image()
    try:
        encoded = dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))[column]
    except (TypeError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{source}, column {column}: expected encoded images, got {dataset.features[column]}. "
            "Write it with Hugging Face's Image feature."
        ) from error
    rows = enumerate(track(encoded, total=len(labels), description=f"Reading {Path(source).name}", transient=True))
    for row, value in rows:
        try:
            image = np.asarray(decoder.decode_example(value).convert("RGB"))
        except Exception as error:  # whatever an image library raises
            raise DataError(
                f"{source}, column {column}, row {row}: expected an image, got {type(error).__name__}: "
                f"{str(error)[:100]}. Fetch the file again."
            ) from error
        if image.shape != _SHAPE:
            raise DataError(
                f"{source}, column {column}, row {row}: expected 32x32 pixels, got {image.shape[0]}x{image.shape[1]}. "
                "Fetch the file again."
            )
        images[row] = image
    return ImageSplit(images, labels.astype(np.int64))
