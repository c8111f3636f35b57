from __future__ import annotations

import numpy as np
import pytest

from compress.runtime.engines import onnxruntime
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
