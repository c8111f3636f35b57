"""Batches and weights that are not finite: the former move no range, the latter become no integers.

With float16, a scaler leaves out steps whose gradients overflow.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchao.quantization.pt2e import MovingAverageMinMaxObserver

from compress.errors import EditError
from compress.quantize import QuantizationAwareTraining, calibrate, convert, prepare
from compress.quantize.fakes.fake import RangeFakeQuantize
from compress.quantize.fakes.lsq import learn_steps
from compress.quantize.fakes.moving import MovingFakeQuantize
from compress.quantize.layers import make_assignment
from compress.quantize.parametrize import make_permanent, parametrize
from compress.surgery import history_of
from tests.networks import Residual, images, loader, trainer
from tests.surgery.modules import Foreign

SCHEMES = ["int8", "int8_portable", "w4a8", "w4a4", "int16x8", "fp8"]
ADDED = 6  # of eight batches, in the second half


def plain() -> nn.Module:
    """A network without BatchNorm, whose statistics a batch of NaN leaves as NaN in any training."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)
    )


def spoilt(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[1, 0, 2, 2] = value
    return x


def ranges(network: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in network.named_buffers() if name.endswith(("_val", "scale", "zero_point"))}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("place", [0, 2])
def test_a_batch_of_nan_leaves_no_trace(scheme: str, place: int) -> None:
    torch.manual_seed(0)
    batches = list(images(48)[0].split(12))
    one = prepare(plain(), [batches[0][:2]], scheme).train()
    two = copy.deepcopy(one)
    for number, batch in enumerate(batches):
        if number == place:
            assert two(spoilt(batch, math.nan)).isnan().any()  # and a scaler leaves its step out
        assert torch.equal(one(batch), two(batch))
    for name, value in ranges(one).items():
        assert value.isfinite().all(), name
        assert torch.equal(value, ranges(two)[name]), name
    x = images(8, seed=1)[0]
    assert torch.equal(convert(one.eval())(x), convert(two.eval())(x))


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [MovingFakeQuantize, RangeFakeQuantize])
def test_a_range_stays_where_extremes_are_not_finite(
    kind: Any, bad: float, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiled, all is left to PyTorch's kernel, as on a GPU.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    fake = kind(
        observer=MovingAverageMinMaxObserver,
        quant_min=0,
        quant_max=255,
        dtype=torch.uint8,
        qscheme=torch.per_tensor_affine,
    )
    good = torch.tensor([-1.0, 2.0, 0.5])
    fake(torch.tensor([bad, 1.0, -9.0]))
    assert math.isinf(fake.activation_post_process.max_val)
    fake(good)
    before = {name: value.clone() for name, value in fake.state_dict().items()}
    assert before["activation_post_process.max_val"] == 2
    got = fake(torch.tensor([bad, 1.0, -9.0]))
    assert got.isnan().any() or not math.isnan(bad)
    fake.observer_enabled[0] = 0  # ranges stand still, late in a fit and in evaluation
    assert fake(torch.tensor([bad, 1.0, -9.0])).isnan().any() or not math.isnan(bad)
    fake.observer_enabled[0] = 1
    for name, value in fake.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.allclose(fake(good), good, atol=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("training", [False, True])
def test_a_weight_that_is_not_finite_shows_and_is_not_converted(scheme: str, training: bool) -> None:
    torch.manual_seed(0)
    x = images(12)[0]
    prepared = prepare(plain(), [x[:2]], scheme).train()
    prepared(x)
    with torch.no_grad():
        prepared.get_parameter("2.weight")[3, 1] = math.nan
    assert prepared.train(training)(x).isnan().any()
    assert all(bool(value.isfinite().all()) for value in ranges(prepared).values())
    with pytest.raises(EditError, match=r"convert: expected finite weights and statistics, got others in '2\.weight'"):
        convert(prepared)


def test_what_else_has_diverged_is_named() -> None:
    x = images(12)[0]
    prepared = prepare(Residual(), [x[:2]], "int8").train()
    prepared(x)
    prepared(spoilt(x, math.nan))
    with pytest.raises(EditError, match=r"got others in 'norm\.running_mean'"):
        convert(prepared)
    learned = prepare(plain(), [x[:2]], "int8").train()
    calibrate(learned, [(x,)])
    (name, *_) = (name for name, _ in learn_steps(learned).named_parameters() if name.endswith("log_scale"))
    with torch.no_grad():
        learned.get_parameter(name).fill_(math.inf)
    with pytest.raises(EditError, match=f"got others in '{name}'"):
        convert(learned)
    layers = parametrize(plain(), make_assignment("int8")).train()
    layers(x)
    with torch.no_grad():
        dict(layers.named_parameters())["2.weight"][3, 1] = math.nan
    assert layers(x).isnan().any()
    with pytest.raises(EditError, match=r"got others in '2\.weight'"):
        make_permanent(layers, [x[:2]])


@pytest.mark.parametrize("scheme", ["int8", "w4a8"])
def test_a_range_that_has_seen_nothing_finite_is_named(scheme: str) -> None:
    x = images(12)[0]
    prepared = prepare(plain(), [x[:2]], scheme).train()
    prepared(spoilt(x, math.nan))
    with pytest.raises(EditError, match=r"convert: expected a range for what '0' takes at '\w+', got none: no batch"):
        convert(prepared)


class LeaveOut(Callback):
    """Makes nothing of steps whose gradients are not finite, as a scaler does."""

    def __init__(self) -> None:
        self.num = 0

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            self.num += 1
            for gradient in gradients:
                gradient.zero_()


@pytest.mark.parametrize("scheme", ["int8", "w4a8"])
@pytest.mark.parametrize("fallback", [None, "parametrize"])
def test_a_fit_goes_on_after_a_batch_of_nan(scheme: str, fallback: str | None) -> None:
    pl.seed_everything(0, verbose=False)
    x, y = images(96)
    x[12 * ADDED] = math.nan
    module, left_out = Foreign(plain()), LeaveOut()
    qat = QuantizationAwareTraining(scheme, start=0.4, freeze_batchnorm=1.0, fallback=fallback, attribute="net")
    run = trainer(max_epochs=1, callbacks=[qat, left_out])
    run.fit(module, DataLoader(TensorDataset(x, y), batch_size=12))
    assert left_out.num == 1
    for name, value in ranges(module.net).items():
        assert value.isfinite().all(), name
    held_out = images(64, seed=1)[0]
    with torch.no_grad():
        fake, integers = module.net.eval()(held_out), qat.converted(held_out)
    assert float((fake - integers).norm() / fake.norm()) < 0.02


class Overflows(Callback):
    """Counts the steps that the scaler has left out, and those of them after the network was quantised."""

    def __init__(self) -> None:
        self.left_out: list[bool] = []
        self._before: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        stuck = all(torch.equal(p, before) for p, before in zip(pl_module.parameters(), self._before))
        if history_of(pl_module).count("quantize"):
            self.left_out.append(stuck)


@pytest.mark.parametrize("scheme", ["int8", "w4a8"])
def test_a_fit_in_float16_whose_scaler_leaves_steps_out(scheme: str) -> None:
    pl.seed_everything(0, verbose=False)
    module, overflows = Foreign(Residual()), Overflows()
    qat = QuantizationAwareTraining(scheme, start=0.4, freeze_batchnorm=0.9, attribute="net")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_factor=8.0, growth_interval=2)
    run = trainer(max_epochs=6, callbacks=[qat, overflows], plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    run.fit(module, loader())
    assert len(overflows.left_out) == 14
    assert 2 <= sum(overflows.left_out) <= 10
    for name, value in module.net.state_dict().items():
        assert value.isfinite().all(), name
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    held_out = images(64, seed=1)[0]
    with torch.no_grad():
        fake, integers = module.net.eval()(held_out), qat.converted(held_out)
    assert float((fake - integers).norm() / fake.norm()) < 0.02
