"""An ONNX file in TensorRT, through ONNX Runtime: needs onnxruntime-gpu and TensorRT's libraries, and no torch."""

from __future__ import annotations

from pathlib import Path

from compress.runtime.engines.onnxruntime import PACKAGES, ONNXRuntimeEngine, open_session

__all__ = ["PACKAGES", "make"]

RUNS_CODE = False
DEVICE = "cuda"


def make(path: Path, num_threads: int | None) -> ONNXRuntimeEngine:
    """Open a session; operators that TensorRT lacks run on CUDA, or on the CPU."""
    return open_session(path, num_threads, "TensorrtExecutionProvider", "CUDAExecutionProvider")
