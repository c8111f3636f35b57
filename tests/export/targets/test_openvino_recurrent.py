from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.export.parity import check_parity, reference_outputs
from compress.export.samples import note_drawn
from compress.export.targets import openvino
from compress.measure.machine import has_vnni
from compress.models import LSTMClassifier
from compress.quantize import calibrate, convert, prepare
from compress.runtime.engines import make_engine
from compress.runtime.engines import openvino as engine_module
from compress.surgery import Captured
from compress.surgery.capture import export_program
from compress.surgery.lengths import Length

library = pytest.importorskip("openvino", reason="the extra `openvino` is not installed")

in_integers = pytest.mark.skipif(not has_vnni(), reason="without VNNI, integers of 8 bits are computed in floats")
CLASSES = torch.arange(200) % 3
SERIES = torch.randn(200, 6, 6, generator=torch.Generator().manual_seed(0))
SERIES[torch.arange(200), :, CLASSES] += 1.0


class Both(nn.Module):
    """Two layers in both directions, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 20, 2, bias=False, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0].mean(1))


class Filtered(nn.Module):
    """An LSTM behind a convolution, that starts from what it has learned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 16, 3)
        self.lstm = nn.LSTM(16, 24, batch_first=True)
        self.fc = nn.Linear(24, 3)
        self.start = nn.Parameter(torch.randn(2, 1, 1, 24))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        hidden, cell = (state.expand(1, len(x), 24).contiguous() for state in (self.start[0].tanh(), self.start[1]))
        outputs, (hidden, cell) = self.lstm(x, (hidden, cell))
        return self.fc(outputs.mean(1)), hidden[0], cell[0]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "stacked": (lambda: LSTMClassifier(6, 3, hidden=32, num_layers=3), 3),
    "both": (Both, 4),
    "filtered": (Filtered, 1),
}


@in_integers
@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        pytest.param("stacked", "int8", marks=pytest.mark.slow),
        ("both", "int8_portable"),
        pytest.param("filtered", "int8", marks=pytest.mark.slow),
        ("filtered", "int8_portable"),
    ],
)
def test_every_lstm_is_in_integers_and_agrees(kind: str, scheme: str, tmp_path: Path) -> None:
    make, num = NETWORKS[kind]
    torch.manual_seed(0)
    prepared = trained(make(), SERIES, scheme)
    path = tmp_path / openvino.FILE
    census = openvino.build(export_program(convert(prepared), (SERIES[:2],)), path)
    assert (census.details["RNNSeq u8"], census.float_kernels) == (num, 0)
    found = check_parity(make_engine("openvino", path), reference_outputs(prepared, [SERIES]), [SERIES])
    for parity in (found.batches, found.singles):
        assert parity.relative_error < 0.05, parity
        assert parity.top1_agreement >= 0.99, parity


@in_integers
@pytest.mark.parametrize(("inputs", "hidden"), [pytest.param(1.0, 4.0, marks=pytest.mark.slow), (6.0, 1.0)])
def test_weights_of_different_ranges_keep_their_values(inputs: float, hidden: float, tmp_path: Path) -> None:
    network = LSTMClassifier(6, 3, hidden=32, num_layers=2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.mul_(inputs if "weight_ih" in name else hidden if "weight_hh" in name else 1.0)
    assert error(network, SERIES, "int8_portable", tmp_path) < 0.08


@in_integers
@pytest.mark.parametrize(
    "size", [pytest.param(0.05, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.slow), 20.0]
)
def test_inputs_may_have_any_range(size: float, tmp_path: Path) -> None:
    assert error(LSTMClassifier(6, 3, hidden=32, num_layers=2), size * SERIES, "int8_portable", tmp_path) < 0.05


@in_integers
def test_series_may_be_of_any_length(tmp_path: Path) -> None:
    prepared = trained(LSTMClassifier(6, 3, hidden=32), SERIES, "int8_portable", lengths=[Length(1, 4)])
    path = tmp_path / openvino.FILE
    program = export_program(convert(prepared), (SERIES[:2],), lengths=[Length(1, 4)])
    assert openvino.build(program, path).float_kernels == 0
    engine = make_engine("openvino", path)
    for shorter in (SERIES, SERIES[:50, :4]):
        found = check_parity(engine, reference_outputs(prepared, [shorter]), [shorter])
        assert found.batches.relative_error < 0.05


def test_narrow_weights_stay_narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "has_vnni", lambda: False)
    assert error(LSTMClassifier(6, 3, hidden=32, num_layers=2), SERIES, "int8_reduced", tmp_path) < 0.05
    operators = library.Core().read_model(str(tmp_path / openvino.FILE)).get_ops()
    constants = [node.data for node in operators if node.get_type_name() == "Constant" and node.data.dtype == np.int8]
    assert len(constants) == 5
    assert max(int(np.abs(values.astype(np.int16)).max()) for values in constants) <= 64


def test_without_vnni_it_computes_in_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engine_module, openvino):
        monkeypatch.setattr(module, "has_vnni", lambda: False)
    assert error(LSTMClassifier(6, 3, hidden=32, num_layers=2), SERIES, "int8_portable", tmp_path) < 0.01
    nodes = engine_module.compile_model(tmp_path / openvino.FILE, None).get_runtime_model().get_ordered_ops()
    notes = [node.get_rt_info() for node in nodes]
    kinds = {str(note["runtimePrecision"].astype(str)) for note in notes if note["layerType"].astype(str) == "RNNSeq"}
    assert kinds == {"f32"}


def test_examples_that_say_nothing_leave_floats(tmp_path: Path) -> None:
    prepared = trained(LSTMClassifier(6, 3, hidden=32), SERIES, "int8_portable")
    path = tmp_path / openvino.FILE
    census = openvino.build(export_program(convert(prepared), (torch.zeros(2, 6, 6),)), path)
    assert census.details["RNNSeq f32"] == 1
    found = check_parity(make_engine("openvino", path), reference_outputs(prepared, [SERIES]), [SERIES])
    assert found.batches.relative_error < 0.01


@in_integers
def test_of_random_examples_no_range_is_learned(tmp_path: Path) -> None:
    """The graph says it of what comes from another LSTM; the first stays in floats."""
    torch.manual_seed(0)
    prepared = trained(NETWORKS["stacked"][0](), SERIES, "int8")
    path = tmp_path / openvino.FILE
    program = export_program(convert(prepared), (SERIES[:2],))
    note_drawn(program)
    census = openvino.build(program, path)
    assert (census.details["RNNSeq u8"], census.details["RNNSeq f32"]) == (2, 1)
    found = check_parity(make_engine("openvino", path), reference_outputs(prepared, [SERIES]), [SERIES])
    assert found.batches.relative_error < 0.05


def trained(network: nn.Module, inputs: Tensor, scheme: str, lengths: Sequence[Length] = ()) -> Captured:
    optimizer = torch.optim.Adam(network.train().parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        outputs = network(inputs)
        nn.functional.cross_entropy(outputs[0] if isinstance(outputs, tuple) else outputs, CLASSES).backward()
        optimizer.step()
    prepared = prepare(network.eval(), (inputs[:2],), scheme, lengths=lengths)
    calibrate(prepared, [(inputs,)])
    prepared.eval()
    return prepared


def error(network: nn.Module, inputs: Tensor, scheme: str, folder: Path) -> float:
    prepared = trained(network, inputs, scheme)
    path = folder / openvino.FILE
    openvino.build(export_program(convert(prepared), (inputs[:2],)), path)
    found = check_parity(make_engine("openvino", path), reference_outputs(prepared, [inputs]), [inputs])
    return found.batches.relative_error
