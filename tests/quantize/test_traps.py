"""What other tools get wrong: dropout's rate, small last batches, integers that are none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from compress.errors import ExportError
from compress.export import Gates, export_artifact
from compress.quantize import QuantizationAwareTraining, calibrate, convert, prepare
from compress.surgery import Captured
from compress.surgery.capture import export_program
from tests.networks import Residual, images, loader, trainer
from tests.surgery.modules import Foreign


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
