"""What other tools get wrong: dropout's rate, small last batches, integers that are none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from compress.errors import DataError, ExportError
from compress.export import Gates, export_artifact
from compress.quantize import QuantizationAwareTraining, calibrate, convert, prepare
from compress.surgery import Captured
from compress.surgery.capture import export_program
from compress.surgery.lengths import Length
from tests.networks import Residual, images, loader, trainer
from tests.surgery.modules import Foreign, SaveAfter


def test_dropout_of_a_prepared_network_keeps_its_rate_through_switches_of_mode() -> None:
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Dropout(0.2))
    nn.init.eye_(network.get_parameter("0.weight"))
    prepared = prepare(network, [torch.ones(2, 4)], "int8")
    x = torch.ones(5000, 4)
    calibrate(prepared, [(x,)])
    for _ in range(2):
        assert bool((prepared.eval()(x) - 1).abs().max() < 0.02)
        out = prepared.train()(x)
        assert float((out == 0).float().mean()) == pytest.approx(0.2, abs=0.02)
        assert float(out[out != 0].mean()) == pytest.approx(1.25, abs=0.03)


@pytest.mark.parametrize("num", [25, 30])  # the last batch has one sample, or six
def test_a_smaller_last_batch_is_trained_on_as_any_other(num: int) -> None:
    pl.seed_everything(0, verbose=False)
    module = Foreign(Residual())
    qat = QuantizationAwareTraining(start=0.4, freeze_batchnorm=0.8, attribute="net")
    run = trainer(max_epochs=3, callbacks=[qat])
    run.fit(module, loader(num=num, batch_size=12))
    assert run.global_step == 9
    assert isinstance(module.net, Captured)
    x = images(64)[0]
    with torch.no_grad():
        fake, integers = module.net.eval()(x), qat.converted(x)
        assert float((fake - integers).norm() / fake.norm()) < 0.02
        for size in (1, 5):
            assert torch.allclose(module.net(x[:size]), fake[:size], atol=1e-5)


def test_integers_that_are_none_fail_the_gate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, (x, _) = Residual().eval(), images(64)
    for layers, passes in ({}, True), ({"conv*": "float"}, False):
        prepared = prepare(copy.deepcopy(network), [x[:2]], "int8", layers=layers)
        calibrate(prepared, [(x,)])
        program = export_program(convert(prepared.eval()), [x[:2]])

        def export(folder: Path, program: object = program, prepared: nn.Module = prepared) -> object:
            gates = Gates(min_top1_agreement=0.0, max_relative_error=1.0, min_int8_fraction=0.9)
            return export_artifact(
                program,  # type: ignore[arg-type]
                folder,
                targets=["eager", "onnxruntime"],
                reference=prepared,
                held_out=[x],
                scheme="int8",
                gates=gates,
            )

        if passes:
            export(tmp_path / "whole")
        else:
            with pytest.raises(ExportError, match=r"onnxruntime: expected at least 0.9 of the multiply.* in 2 of 4 k"):
                export(tmp_path / "parts")


class Mean(nn.Module):
    """Tokens of any number, over which it takes a mean: their number would become a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Linear(3, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.embed(x)).sum(1) / x.shape[1])


def batches_of_lengths(*lengths: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, size, 3, generator=generator), torch.arange(8) % 3) for size in lengths]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [0.25, 1.0])
def test_other_lengths_than_the_first_are_refused_unless_they_are_named(start: float, tmp_path: Path) -> None:
    batches = batches_of_lengths(6, 12, 4, 9)
    runs: list[tuple[Foreign, QuantizationAwareTraining]] = []
    for lengths, callbacks in ((), []), ([Length(1, 2, 32)], [SaveAfter(tmp_path, [4])]), ([Length(1, 2, 32)], []):
        pl.seed_everything(0, verbose=False)
        module = Foreign(Mean())
        qat = QuantizationAwareTraining(start=start, lengths=lengths, attribute="net")
        run = trainer(max_epochs=2, callbacks=[qat, *callbacks])
        if not lengths:
            with pytest.raises(DataError, match="lengths"):
                run.fit(module, batches)
            continue
        run.fit(module, batches, ckpt_path=None if callbacks else tmp_path / "step_4.ckpt")
        runs.append((module, qat))
    (module, qat), (resumed, _) = runs
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    floats = Mean()
    floats.load_state_dict({name: module.net.state_dict()[name] for name in floats.state_dict()})
    with torch.no_grad():
        for size in (4, 6, 17):
            x = torch.randn(4, size, 3)
            for quantized in (module.net.eval(), resumed.net.eval(), qat.converted):
                assert float((floats(x) - quantized(x)).norm() / floats(x).norm()) < 0.25


def test_layers_rounded_one_by_one_take_named_lengths_in_the_end() -> None:
    class Either(Mean):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if torch.is_grad_enabled() or x.sum().item() < 1e9 else -x)

    module = Foreign(Either())
    lengths = [Length(1, 2, 32)]
    qat = QuantizationAwareTraining(start=0.5, fallback="parametrize", lengths=lengths, attribute="net")
    trainer(max_epochs=1, callbacks=[qat]).fit(module, batches_of_lengths(6, 12, 4, 9))
    x = torch.randn(4, 17, 3)
    with torch.no_grad():
        assert torch.allclose(qat.converted(x), module.net.eval()(x), atol=1e-4)


class ByName(Foreign):
    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(x=batch[0]), batch[1])


def test_a_step_that_gives_inputs_by_name_goes_on_in_integers() -> None:
    module = ByName(Residual())
    trainer(max_epochs=2, callbacks=[QuantizationAwareTraining(start=0.5, attribute="net")]).fit(module, loader())
    assert isinstance(module.net, Captured)
