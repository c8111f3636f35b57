"""Fashion-MNIST from a folder, the Debian package or the Hugging Face hub, whichever is there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from rich.progress import track

from compress.data.arrays import ArrayDataModule, ImageSplit, ImageSplits
from compress.data.idx import read_idx
from compress.data.splits import stratified_split
from compress.errors import DataError, RecipeError

__all__ = ["FashionMNIST"]

_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_NO_LABEL = -100
_DEBIAN = Path("usr/share/datasets/fashion-mnist")
_HUB = "zalando-datasets/fashion_mnist"
_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


class FashionMNIST(ArrayDataModule):
    """Articles of clothing, (1, 28, 28), in 10 classes: 60,000 to train and validate, 10,000 to test.

    Source: Xiao et al. 2017, arXiv:1708.07747. The files are looked for in ``root``; without one in
    ``$COMPRESS_DATA/fashion-mnist``, then where Debian's package ``dataset-fashion-mnist`` puts them, then on the
    Hugging Face hub.

    Args:
        root: Folder with the four ``.gz`` files, or the one into which the Debian package was unpacked.
        batch_size: Samples in a batch, on each device.
        seed: Of the stratified choice of validation images and of the order of the training images.
        num_val: Images of the training set that are kept for validation.
        shift: Training images move up to this many pixels in each direction.
        flip: Half of the training images are mirrored left to right.
        num_train: Train on this many of the other images, with each class's share; all by default.
        num_labeled: Keep the labels of this many of them, with each class's share; the others get -100 and are taught
            by the teacher alone. All by default.
        num_workers: Processes that prepare training batches; 0 for none.

    Raises:
        RecipeError: when ``num_val``, ``num_train`` or ``num_labeled`` is not positive.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 256,
        seed: int = 0,
        num_val: int = 5000,
        shift: int = 0,
        flip: bool = False,
        num_train: int | None = None,
        num_labeled: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, shift=shift, flip=flip, num_workers=num_workers)
        for name, value in (("num_val", num_val), ("num_train", num_train), ("num_labeled", num_labeled)):
            if value is not None and value < 1:
                raise RecipeError(f"data.{name}: expected a positive number, got {value}. Use 5000, say.")
        self.root = root
        self.num_val = num_val
        self.num_train = num_train
        self.num_labeled = num_labeled

    def load(self) -> ImageSplits:
        """Return the images, with ``num_val`` of the training set split off.

        Raises:
            DataError: when there are no files, a file is damaged, or nothing is left to train on.
        """
        folder = _find(self.root)
        read = {name: _read_hub(name) if folder is None else _read_folder(folder, name) for name in _FILES}
        if self.num_val >= len(read["train"].labels):
            raise DataError(
                f"data.num_val: expected fewer than the {len(read['train'].labels)} training images, "
                f"got {self.num_val}. Use 5000, say."
            )
        rest, val = stratified_split(read["train"].labels, self.num_val, seed=self.seed)
        train = _choose(read["train"].take(rest), self.num_train, "num_train", seed=self.seed)[1]
        if self.num_labeled is not None:
            unlabeled, labeled = _choose(train, self.num_labeled, "num_labeled", seed=self.seed)
            nothing = np.full(len(unlabeled.labels), _NO_LABEL, dtype=np.int64)
            train = ImageSplit(
                np.concatenate([labeled.images, unlabeled.images]),
                np.concatenate([labeled.labels.astype(np.int64), nothing]),
            )
        return ImageSplits(train=train, val=read["train"].take(val), test=read["test"], classes=_CLASSES)


def _choose(split: ImageSplit, num: int | None, key: str, *, seed: int) -> tuple[ImageSplit, ImageSplit]:
    """Return the images that are left and those that are chosen; all are chosen without a number."""
    total = len(split.labels)
    if num is not None and num > total:
        raise DataError(f"data.{key}: expected at most {total} images, got {num}. Leave it out for all.")
    rest, chosen = stratified_split(split.labels, total if num is None else num, seed=seed)
    return split.take(rest), split.take(chosen)


def _find(root: str | None) -> Path | None:
    """Return the folder with the files, or None when only the hub is left."""
    if root is not None:
        candidates = [Path(root), Path(root) / _DEBIAN]
    else:
        here = os.environ.get("COMPRESS_DATA")
        candidates = [Path(here) / "fashion-mnist"] if here else []
        candidates.append(Path("/") / _DEBIAN)
    first = _FILES["train"][0]
    for folder in candidates:
        if (folder / first).is_file():
            return folder
    if root is not None:
        raise DataError(
            f"data.root: expected a folder with {first} and its three companions, got {root}. "
            "Give the folder that holds the .gz files, or leave root out."
        )
    return None


def _read_folder(folder: Path, name: str) -> ImageSplit:
    images_file, labels_file = (folder / file for file in _FILES[name])
    for path in (images_file, labels_file):
        if not path.is_file():
            raise DataError(f"{path}: expected a file, got none. Put all four .gz files into one folder.")
    split = ImageSplit(read_idx(images_file, num_dims=3), read_idx(labels_file, num_dims=1))
    if split.images.shape[1:] != (28, 28):
        raise DataError(
            f"{images_file}: expected images of 28x28 pixels, got {split.images.shape[1:]}. Fetch it again."
        )
    _check_classes(split, str(labels_file))
    return split


def _read_hub(name: str) -> ImageSplit:
    import datasets

    try:
        dataset = datasets.load_dataset(_HUB, split=name)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data: expected Fashion-MNIST in $COMPRESS_DATA/fashion-mnist, in /{_DEBIAN} or on the Hugging Face hub, "
            f"got none of them (hub: {type(error).__name__}). Install it with: apt-get install dataset-fashion-mnist. "
            "Without root: apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist*.deb FOLDER, and "
            "set data.root to FOLDER."
        ) from error
    rows = track(dataset, total=len(dataset), description=f"Reading Fashion-MNIST ({name})")
    images, labels = zip(*((np.asarray(row["image"]), row["label"]) for row in rows), strict=True)
    split = ImageSplit(np.stack(images), np.array(labels))
    _check_classes(split, _HUB)
    return split


def _check_classes(split: ImageSplit, source: str) -> None:
    if len(split.labels) == 0 or split.labels.max() >= len(_CLASSES):
        raise DataError(
            f"{source}: expected classes 0 to 9, got {sorted(set(split.labels.tolist()))}. Fetch the labels again."
        )
