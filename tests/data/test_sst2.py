from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch

from compress.data import SST2
from compress.distill import read_batch
from compress.errors import DataError, RecipeError
from tests.data.files import write_sst2, write_tokenizer

WORDS = "train dev test good 0 1 2 3 4 5 6 7 8 9 fine not so"


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return write_tokenizer(tmp_path / "words.json", WORDS)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable, no hub."""

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.delenv("COMPRESS_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)


def test_batches_are_tokens_and_mask_of_one_length(tokenizer: str, tmp_path: Path) -> None:
    write_sst2(tmp_path)
    data = SST2(tokenizer, root=str(tmp_path), length=4, batch_size=3)
    (tokens, mask), y = next(iter(data.test_dataloader()))
    # "test 0", "test good 1", and "test good good 2", which is cut.
    assert tokens.tolist() == [[2, 6, 8, 3], [2, 6, 7, 3], [2, 6, 7, 3]]
    assert y.tolist() == [0, 1, 0]
    assert SST2(tokenizer, root=str(tmp_path), length=6).load().test.inputs[1].tolist()[0] == [1, 1, 1, 1, 0, 0]
    assert tokens.dtype == mask.dtype == y.dtype == torch.int64
    assert data.labels == ["negative", "positive"]


def test_training_batches_are_what_a_distiller_reads(tokenizer: str, tmp_path: Path) -> None:
    write_sst2(tmp_path)
    data = SST2(tokenizer, root=str(tmp_path), length=6, batch_size=10)
    given = next(iter(data.train_dataloader()))
    batch = read_batch(given)
    train = data.load().train
    assert [tensor.shape for tensor in batch.inputs] == [(10, 6), (10, 6)]
    assert batch.keys is not None
    for tensor, rows in zip((*batch.inputs, batch.targets), (*train.inputs, train.targets)):
        assert torch.equal(tensor, rows[batch.keys[:, 0]])
    (tokens, mask), y, key = data.train_dataloader().dataset[3]
    assert torch.equal(tokens, train.inputs[0][3])
    assert torch.equal(mask, train.inputs[1][3])
    assert (int(y), key.tolist()) == (1, [3, 0])


def test_splits_are_those_of_the_files(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sst2(tmp_path / "sst2")
    monkeypatch.setenv("COMPRESS_DATA", str(tmp_path))
    splits = SST2(tokenizer).load()
    assert [len(part.targets) for part in (splits.train, splits.val, splits.test)] == [10, 6, 4]
    chosen = SST2(tokenizer, num_train=4).load().train
    assert torch.bincount(chosen.targets).tolist() == [2, 2]
    assert all(any(torch.equal(row, one) for one in splits.train.inputs[0]) for row in chosen.inputs[0])


def test_reads_the_hub_when_there_are_no_files(tokenizer: str, nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append(split)
        return datasets.Dataset.from_dict({"text": ["fine", "not so"], "label": [1, 0]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert SST2(tokenizer).load().val.targets.tolist() == [1, 0]
    assert asked == ["train", "validation", "test"]


def test_a_hub_without_labels_is_refused(tokenizer: str, nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = datasets.Dataset.from_dict({"text": ["fine"], "label": [-1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hidden)
    with pytest.raises(DataError, match=r"expected columns text and label with 0 and 1, got \[-1\]"):
        SST2(tokenizer).setup()


def test_without_data_it_says_what_to_do(tokenizer: str, nowhere: None) -> None:
    with pytest.raises(DataError, match=r"COMPRESS_DATA/sst2 or on the Hugging Face hub.*data\.root"):
        SST2(tokenizer).setup()


def test_a_root_without_a_file_is_an_error_and_not_a_download(tokenizer: str, nowhere: None, tmp_path: Path) -> None:
    write_sst2(tmp_path)
    (tmp_path / "dev.tsv").unlink()
    with pytest.raises(DataError, match=r"data\.root: expected a folder with train\.tsv.* without dev\.tsv"):
        SST2(tokenizer, root=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a sentence in each line, got none"),
        ("sentence\tlabel\n", r"line 1: expected a sentence, a tabulator and 0 or 1, got 'sentence\\tlabel'"),
        ("fine\t1\nno label\n", "line 2: expected a sentence, a tabulator and 0 or 1, got 'no label'"),
    ],
)
def test_files_that_do_not_fit(tokenizer: str, tmp_path: Path, text: str, message: str) -> None:
    write_sst2(tmp_path)
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(DataError, match=r"train\.tsv.*" + message):
        SST2(tokenizer, root=str(tmp_path)).setup()


def test_values_that_cannot_be(tokenizer: str, tmp_path: Path) -> None:
    write_sst2(tmp_path)
    with pytest.raises(DataError, match=r"data\.num_train: expected at most 10 sentences, got 11"):
        SST2(root=str(tmp_path), num_train=11).setup()
    with pytest.raises(RecipeError, match=r"data\.length: expected at least 3 tokens, got 2"):
        SST2(length=2)
    with pytest.raises(RecipeError, match=r"data\.num_train: expected a positive number, got 0"):
        SST2(num_train=0)


def test_an_artefact_gets_what_makes_the_tokens(tokenizer: str, tmp_path: Path) -> None:
    write_sst2(tmp_path)
    data = SST2(tokenizer, root=str(tmp_path), length=5)
    data.setup()
    assert data.preprocessing["length"] == 5
    assert data.preprocessing["inputs"] == ["ids", "mask"]
    assert data.preprocessing_files == {"tokenizer.json": Path(tokenizer).read_text()}
