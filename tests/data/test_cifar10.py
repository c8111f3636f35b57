from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from compress.data import CIFAR10
from compress.errors import DataError, RecipeError
from tests.data.files import write_cifar10


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable, no hub."""

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.delenv("COMPRESS_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)


def write_rows(path: Path, rows: dict[str, list[Any]]) -> None:
    datasets.Dataset.from_dict(rows).to_parquet(path)


def png(height: int = 32, width: int = 32) -> dict[str, Any]:
    return datasets.Image().encode_example(np.zeros((height, width, 3), dtype=np.uint8))


def test_reads_a_folder_and_keeps_validation_images_out_of_training(tmp_path: Path) -> None:
    written = write_cifar10(tmp_path)
    splits = CIFAR10(str(tmp_path), num_val=20).load()
    assert [len(part.labels) for part in (splits.train, splits.val, splits.test)] == [40, 20, 20]
    assert splits.train.images.dtype == np.uint8
    assert np.bincount(splits.val.labels).tolist() == [2] * 10
    images, labels = written["train"]
    classes = {image.tobytes(): label for image, label in zip(images, labels)}
    for part in (splits.train, splits.val):
        assert [classes.pop(image.tobytes()) for image in part.images] == part.labels.tolist()
    assert not classes
    assert (splits.test.images == written["test"][0]).all()
    assert (splits.test.labels == written["test"][1]).all()


def test_batches_are_channels_first_and_normalised_by_the_training_images(tmp_path: Path) -> None:
    images, _ = write_cifar10(tmp_path)["test"]
    data = CIFAR10(str(tmp_path), num_val=20, batch_size=40)
    x, y, keys = next(iter(data.train_dataloader()))
    assert (x.shape, y.shape, keys.shape) == ((40, 3, 32, 32), (40,), (40, 2))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=2e-3, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=2e-3, rtol=0)
    how = data.preprocessing
    expected = (images[:5] * how["scale"] - how["mean"]) / how["std"]
    seen = next(iter(data.test_dataloader()))[0][:5].permute(0, 2, 3, 1)
    np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-6)
    assert data.labels[3] == "cat"
    assert data.input_shape == (3, 32, 32)


def test_crops_are_windows_of_the_image_with_four_black_pixels_around_it_and_half_are_mirrored(tmp_path: Path) -> None:
    write_cifar10(tmp_path, num_train=120)
    data = CIFAR10(str(tmp_path), num_val=20, batch_size=100, shift=4, flip=True)
    x, y, keys = next(iter(data.train_dataloader()))
    mean, std = (torch.tensor(data.preprocessing[key])[:, None, None] for key in ("mean", "std"))
    raw = ((x * std + mean) / data.preprocessing["scale"]).round().to(torch.uint8)
    splits = data.load()
    mirrored = 0
    for seen, label, (index, _) in zip(raw, y, keys):
        assert label == splits.train.labels[index]
        padded = np.pad(splits.train.images[index], ((4, 4), (4, 4), (0, 0)))
        windows = [padded[top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
        image = seen.permute(1, 2, 0).numpy()
        straight = any((image == window).all() for window in windows)
        flipped = any((image[:, ::-1] == window).all() for window in windows)
        assert straight != flipped
        mirrored += flipped
    assert 30 < mirrored < 70
    assert torch.equal(x, next(iter(CIFAR10(str(tmp_path), 100, num_val=20, shift=4, flip=True).train_dataloader()))[0])


def test_finds_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path / "cifar10", image="img")
    monkeypatch.setenv("COMPRESS_DATA", str(tmp_path))
    assert len(CIFAR10(num_val=10).load().train.labels) == 50
    assert np.bincount(CIFAR10(num_val=10, num_train=20).load().train.labels).tolist() == [2] * 10


def test_reads_the_hub_when_there_are_no_files(nowhere: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images, labels = write_cifar10(tmp_path, image="img")["test"]
    hub = datasets.Dataset.from_parquet(str(tmp_path / "test.parquet"), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hub)
    splits = CIFAR10(num_val=10).load()
    assert (splits.test.images == images).all()
    assert (splits.test.labels == labels).all()


def test_reads_files_without_hugging_face_features(tmp_path: Path) -> None:
    images, labels = write_cifar10(tmp_path)["test"]
    encoded = [datasets.Image().encode_example(image) for image in images]
    write_rows(tmp_path / "test.parquet", {"image": encoded, "label": labels.tolist()})
    assert (CIFAR10(str(tmp_path), num_val=20).load().test.images == images).all()


def test_without_data_it_says_what_to_do(nowhere: None) -> None:
    with pytest.raises(DataError, match=r"COMPRESS_DATA/cifar10 or on the Hugging Face hub.*data\.root"):
        CIFAR10().setup()


def test_a_root_without_a_file_is_an_error_and_not_a_download(nowhere: None, tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(DataError, match=r"data\.root: expected a folder with train.* without test\.parquet"):
        CIFAR10(str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"picture": [png()], "label": [0]}, r"expected columns image \(or img\) and label, got picture, label"),
        ({"image": [png()], "class": [0]}, r"expected columns image \(or img\) and label, got image, class"),
        ({"image": [png()], "label": [10]}, r"column label: expected classes 0 to 9, got \['10'\]"),
        ({"image": [png()], "label": ["cat"]}, r"column label: expected classes 0 to 9, got \['cat'\]"),
        ({"image": [png()], "label": [0.5]}, r"column label: expected classes 0 to 9, got \['0.5'\]"),
        ({"image": [png(), png()], "label": [0, None]}, r"column label: expected classes 0 to 9, got .*'None'"),
        ({"image": [1.5], "label": [0]}, r"column image: expected encoded images, got .*float64"),
        ({"image": [png(), png(28)], "label": [0, 1]}, r"column image, row 1: expected 32x32 pixels, got 28x32"),
        ({"image": [{"bytes": b"no", "path": None}], "label": [0]}, "column image, row 0: expected an image, got"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, rows: dict[str, list[Any]], message: str) -> None:
    write_cifar10(tmp_path)
    write_rows(tmp_path / "train.parquet", rows)
    with pytest.raises(DataError, match=r"train\.parquet.*" + message):
        CIFAR10(str(tmp_path), num_val=20).setup()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    path = tmp_path / "test.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"test\.parquet: expected a parquet file, got Arrow"):
        CIFAR10(str(tmp_path), num_val=20).setup()


def test_refuses_splits_that_leave_nothing(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    with pytest.raises(DataError, match=r"data\.num_val: expected fewer than the 60 training images, got 60"):
        CIFAR10(str(tmp_path), num_val=60).setup()
    with pytest.raises(DataError, match=r"data\.num_train: expected at most 40 images, got 41"):
        CIFAR10(str(tmp_path), num_val=20, num_train=41).setup()
    with pytest.raises(RecipeError, match=r"data\.num_val: expected a positive number, got 0"):
        CIFAR10(num_val=0)
    with pytest.raises(RecipeError, match=r"data\.num_train: expected a positive number, got -1"):
        CIFAR10(num_train=-1)


def test_the_real_files() -> None:
    here = os.environ.get("COMPRESS_DATA")
    if here is None or not (Path(here) / "cifar10" / "train.parquet").is_file():
        pytest.skip("CIFAR-10 is not here: set COMPRESS_DATA to a folder with cifar10/train.parquet and test.parquet")
    data = CIFAR10()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [sum(len(y) for _, y, *_ in loader) for loader in loaders] == [45_000, 5_000, 10_000]
    # Of all 50,000 images: means .4914, .4822, .4465, deviations .2470, .2435, .2616 (a little less after JPEG).
    assert data.preprocessing["mean"] == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)
    assert data.preprocessing["std"] == pytest.approx([0.247, 0.2435, 0.2616], abs=3e-3)
    labels = torch.cat([y for _, y in data.val_dataloader()])
    assert torch.bincount(labels).tolist() == [500] * 10
