from __future__ import annotations

import numpy as np
import pytest

from compress.errors import EngineError
from compress.runtime.engines import make_engine, onnxruntime
from compress.runtime.engines.onnxruntime import ONNXRuntimeEngine
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
