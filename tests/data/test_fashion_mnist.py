from __future__ import annotations

import gzip
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from compress.data import FashionMNIST, fashion_mnist
from compress.errors import DataError, RecipeError
from tests.data.files import pack_idx, write_fashion_mnist

LABELS = "train-labels-idx1-ubyte.gz"


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable, no Debian package, no hub."""

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.delenv("COMPRESS_DATA", raising=False)
    monkeypatch.setattr(fashion_mnist, "_DEBIAN", tmp_path / "absent")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)


def test_reads_a_folder_and_keeps_validation_images_out_of_training(tmp_path: Path) -> None:
    arrays = write_fashion_mnist(tmp_path)
    splits = FashionMNIST(str(tmp_path), num_val=20).load()
    assert [len(part.labels) for part in (splits.train, splits.val, splits.test)] == [40, 20, 20]
    assert np.bincount(splits.val.labels).tolist() == [2] * 10
    seen = {image.tobytes() for image in np.concatenate([splits.train.images, splits.val.images])}
    assert seen == {image.astype(np.uint8).tobytes() for image in arrays["train-images-idx3-ubyte.gz"]}
    assert len(seen) == 60
    assert (splits.test.images == arrays["t10k-images-idx3-ubyte.gz"]).all()
    assert (splits.test.labels == arrays["t10k-labels-idx1-ubyte.gz"]).all()


def test_normalises_by_the_training_images(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    data = FashionMNIST(str(tmp_path), num_val=20, batch_size=40)
    data.setup()
    x, *_ = next(iter(data.train_dataloader()))
    assert abs(float(x.mean())) < 1e-3
    assert abs(float(x.std()) - 1) < 1e-3
    raw = data.load().test.images[:5].astype(np.float32)
    how = data.preprocessing
    expected = (raw * how["scale"] - how["mean"][0]) / how["std"][0]
    np.testing.assert_allclose(next(iter(data.test_dataloader()))[0][:5, 0], expected, rtol=1e-5, atol=1e-6)


def test_finds_an_unpacked_package_and_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion_mnist(tmp_path / "usr/share/datasets/fashion-mnist")
    assert len(FashionMNIST(str(tmp_path), num_val=10).load().train.labels) == 50
    write_fashion_mnist(tmp_path / "mine/fashion-mnist", num_train=30)
    monkeypatch.setenv("COMPRESS_DATA", str(tmp_path / "mine"))
    assert len(FashionMNIST(num_val=10).load().train.labels) == 20


def test_reads_the_hub_when_there_are_no_files(nowhere: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28)).astype(np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    hub = datasets.Dataset.from_dict({"image": list(images), "label": [i % 10 for i in range(30)]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hub)
    splits = FashionMNIST(num_val=10).load()
    assert (splits.test.images == images).all()
    assert splits.test.labels.tolist() == [i % 10 for i in range(30)]


def test_without_data_it_says_what_to_do(nowhere: None) -> None:
    with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist.*dpkg -x.*data\.root"):
        FashionMNIST().setup()


def test_a_root_without_the_files_is_an_error_and_not_a_download(nowhere: None, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root: expected a folder with train-images"):
        FashionMNIST(str(tmp_path)).setup()


def test_a_missing_companion_is_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    (tmp_path / LABELS).unlink()
    with pytest.raises(DataError, match=f"{LABELS}: expected a file, got none"):
        FashionMNIST(str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        (LABELS, np.zeros(59), "expected one label for each of 60 images, got 59"),
        (LABELS, np.full(60, 10), r"expected classes 0 to 9, got \[10\]"),
        ("train-images-idx3-ubyte.gz", np.zeros((60, 8, 8)), r"expected images of 28x28 pixels, got \(8, 8\)"),
        ("train-images-idx3-ubyte.gz", np.zeros((60, 28, 28)), "expected training images that vary"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, file: str, array: np.ndarray, message: str) -> None:
    write_fashion_mnist(tmp_path)
    (tmp_path / file).write_bytes(gzip.compress(pack_idx(array.astype(np.uint8))))
    with pytest.raises(DataError, match=message):
        FashionMNIST(str(tmp_path), num_val=20).setup()


def test_refuses_a_validation_split_that_leaves_nothing(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    with pytest.raises(DataError, match=r"data\.num_val: expected fewer than the 60 training images, got 60"):
        FashionMNIST(str(tmp_path), num_val=60).setup()
    with pytest.raises(RecipeError, match=r"data\.num_val: expected a positive number, got 0"):
        FashionMNIST(num_val=0)


def test_the_real_files() -> None:
    if fashion_mnist._find(None) is None:
        pytest.skip("Fashion-MNIST is not here: set COMPRESS_DATA, or apt-get install dataset-fashion-mnist")
    data = FashionMNIST()
    data.setup()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [sum(len(y) for _, y in loader) for loader in loaders] == [55_000, 5_000, 10_000]
    assert data.preprocessing["mean"] == pytest.approx([0.286], abs=1e-3)
    assert data.preprocessing["std"] == pytest.approx([0.353], abs=1e-3)
    labels = torch.cat([y for _, y in data.val_dataloader()])
    assert torch.bincount(labels).tolist() == [500] * 10
