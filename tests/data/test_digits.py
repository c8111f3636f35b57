from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from compress.data import Digits
from compress.errors import DataError, MissingPackageError

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install -e '.[data]'")


def test_splits_are_the_whole_set_once_and_stratified() -> None:
    from sklearn.datasets import load_digits

    splits = Digits(seed=3).load()
    parts = [splits.train, splits.val, splits.test]
    assert [len(part.labels) for part in parts] == [1197, 200, 400]
    for part in parts:
        shares = np.bincount(part.labels) / len(part.labels)
        np.testing.assert_allclose(shares, np.bincount(load_digits().target) / 1797, atol=0.011)
    # Images may repeat in the set itself, so what must agree is how often each one occurs.
    together = sorted(image.tobytes() for part in parts for image in part.images)
    assert together == sorted(image.astype(np.uint8).tobytes() for image in load_digits().images)


def test_attributes_and_batches() -> None:
    data = Digits(batch_size=32)
    data.setup("fit")
    assert data.input_shape == (1, 8, 8)
    assert data.num_classes == 10
    assert data.labels == list("0123456789")
    x, y, _ = next(iter(data.train_dataloader()))
    assert (x.dtype, x.shape) == (torch.float32, (32, 1, 8, 8))
    assert (y.dtype, y.shape) == (torch.int64, (32,))


def test_another_seed_is_another_split() -> None:
    assert (Digits(seed=0).load().test.images != Digits(seed=1).load().test.images).any()


def test_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingPackageError, match=r"scikit-learn.*pip install -e '\.\[data\]'"):
        Digits().setup()


@pytest.mark.parametrize(("num_val", "num_test"), [(0, 400), (200, 0), (1000, 797)])
def test_refuses_splits_that_leave_nothing(num_val: int, num_test: int) -> None:
    with pytest.raises(DataError, match=f"got {num_val} and {num_test}"):
        Digits(num_val=num_val, num_test=num_test)
