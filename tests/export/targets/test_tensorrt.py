from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import ExportSkippedError
from compress.export import export_artifact
from compress.export.onnx.tensorrt import obstacles, rewrite
from compress.export.parity import check_parity, reference_outputs
from compress.export.targets import tensorrt
from compress.quantize import calibrate, convert, prepare
from compress.runtime import load
from compress.runtime.engines import make_engine
from compress.surgery.capture import export_program
from tests.export.programs import Small, floating, quantized
from tests.export.targets.checks import Determinant
from tests.networks import images

onnx = pytest.importorskip("onnx")


def portable() -> tuple[Any, Any]:
    torch.manual_seed(0)
    network = Small()
    network.load_state_dict(floating().reference.state_dict())
    prepared = prepare(network.eval(), [images(2)[0]], "int8_portable")
    calibrate(prepared, [(images(48)[0],)])
    return export_program(convert(prepared.eval()), [images(2)[0]]), prepared


def test_symmetric_integers_become_signed_and_agree(tmp_path: Path) -> None:
    program, prepared = portable()
    path = tmp_path / tensorrt.FILE
    tensorrt.build(program, path)
    model = onnx.load(str(path))
    zeros = {entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) >= 10
    assert {zeros[node.input[2]].dtype for node in pairs} == {np.dtype("int8")}
    assert not any(zeros[node.input[2]].any() for node in pairs)
    inputs = images(60, seed=2)[0]
    found = check_parity(make_engine("onnxruntime", path), reference_outputs(prepared, [inputs]), [inputs])
    assert found.batches.relative_error < 0.02
    assert found.batches.top1_agreement > 0.95


def test_affine_integers_are_refused_with_reasons(tmp_path: Path) -> None:
    with pytest.raises(
        ExportSkippedError, match=r"zero point \d+ in uint8, where int8 .* Use quantize.scheme int8_port"
    ):
        tensorrt.build(quantized().program, tmp_path / tensorrt.FILE)
    assert not list(tmp_path.iterdir())


def test_an_absent_operator_is_named(tmp_path: Path) -> None:
    program = export_program(Determinant(), [torch.randn(2, 3, 3)])
    with pytest.raises(ExportSkippedError, match=r"got Det \("):
        tensorrt.build(program, tmp_path / tensorrt.FILE)


def test_floats_are_exported_and_not_served_without_a_gpu(tmp_path: Path) -> None:
    program, reference, inputs = floating()
    path = tmp_path / "small"
    manifest = export_artifact(
        program, path, targets=["onnxruntime", "tensorrt"], reference=reference, held_out=[inputs]
    )
    assert manifest.targets["tensorrt"].agreement["relative_error"] < 1e-5
    assert load(path).engines == ("onnxruntime",)


@pytest.mark.parametrize(
    ("zero", "scale", "reason"),
    [
        (np.zeros(1, np.int32), np.ones(1, np.float32), "int32, where biases are floats"),
        (np.full(1, 3, np.int8), np.ones(1, np.float32), "zero point 3 in int8"),
        (np.zeros(2, np.int8), np.ones(2, np.float32), "a scale for each channel"),
    ],
)
def test_each_obstacle_is_told(zero: np.ndarray, scale: np.ndarray, reason: str) -> None:
    kinds = {np.dtype("int8"): onnx.TensorProto.INT8, np.dtype("int32"): onnx.TensorProto.INT32}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["y"])],
        "one",
        [onnx.helper.make_tensor_value_info("x", kinds[zero.dtype], [2])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])],
        [onnx.numpy_helper.from_array(scale, "scale"), onnx.numpy_helper.from_array(zero, "zero")],
    )
    model = onnx.helper.make_model(graph)
    rewrite(model)
    assert [found for found in obstacles(model) if reason in found]
