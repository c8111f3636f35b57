from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn

from compress.export import export_artifact
from compress.export.onnx.recurrent import quantize_recurrent
from compress.models import LSTMClassifier
from compress.quantize import calibrate, convert, coverage, prepare
from compress.quantize.graph.annotate import FEWEST_UNITS
from compress.surgery import Captured
from compress.surgery.capture import export_program


class Both(nn.Module):
    """Two layers in both directions, without biases, read at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 16, 2, bias=False, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0].mean(1))


class Gated(nn.Module):
    """As few units of a GRU as are faster in integers."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, FEWEST_UNITS, batch_first=True)
        self.fc = nn.Linear(FEWEST_UNITS, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(x)[0].mean(1))


SERIES = torch.randn(40, 9, 4, generator=torch.Generator().manual_seed(0))
NETWORKS = {"forward": lambda: LSTMClassifier(4, 3, hidden=17), "both": Both, "gru": Gated}


@pytest.fixture(scope="module", params=NETWORKS)
def prepared(request: pytest.FixtureRequest) -> Captured:
    """One that has been trained a little with fake quantization."""
    torch.manual_seed(0)
    network = NETWORKS[request.param]()
    prepared = prepare(network.train(), [SERIES[:2]], "int8")
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.3)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(prepared(SERIES), (SERIES.mean((1, 2)) > 0).long()).backward()
        optimizer.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())
    calibrate(prepared.eval(), [(SERIES,)])
    return prepared


def test_all_products_are_in_integers(prepared: Captured) -> None:
    assert coverage(prepared, [SERIES]).share == 1.0
    weights = [tensor for tensor in convert(prepared).state_dict().values() if tensor.dim() == 2]
    assert {tensor.dtype for tensor in weights} == {torch.int8}


def test_the_artefact_runs_in_integers_and_agrees(prepared: Captured, tmp_path: Path) -> None:
    program = export_program(convert(prepared), (SERIES[:2],))
    manifest = export_artifact(
        program,
        tmp_path / "artifact",
        targets=["onnxruntime"],
        reference=prepared,
        held_out=(SERIES,),
        scheme="int8",
    )
    target = manifest.targets["onnxruntime"]
    assert target.census["float_kernels"] == 0
    assert any("DynamicQuantize" in name for name in target.census["details"])
    assert target.census["int8_macs"] == target.census["macs"]
    assert target.agreement["relative_error"] < 0.05
    num_weights = sum(parameter.numel() for parameter in prepared.parameters())
    assert (tmp_path / "artifact" / target.file).stat().st_size < 55_000 + num_weights


def test_float_weights_stay() -> None:
    model = _translate(LSTMClassifier(4, 3, hidden=8).eval())
    assert quantize_recurrent(model) == 0
    assert [node.op_type for node in model.graph.node].count("LSTM") == 1


def _translate(network: nn.Module) -> ModelProto:
    translated = torch.onnx.export(export_program(network, (SERIES[:2],)), dynamo=True, verbose=False)
    assert translated is not None
    return translated.model_proto
