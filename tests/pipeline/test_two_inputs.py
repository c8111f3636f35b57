"""A network of two inputs, tokens and their mask, through the whole job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compress
from compress.data import SplitDataModule, TensorSplit, TensorSplits, Tokenizer, tensor_datasets
from compress.data.loader import Tensors
from compress.distill import Classification, SoftTarget
from compress.errors import DataError
from compress.pipeline import STEPS, create_run
from compress.quantize import QuantizationAwareTraining
from compress.recipe import Distill, Export, Recipe, Teacher
from tests.data.files import write_tokenizer
from tests.pipeline.reader import Reader


class Words(SplitDataModule):
    """Sentences of up to six words; the class is whether word 7 is among those that count. Others only fill."""

    def __init__(self, tokenizer: str, *, batch_size: int = 128) -> None:
        super().__init__(batch_size=batch_size)
        self.tokenizer = tokenizer

    def datasets(self) -> dict[str, Tensors]:
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(1, 9, (160, 6), generator=generator)
        lengths = torch.randint(2, 7, (160, 1), generator=generator)
        tokenizer = Tokenizer(self.tokenizer, 6)
        self.preprocessing, self.preprocessing_files = tokenizer.preprocessing, tokenizer.files
        self.lines = [" ".join(f"w{word}" for word in row[:num]) for row, num in zip(words.tolist(), lengths)]
        tokens, mask = tokenizer(self.lines)
        tokens = torch.where(mask == 1, tokens, words)
        everything = TensorSplit((tokens, mask), ((tokens == 7) & (mask == 1)).any(1).long())
        parts = [everything.take(torch.arange(start, start + num)) for start, num in ((0, 96), (96, 32), (128, 32))]
        self.labels = ["without", "with"]
        return tensor_datasets(TensorSplits(parts[0], parts[1], parts[2], self.labels))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("words") / "words.json"
    return write_tokenizer(file, " ".join(f"w{number}" for number in range(1, 9)), marks=False)


def recipe(data: Words, **changes: Any) -> Recipe:
    given: dict[str, Any] = {
        "student": Reader(),
        "data": data,
        "task": Classification(2),
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        "teacher": Teacher(Reader(), max_epochs=1),
        "distill": Distill([SoftTarget(weight=0.5)]),
        "quantize": QuantizationAwareTraining("int8", start=0.5),
        "trainer": {"max_epochs": 8, "accelerator": "cpu", "enable_progress_bar": False},
        "export": Export(targets=["eager", "onnxruntime"], min_top1_agreement=0.9, num_held_out=32),
        "baseline": False,
    }
    return Recipe(**{**given, **changes})


@pytest.fixture(scope="module")
def finished(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("two") / "run"
    run = create_run(recipe(Words(tokenizer, batch_size=16)), path=folder)
    for name, step in STEPS.items():
        step(run, **({"seconds": 0.05} if name == "bench" else {}))
    return folder


def test_it_learns_what_needs_both(finished: Path) -> None:
    accuracy = json.loads((finished / "test.json").read_text())["final"]["accuracy"]
    assert accuracy > 0.85  # always "without": 0.69; word 7 anywhere, whatever the mask says: 0.66


def test_the_artefact_takes_both(finished: Path, tokenizer: str) -> None:
    data = Words(tokenizer)
    (tokens, mask), y = next(iter(data.test_dataloader()))
    for engine in ("eager", "onnxruntime"):
        model = compress.load(finished / "artifact", engine=engine)
        assert [spec.shape[1:] for spec in model.manifest.inputs] == [(6,), (6,)]
        assert float((model(tokens, mask).argmax(1) == y).float().mean()) > 0.85
        assert not torch.equal(model(tokens, mask), model(tokens, torch.ones_like(mask)))


def test_the_artefact_reads_the_texts_that_the_network_was_trained_on(finished: Path, tokenizer: str) -> None:
    data = Words(tokenizer)
    (tokens, mask), y = next(iter(data.test_dataloader()))
    lines = data.lines[128:]
    model = compress.load(finished / "artifact", engine="onnxruntime")
    labels, probabilities = model.predict(lines)
    assert sum(label == data.labels[number] for label, number in zip(labels, y.tolist())) > 0.85 * len(y)
    wanted = model(tokens, mask).softmax(1)
    torch.testing.assert_close(torch.from_numpy(probabilities).float(), wanted, atol=1e-5, rtol=0)


def test_the_report_counts_and_times_both(finished: Path) -> None:
    stages = {stage["name"]: stage for stage in json.loads((finished / "report.json").read_text())["stages"]}
    assert stages["teacher"]["macs"] == 6 * 16 * 16 + 16 * 2
    assert {row["engine"] for row in stages["int8 artefact"]["latency"]} == {"eager", "onnxruntime"}


class Named(Words):
    """Gives inputs by name, which captured graphs cannot take."""

    def val_dataloader(self) -> Any:
        return [({"tokens": tokens, "mask": mask}, y) for (tokens, mask), y in super().val_dataloader()]


def test_inputs_by_name_are_refused_before_training(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected batches \(inputs, targets\) of tensors.*several inputs are a tuple"):
        create_run(recipe(Named(tokenizer)), path=tmp_path / "run")


def test_a_network_that_takes_one_of_them_is_refused_with_both_shapes(tokenizer: str, tmp_path: Path) -> None:
    given = recipe(Words(tokenizer), student=nn.Embedding(9, 2), teacher=None, distill=Distill([]))
    with pytest.raises(DataError, match=r"inputs of shape \(N, 6\) and \(N, 6\) and fits the task"):
        create_run(given, path=tmp_path / "run")
