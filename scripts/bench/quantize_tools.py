"""The same networks quantised to int8 by other tools, each in its own way, for comparison.

Each function takes a float network and calibration data and returns what runs a batch, or raises ``AbsentError``.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_calls import Make
from torch import Tensor, nn

from compress.surgery.capture import export_program

__all__ = ["TOOLS", "AbsentError", "is_fit", "lowered", "module_named", "onnx_file", "onnx_session"]


def is_fit(tool: str, network: nn.Module) -> bool:
    """Say whether a tool is worth asking: of recurrent layers, ExecuTorch's lowering does not end."""
    recurrent = any(isinstance(module, nn.LSTM) for module in network.modules())
    if tool == "onnxruntime_dynamic":
        return recurrent  # for products of floats, the static one is better
    return not (recurrent and tool.startswith("executorch"))


class AbsentError(Exception):
    """A tool is not installed, or cannot do what is asked; the message says which."""


def onnxruntime_static(network: nn.Module, data: Tensor, folder: Path, *, num_threads: int) -> Make:
    """ONNX Runtime's ``quantize_static``: QDQ, uint8 activations, int8 weights per channel."""
    quantization = module_named("onnxruntime.quantization")
    shapes = module_named("onnxruntime.quantization.shape_inference")
    plain, prepared, path = onnx_file(network, data, folder), folder / "prepared.onnx", folder / "static.onnx"
    shapes.quant_pre_process(str(plain), str(prepared))
    name = module_named("onnx").load(str(plain), load_external_data=False).graph.input[0].name

    class Reader(quantization.CalibrationDataReader):
        """Gives each sample once."""

        def __init__(self) -> None:
            self.rows = iter(data.numpy())

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.rows, None)
            return None if row is None else {name: row[None]}

    quantization.quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
    )
    return onnx_session(path, num_threads)


def onnxruntime_dynamic(network: nn.Module, data: Tensor, folder: Path, *, num_threads: int) -> Make:
    """ONNX Runtime's ``quantize_dynamic``: the only one of its two that has LSTMs."""
    quantization = module_named("onnxruntime.quantization")
    path = folder / "dynamic.onnx"
    quantization.quantize_dynamic(str(onnx_file(network, data, folder)), str(path))
    return onnx_session(path, num_threads)


def openvino_nncf(network: nn.Module, data: Tensor, folder: Path, *, num_threads: int) -> Make:
    """OpenVINO's network after NNCF's post-training quantization."""
    openvino, nncf = module_named("openvino"), module_named("nncf")
    kind = {} if data.is_floating_point() else {"model_type": nncf.ModelType.TRANSFORMER}
    model = openvino.convert_model(str(onnx_file(network, data, folder)))
    quantised = nncf.quantize(model, nncf.Dataset([row[None] for row in data.numpy()]), subset_size=len(data), **kind)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": num_threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(quantised, "CPU", settings).create_infer_request()
    return lambda batch: lambda x: request.infer([x.numpy()], share_inputs=True)


def executorch_xnnpack(network: nn.Module, data: Tensor, folder: Path, *, num_threads: int) -> Make:
    """ExecuTorch's program for XNNPACK, one for each batch size; threads are those that it takes itself."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer_of = module_named("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")

    def make(batch: int) -> Callable[[Tensor], object]:
        example = (data[:1].repeat(batch, *[1] * (data.dim() - 1)),)
        quantizer = quantizer_of.XNNPACKQuantizer()
        quantizer.set_global(quantizer_of.get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(torch.export.export(network, example, strict=True).module(), quantizer)
        for start in range(0, len(data) - batch + 1, batch):
            prepared(data[start : start + batch])
        return lowered(torch.export.export(convert_pt2e(prepared), example))

    return make


TOOLS: dict[str, Callable[..., Make]] = {
    "onnxruntime_static": onnxruntime_static,
    "onnxruntime_dynamic": onnxruntime_dynamic,
    "openvino_nncf": openvino_nncf,
    "executorch_xnnpack": executorch_xnnpack,
}


def lowered(program: torch.export.ExportedProgram) -> Callable[[Tensor], object]:
    """Lower a program of one batch size for XNNPACK, and return what runs it in ExecuTorch."""
    partitioner_of = module_named("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    exir, runtime = module_named("executorch.exir"), module_named("executorch.runtime")
    edge = exir.to_edge_transform_and_lower(program, partitioner=[partitioner_of.XnnpackPartitioner()])
    loaded = runtime.Runtime.get().load_program(edge.to_executorch().buffer)
    return partial(_execute, loaded, loaded.load_method("forward"))


def _execute(program: Any, method: Any, x: Tensor) -> object:
    del program  # a method does not keep its program alive
    return method.execute([x])


def module_named(name: str) -> Any:
    """Import a module, or say which package is absent."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise AbsentError(f"{name.partition('.')[0]} is not installed ({error})") from error


def onnx_file(network: nn.Module, data: Tensor, folder: Path) -> Path:
    """Write the float network as ONNX, with a dynamic batch, where it is not there yet."""
    path = folder / "float.onnx"
    if not path.exists():
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            translated = torch.onnx.export(export_program(network, (data[:2],)), dynamo=True)
        assert translated is not None
        translated.save(str(path), external_data=False)
    return path


def onnx_session(path: Path, num_threads: int) -> Make:
    """Return what runs an ONNX file in ONNX Runtime as it comes."""
    onnxruntime = module_named("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = num_threads, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: lambda x: session.run(None, {name: x.numpy()})
