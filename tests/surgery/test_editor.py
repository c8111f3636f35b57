from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compress.errors import EditError
from compress.prune import StructuredPruning
from compress.quantize import QuantizationAwareTraining
from compress.surgery import Captured, ModelEditor, history_of
from compress.surgery.editor import example_inputs
from tests.networks import trainer


@pytest.mark.parametrize("num", [1, 2, 5])
def test_examples_are_two_samples_each(num: int) -> None:
    module = pl.LightningModule()
    (x,) = example_inputs(module, (torch.arange(3.0 * num).view(num, 3), torch.zeros(num)))
    assert x.shape == (2, 3)
    assert x[0].tolist() == [0.0, 1.0, 2.0]


class Two(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.a(batch[0]) + self.b(batch[0])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: Two, *editors: ModelEditor) -> None:
    data = DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=4)
    trainer(max_epochs=1, callbacks=list(editors)).fit(module, data)


@pytest.mark.parametrize("first", [QuantizationAwareTraining, StructuredPruning])
def test_a_second_network_is_refused_before_anything_is_trained(first: type[ModelEditor]) -> None:
    module, second = Two(), QuantizationAwareTraining("int8", start=0.5, attribute="b")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    message = (
        r"\w+\.attribute: expected one network for all edits of a LightningModule, got '[ab]' beside '[ba]'\. Train"
    )
    with pytest.raises(EditError, match=message):
        fit(module, first(attribute="a"), second)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_second_network_is_refused_in_a_later_fit_as_well() -> None:
    module = Two()
    fit(module, QuantizationAwareTraining("int8", start=1, attribute="a"))
    assert isinstance(module.a, Captured)
    with pytest.raises(EditError, match=r"got 'b' beside 'a'"):
        fit(module, QuantizationAwareTraining("int8", start=1, attribute="b"))
    assert history_of(module).count("quantize") == 1
    fit(module, QuantizationAwareTraining("int8", start=1, attribute="a"))
