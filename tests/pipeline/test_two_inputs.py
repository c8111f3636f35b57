"""A network of two inputs, tokens and their mask, through the whole job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.data import SplitDataModule, TensorSplit, TensorSplits, tensor_datasets
from compress.data.loader import Tensors
from compress.distill import Classification, SoftTarget
from compress.errors import DataError
from compress.pipeline import create_run, run
from compress.quantize import QuantizationAwareTraining
from compress.recipe import Distill, Export, Recipe, Teacher


class Words(SplitDataModule):
    """Sentences of up to six words; the class is whether word 7 is among those that count."""

    def datasets(self) -> dict[str, Tensors]:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, 9, (160, 6), generator=generator)
        mask = (torch.arange(6) < torch.randint(2, 7, (160, 1), generator=generator)).long()
        everything = TensorSplit((tokens, mask), ((tokens == 7) & (mask == 1)).any(1).long())
        parts = [everything.take(torch.arange(start, start + num)) for start, num in ((0, 96), (96, 32), (128, 32))]
        self.labels = ["without", "with"]
        return tensor_datasets(TensorSplits(parts[0], parts[1], parts[2], self.labels))


class Reader(nn.Module):
    """The largest activation over the words that count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.hidden = nn.Linear(16, 16)
        self.fc = nn.Linear(16, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = torch.relu(self.hidden(self.embed(tokens)))
        return self.fc((x * mask.unsqueeze(2).to(x.dtype)).amax(1))


def recipe(**changes: Any) -> Recipe:
    given: dict[str, Any] = {
        "student": Reader(),
        "data": Words(batch_size=16),
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
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("two") / "run"
    run(create_run(recipe(), path=folder))
    return folder


def test_it_learns_what_needs_both(finished: Path) -> None:
    accuracy = json.loads((finished / "test.json").read_text())["final"]["accuracy"]
    assert accuracy > 0.85  # always "without": 0.69; word 7 anywhere, whatever the mask says: 0.66


def test_the_artefact_takes_both(finished: Path) -> None:
    data = Words()
    (tokens, mask), y = next(iter(data.test_dataloader()))
    for engine in ("eager", "onnxruntime"):
        model = compress.load(finished / "artifact", engine=engine)
        assert [spec.shape[1:] for spec in model.manifest.inputs] == [(6,), (6,)]
        assert float((model(tokens, mask).argmax(1) == y).float().mean()) > 0.85
        assert not torch.equal(model(tokens, mask), model(tokens, torch.ones_like(mask)))


def test_the_report_counts_and_times_both(finished: Path) -> None:
    stages = {stage["name"]: stage for stage in json.loads((finished / "report.json").read_text())["stages"]}
    assert stages["teacher"]["macs"] == 6 * 16 * 16 + 16 * 2
    assert {row["engine"] for row in stages["int8 artefact"]["latency"]} == {"eager", "onnxruntime"}


class Named(Words):
    """Gives inputs by name, which captured graphs cannot take."""

    def val_dataloader(self) -> Any:
        return [({"tokens": tokens, "mask": mask}, y) for (tokens, mask), y in super().val_dataloader()]


def test_inputs_by_name_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected batches \(inputs, targets\) of tensors.*several inputs are a tuple"):
        create_run(recipe(data=Named()), path=tmp_path / "run")


def test_a_network_that_takes_one_of_them_is_refused_with_both_shapes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"inputs of shape \(N, 6\) and \(N, 6\) and fits the task"):
        create_run(recipe(student=nn.Embedding(9, 2), teacher=None, distill=Distill([])), path=tmp_path / "run")
