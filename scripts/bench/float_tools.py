"""The same float networks on each engine by its own tools, for comparison; functions as in ``quantize_tools``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine_calls import Make
from quantize_tools import lowered, module_named, onnx_file, onnx_session
from torch import Tensor, nn

from compress.surgery.capture import export_program

__all__ = ["FLOAT_TOOLS"]


def aoti(network: nn.Module, data: Tensor, folder: Path, *, num_threads: int) -> Make:
    """Inductor's package, with freezing, of a program with a dynamic batch; threads are torch's."""
    program = export_program(network, (data[:2],))
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / "float.pt2"), inductor_configs={"freezing": True}
        )
    model: Any = torch._inductor.aoti_load_package(path)
    return lambda batch: model


def onnxruntime(network: nn.Module, data: Tensor, folder: Path, *, num_threads: int) -> Make:
    """What ``torch.onnx.export`` writes, in a session with default settings."""
    return onnx_session(onnx_file(network, data, folder), num_threads)


def openvino(network: nn.Module, data: Tensor, folder: Path, *, num_threads: int) -> Make:
    """OpenVINO's conversion of that file, for latency."""
    package = module_named("openvino")
    model = package.convert_model(str(onnx_file(network, data, folder)))
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": num_threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = package.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda batch: lambda x: request.infer([x.numpy()], share_inputs=True)


def executorch(network: nn.Module, data: Tensor, folder: Path, *, num_threads: int) -> Make:
    """ExecuTorch's program for XNNPACK, one for each batch size; threads are those that it takes itself."""
    return lambda batch: lowered(torch.export.export(network, (data[:1].repeat(batch, *[1] * (data.dim() - 1)),)))


FLOAT_TOOLS: dict[str, Callable[..., Make]] = {
    "aoti_own": aoti,
    "onnxruntime_own": onnxruntime,
    "openvino_own": openvino,
    "executorch_own": executorch,
}
