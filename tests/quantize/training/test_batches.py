from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from compress.errors import DataError, EditError
from compress.quantize import QuantizationAwareTraining
from compress.surgery import Captured
from tests.networks import Residual, images, loader, trainer


class Named(Dataset):
    """Samples by name."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, labels = images()
        return {"x": x[index], "y": labels[index]}


class Module(pl.LightningModule):
    """Reads batches of whatever form by a function."""

    def __init__(self, split: Any, *, example: Tensor | None = None) -> None:
        super().__init__()
        self.student: nn.Module = Residual()
        self.split = split
        self.example_input_array = example

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, labels = self.split(batch)
        return nn.functional.cross_entropy(self.student(x), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Ends(Callback):
    """Counts the training batches that ended."""

    num = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.num += 1


def by_name(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["x"], batch["y"]


def first_of_two(batch: Any) -> Any:
    return batch[0]


TWO = {"a": loader(), "b": loader(seed=1)}
PTQ: dict[str, Any] = {"start": 1, "num_batches": 2}
LSQ: dict[str, Any] = {"start": 0.5, "learn_steps": True}


def _fit(module: Module, data: Any, callback: QuantizationAwareTraining, *others: Callback, **limits: Any) -> None:
    trainer(**{"max_epochs": 2, **limits}, callbacks=[callback, *others]).fit(module, data)


@pytest.mark.parametrize("arguments", [PTQ, LSQ])
@pytest.mark.parametrize(
    ("data", "split", "message"),
    [
        (DataLoader(Named(), batch_size=12), by_name, r"batch: expected \(inputs, \.\.\.\) with tensors, got dict"),
        (TWO, lambda batch: batch["a"], r"batch: expected \(inputs, \.\.\.\) with tensors, got dict"),
        (
            list(TWO.values()),
            first_of_two,
            r"example_input_array is like, \(N, 1, 8, 8\) float32, got \(N, 1, 8, 8\) float32 and \(N\) int64",
        ),
    ],
)
def test_batches_that_cannot_be_read_are_refused_at_the_first(
    data: Any, split: Any, message: str, arguments: dict[str, Any]
) -> None:
    ends = Ends()
    with pytest.raises((DataError, EditError), match=rf"{message}.* Give the callback inputs=, a function"):
        _fit(Module(split, example=torch.zeros(2, 1, 8, 8)), data, QuantizationAwareTraining(**arguments), ends)
    assert ends.num == 0


def test_inputs_that_the_network_does_not_take_are_refused_at_the_first_batch() -> None:
    ends = Ends()
    with pytest.raises(DataError, match=r"those of Residual\.forward\(x.*got \(N, 1, 8, 8\) float32 and \(N\) int64"):
        _fit(Module(first_of_two), list(TWO.values()), QuantizationAwareTraining(**PTQ), ends)
    with pytest.raises(EditError, match=r"got dict\. .* or set example_input_array on the LightningModule"):
        _fit(Module(by_name), DataLoader(Named(), batch_size=12), QuantizationAwareTraining(start=0.9), ends)
    assert ends.num == 0


def test_batches_of_other_sizes_than_the_example_are_told_at_the_first() -> None:
    qat = QuantizationAwareTraining(start=0.9)
    message = r"quantize\.lengths: expected batches of the sizes .*\(N, 1, 10, 10\) float32, got \(N, 1, 8, 8\) float32"
    with pytest.warns(UserWarning, match=message):
        _fit(Module(lambda batch: batch, example=torch.zeros(2, 1, 10, 10)), loader(), qat, max_steps=1)


@pytest.mark.parametrize("arguments", [PTQ, LSQ, {"start": 0.5}])
@pytest.mark.parametrize(
    ("data", "split", "inputs"),
    [
        (DataLoader(Named(), batch_size=12), by_name, lambda batch: batch["x"]),
        (TWO, lambda batch: batch["a"], lambda batch: (batch["a"][0],)),
        (list(TWO.values()), first_of_two, lambda batch: batch[0][:1]),
        (CombinedLoader(TWO, "min_size"), lambda batch: batch["b"], lambda batch: batch["b"][0]),
    ],
)
def test_a_function_finds_inputs_in_batches_of_any_form(
    data: Any, split: Any, inputs: Any, arguments: dict[str, Any]
) -> None:
    pl.seed_everything(0)
    module, callback = Module(split), QuantizationAwareTraining(**arguments, inputs=inputs)
    _fit(module, data, callback)
    x, _ = images(12)
    with torch.no_grad():
        trained, integers = module.student.eval()(x), callback.converted(x)
    assert isinstance(module.student, Captured)
    assert float((trained - integers).norm() / trained.norm()) < 5e-3


def test_a_function_that_returns_something_else_is_named() -> None:
    callback = QuantizationAwareTraining(start=1, inputs=lambda batch: ["x", batch[0]])
    with pytest.raises(DataError, match=r"quantize\.inputs: expected a function that returns .*, got str, Tensor"):
        _fit(Module(tuple), loader(), callback)


def test_calibration_sees_what_training_steps_see() -> None:
    # Limits of the Trainer, and what the module's hooks do to batches before and after they are moved.
    seen: list[tuple[str, float]] = []

    class Hooked(Module):
        def on_before_batch_transfer(self, batch: Sequence[Tensor], dataloader_idx: int) -> list[Tensor]:
            return [batch[0] + 1, batch[1]]

        def on_after_batch_transfer(self, batch: Sequence[Tensor], dataloader_idx: int) -> list[Tensor]:
            return [batch[0] * 2, batch[1]]

        def training_step(self, batch: Any, number: int) -> Tensor:
            seen.append(("trained", float(batch[0].sum())))
            return super().training_step(batch, number)

    def inputs(batch: Sequence[Tensor]) -> Tensor:
        seen.append(("read", float(batch[0].sum())))
        return batch[0]

    module, callback = Hooked(tuple), QuantizationAwareTraining(start=1, inputs=inputs)
    _fit(module, loader(shuffle=False), callback, max_epochs=1, limit_train_batches=2)
    assert [who for who, _ in seen] == ["read", "trained", "trained", "read", "read"]  # the first is tried at once
    assert [value for who, value in seen[1:] if who == "trained"] == [value for who, value in seen[1:] if who == "read"]
