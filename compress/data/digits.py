"""scikit-learn's handwritten digits: 1,797 images of 8x8 pixels that come with the package."""

from __future__ import annotations

import numpy as np

from compress.data.arrays import ArrayDataModule, ImageSplit, ImageSplits
from compress.data.splits import stratified_split
from compress.errors import DataError, MissingPackageError

__all__ = ["Digits"]


class Digits(ArrayDataModule):
    """Handwritten digits, (1, 8, 8), in 10 classes; by default 1,197 to train, 200 to validate, 400 to test.

    Source: Alpaydin and Kaynak 1998, UCI repository, as in ``sklearn.datasets.load_digits``.

    Args:
        batch_size: Samples in a batch, on each device.
        seed: Of the stratified split and of the order of the training images.
        num_val: Validation images.
        num_test: Test images.
        shift: Training images move up to this many pixels in each direction.

    Raises:
        DataError: when the validation and test images leave none to train on, or one of them is empty.
    """

    def __init__(
        self, batch_size: int = 64, seed: int = 0, num_val: int = 200, num_test: int = 400, shift: int = 0
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, shift=shift, scale=1 / 16)
        if min(num_val, num_test) < 1 or num_val + num_test >= 1797:
            raise DataError(
                f"data.num_val, data.num_test: expected positive numbers below 1797 in sum, got {num_val} and "
                f"{num_test}. Use 200 and 400, say."
            )
        self.num_val = num_val
        self.num_test = num_test

    def load(self) -> ImageSplits:
        """Return the digits, split.

        Raises:
            MissingPackageError: when scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise MissingPackageError("scikit-learn", "data") from error
        digits = load_digits()
        everything = ImageSplit(digits.images.astype(np.uint8), digits.target)
        rest, test = stratified_split(everything.labels, self.num_test, seed=self.seed)
        train, val = stratified_split(everything.labels[rest], self.num_val, seed=self.seed)
        return ImageSplits(
            train=everything.take(rest[train]),
            val=everything.take(rest[val]),
            test=everything.take(test),
            classes=[str(digit) for digit in range(10)],
        )
