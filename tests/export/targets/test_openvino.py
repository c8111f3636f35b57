from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.export.parity import check_parity, reference_outputs
from compress.export.targets import openvino
from compress.quantize import calibrate, convert, prepare
from compress.runtime.engines import make_engine
from compress.runtime.engines import openvino as engine_module
from compress.surgery.capture import export_program
from tests.export.networks import KINDS, network
from tests.export.programs import floating, quantized
from tests.export.targets.checks import check_outputs

pytest.importorskip("openvino", reason="the extra `openvino` is not installed")


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_module(kind: str, tmp_path: Path) -> None:
    for name, census in check_outputs(openvino, "openvino", kind, tmp_path).items():
        assert (census.int8_kernels > 0) == (name == "integers"), census


def test_every_layer_of_a_residual_net_becomes_an_integer_kernel(tmp_path: Path) -> None:
    census = openvino.build(quantized().program, tmp_path / openvino.FILE)
    assert (census.int8_kernels, census.float_kernels) == (7, 0)
    assert census.details == {"Convolution u8": 6, "FullyConnected u8": 1, "FakeQuantize": 1}
    assert {entry.name for entry in tmp_path.iterdir()} == {openvino.FILE, *openvino.PARTS}


def test_a_float_program_has_float_kernels(tmp_path: Path) -> None:
    census = openvino.build(floating().program, tmp_path / openvino.FILE)
    assert (census.int8_kernels, census.float_kernels) == (0, 7)
    assert b"site-packages" not in (tmp_path / openvino.FILE).read_bytes()


def test_results_stay_when_the_next_batch_comes_and_inputs_may_lie_as_they_like(tmp_path: Path) -> None:
    openvino.build(floating().program, tmp_path / openvino.FILE)
    engine = make_engine("openvino", tmp_path / openvino.FILE, num_threads=1)
    assert engine.threads == 1
    inputs = floating().inputs.numpy()
    first = engine([inputs[:3]])[0]
    kept = first.copy()
    engine([inputs[3:6]])
    np.testing.assert_array_equal(first, kept)
    turned = np.ascontiguousarray(inputs.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    with torch.no_grad():
        wanted = floating().reference(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(engine([turned])[0], wanted, atol=1e-4)


def test_without_exact_sums_it_computes_in_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("cnn")
    path = tmp_path / openvino.FILE
    openvino.build(made.integers, path)
    monkeypatch.setattr(engine_module, "has_vnni", lambda: False)
    wanted = reference_outputs(made.prepared, [made.inputs])
    found = check_parity(make_engine("openvino", path), wanted, [made.inputs])
    assert found.batches.relative_error < 0.01
    kinds = precisions(path)
    assert (kinds["Convolution"], kinds["FullyConnected"]) == ("f32", "f32")


def test_sums_of_narrow_weights_need_no_vnni(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    second = nn.Conv2d(32, 16, 3)
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), second, nn.Flatten(), nn.Linear(1024, 4)).eval()
    with torch.no_grad():
        second.weight.abs_()  # pairs of products add up
    inputs = torch.rand(8, 16, 12, 12)
    prepared = prepare(net, (inputs[:2],), "int8_reduced")
    calibrate(prepared, [(inputs,)])
    path = tmp_path / openvino.FILE
    openvino.build(export_program(convert(prepared.eval()), (inputs[:2],)), path)
    monkeypatch.setattr(engine_module, "has_vnni", lambda: False)
    kinds = precisions(path)
    assert "f32" not in (kinds["Convolution"], kinds["FullyConnected"])
    found = check_parity(make_engine("openvino", path), reference_outputs(prepared, [inputs]), [inputs])
    assert found.batches.relative_error < 0.01


def precisions(path: Path) -> dict[str, str]:
    return {
        str(node.get_rt_info()["layerType"].astype(str)): str(node.get_rt_info()["runtimePrecision"].astype(str))
        for node in engine_module.compile_model(path, None).get_runtime_model().get_ordered_ops()
    }
