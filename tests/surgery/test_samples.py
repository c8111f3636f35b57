from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from compress import QuantizationAwareTraining, StructuredPruning
from compress.errors import CaptureError
from compress.quantize import prepare
from compress.surgery.samples import blaming_samples
from tests.networks import trainer

NODES = 5


class Graph(nn.Module):
    """Nodes (N, V, C) and edges (V, V) that all samples have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 32)
        self.last = nn.Linear(32, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        mixed = torch.einsum("vw,nwc->nvc", edges + torch.eye(NODES), self.first(x))
        return self.last(mixed.relu()).mean(1)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.student = Graph()

    def training_step(self, batch: Any, _: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.student(*inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


MESSAGE = r"inputs: expected the samples in dimension 0 of each, .* got shapes \(8, 5, 6\) and \(5, 5\)\. Repeat"


@pytest.mark.parametrize(
    "callback",
    [
        lambda: QuantizationAwareTraining(start=0.5),
        lambda: QuantizationAwareTraining(start=1),
        lambda: StructuredPruning(0.5, start=0.2, end=0.5),
    ],
)
def test_an_input_without_a_batch_is_named_where_a_capture_fails(callback: Any) -> None:
    batches = [((torch.randn(8, NODES, 6), torch.rand(NODES, NODES)), torch.randint(4, (8,))) for _ in range(4)]
    data: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match=rf"{MESSAGE}.*\((capture|prune): expected"):
        trainer(max_epochs=1, callbacks=[callback()]).fit(Module(), data)


def test_other_examples_than_of_one_batch_are_refused() -> None:
    with pytest.raises(CaptureError, match=MESSAGE):
        prepare(Graph(), [torch.randn(8, NODES, 6), torch.rand(NODES, NODES)], "int8")


def test_errors_on_inputs_with_one_batch_stay_as_they_are() -> None:
    error = CaptureError("capture: expected this, got that. Do something.")
    with pytest.raises(CaptureError) as raised, blaming_samples([torch.zeros(2, 3), torch.zeros(2)]):
        raise error
    assert raised.value is error
