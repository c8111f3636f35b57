from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.errors import EngineError
from compress.export.targets import onnxruntime as target
from compress.quantize import calibrate, convert, prepare
from compress.runtime.engines import make_engine, onnxruntime
from compress.runtime.engines.onnxruntime import ONNXRuntimeEngine
from compress.surgery.capture import export_program
from tests.export.programs import artifact, quantized


def test_threads_are_what_was_asked_for() -> None:
    assert ONNXRuntimeEngine(artifact() / "model.onnx", 1).threads == 1
    assert ONNXRuntimeEngine(artifact() / "model.onnx", None).threads >= 1


def test_a_processor_without_vnni_gets_exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = quantized().inputs.numpy()
    wanted = ONNXRuntimeEngine(artifact() / "model.onnx", None)([inputs])[0]
    monkeypatch.setattr(onnxruntime, "has_vnni", lambda: False)
    found = ONNXRuntimeEngine(artifact() / "model.onnx", None)([inputs])[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_sums_of_narrow_weights_are_exact_without_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without VNNI, two products of a uint8 and an int8 are added in 16 bits; uint8 weights would be exact in any case.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten()).eval()
    inputs = torch.rand(8, 3, 12, 12) * 4
    files, options = {}, []
    for scheme in ("int8", "int8_reduced"):
        prepared = prepare(copy.deepcopy(network), (inputs[:2],), scheme)
        calibrate(prepared, [(inputs,)])
        files[scheme] = tmp_path / f"{scheme}.onnx"
        target.build(export_program(convert(prepared.eval()), (inputs[:2],)), files[scheme])
    monkeypatch.setattr(onnxruntime, "has_vnni", lambda: False)
    monkeypatch.setattr(
        "onnxruntime.SessionOptions.add_session_config_entry", lambda self, key, value: options.append(key)
    )
    for path in files.values():
        ONNXRuntimeEngine(path, 1)
    monkeypatch.undo()
    assert options.count("session.x64quantprecision") == 1
    found = []
    for narrow in (True, False):
        monkeypatch.setattr(onnxruntime, "has_vnni", lambda: False)
        monkeypatch.setattr(onnxruntime, "_is_narrow", lambda path, narrow=narrow: narrow)
        found.append(ONNXRuntimeEngine(files["int8_reduced"], 1)([inputs.numpy()])[0])
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("name", ["onnxruntime_cuda", "tensorrt"])
def test_a_build_without_a_provider_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        EngineError, match=r"expected one with \w+ExecutionProvider.*, got none. Install onnxruntime-gpu"
    ):
        make_engine(name, artifact() / "model.onnx")


def test_a_provider_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(EngineError, match="expected CUDAExecutionProvider to start, got CPUExecutionProvider alone"):
        make_engine("onnxruntime_cuda", artifact() / "model.onnx")
