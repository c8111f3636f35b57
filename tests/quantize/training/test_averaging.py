from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, StochasticWeightAveraging
from torch import Tensor, nn

from compress.errors import EditError
from compress.quantize import QuantizationAwareTraining
from compress.quantize.parametrize import freeze
from compress.surgery import Captured, RandomStates
from tests.networks import Residual, images, loader, trainer
from tests.surgery.modules import SaveAfter, resumable


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.student: nn.Module = Residual()
        self.student.dropout.p = 0.0

    def training_step(self, batch: Any, _: int) -> Tensor:
        return nn.functional.cross_entropy(self.student(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Averages(Callback):
    """Keeps the weights at each batch of the epoch that SWA adds."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.current_epoch == 3:
            network: Any = pl_module.student
            self.kept.append({name: p.detach().clone() for name, p in network.named_parameters()})


class SaveAt(Callback):
    """Writes a checkpoint after one batch."""

    def __init__(self, path: Path, *, epoch: int, batch: int) -> None:
        self.path, self.place = path, (epoch, batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == self.place:
            trainer.save_checkpoint(self.path)


def _swa() -> Callback:
    return StochasticWeightAveraging(swa_lrs=0.2, swa_epoch_start=1)


def _branching(self: Residual, x: Tensor) -> Tensor:
    return Residual.forward(self, x if x.mean() > 100 else x + 0)


@pytest.mark.parametrize(
    ("scheme", "fallback", "learn_steps"),
    [("int8", None, False), ("w4a8", None, False), ("int8", "parametrize", False), ("int8", None, True)],
)
def test_weights_that_swa_has_averaged_get_statistics_of_their_own(
    scheme: str, fallback: str | None, learn_steps: bool
) -> None:
    # It adds an epoch without steps for them, in which statistics and ranges must not stand still.
    pl.seed_everything(0)
    module, averages = Module(), Averages()
    if fallback is not None:
        module.student.forward = types.MethodType(_branching, module.student)  # type: ignore[method-assign]
    if learn_steps:
        module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), lr=1e-2)  # type: ignore[method-assign]
    callback = QuantizationAwareTraining(
        scheme, start=0.25, freeze_batchnorm=0.5, fallback=fallback, learn_steps=learn_steps
    )
    trainer(max_epochs=3, callbacks=[callback, _swa(), averages]).fit(module, loader(batch_size=6))
    network: Any = module.student
    assert isinstance(network, Captured) == (fallback is None)
    assert len(averages.kept) == 8
    assert all(torch.equal(p, averages.kept[0][name]) for name, p in network.named_parameters())
    x, _ = images()
    of_batch = copy.deepcopy(network).train()
    freeze(of_batch, False)
    with torch.no_grad():
        wanted = of_batch(x)  # by the statistics of all the data
        assert float((network.eval()(x) - wanted).norm() / wanted.norm()) < 0.1
        assert torch.equal(network(x), callback.converted(x))


def test_nothing_is_quantised_in_the_epoch_that_swa_adds() -> None:
    module = Module()
    callback = QuantizationAwareTraining(start=0.95, freeze_batchnorm=1.0)
    with pytest.warns(UserWarning, match=r"quantize\.start: expected training to go beyond 0\.95 of its steps"):
        trainer(max_epochs=3, callbacks=[callback, _swa()]).fit(module, loader())
    assert not isinstance(module.student, Captured)


def test_a_fit_with_swa_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def fit(*others: Callback, checkpoint: Path | None = None, seed: int = 0) -> Module:
        pl.seed_everything(seed)
        module = Module()
        callbacks = [QuantizationAwareTraining(start=0.25), _swa(), RandomStates(), *others]
        trainer(max_epochs=3, callbacks=callbacks).fit(
            module, resumable(), ckpt_path=checkpoint, weights_only=checkpoint is None
        )
        return module

    whole = fit(SaveAfter(tmp_path, [10]))
    again = fit(checkpoint=tmp_path / "step_10.ckpt", seed=99)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_one_batch_an_epoch_is_enough() -> None:
    pl.seed_everything(0)
    module = Module()
    norm: Any = module.student.norm
    norm.eval().running_mean.normal_(std=0.1)
    norm.running_var.uniform_(0.2, 0.4)
    frozen = {name: norm.get_buffer(name).clone() for name in ("running_mean", "running_var")}
    callback = QuantizationAwareTraining("w4a8", start=0.25, freeze_batchnorm=0.5)
    trainer(max_epochs=6, callbacks=[callback, _swa()]).fit(module, loader(batch_size=48))
    network: Any = module.student
    x, _ = images()
    floats = copy.deepcopy(network).eval()
    for fake in floats.modules():
        if hasattr(fake, "fake_quant_enabled"):
            fake.fake_quant_enabled[0] = 0
    with torch.no_grad():
        wanted = floats(x)
        assert float((network.eval()(x) - wanted).norm() / wanted.norm()) < 0.1
    for name, buffer in frozen.items():
        assert torch.equal(buffer, network.state_dict()[f"norm.{name}"]), name  # no rounding moves it


def test_half_of_the_epoch_that_swa_adds_is_refused(tmp_path: Path) -> None:
    def fit(*others: Callback, checkpoint: Path | None = None) -> None:
        callbacks = [QuantizationAwareTraining(start=0.25), _swa(), *others]
        trainer(max_epochs=3, callbacks=callbacks).fit(
            Module(), resumable(), ckpt_path=checkpoint, weights_only=checkpoint is None
        )

    fit(SaveAt(tmp_path / "half.ckpt", epoch=3, batch=1))
    with pytest.raises(EditError, match="expected a checkpoint from before the epoch that Stoch"):
        fit(checkpoint=tmp_path / "half.ckpt")
