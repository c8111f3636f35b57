"""An ONNX file in TensorRT, through ONNX Runtime: needs onnxruntime-gpu and TensorRT's libraries, and no torch."""

from __future__ import annotations

from pathlib import Path

from compress.measure.machine import user_cache
from compress.runtime.engines.onnxruntime import CUDA, PACKAGES, ONNXRuntimeEngine, open_session
from compress.runtime.manifest import sha256

__all__ = ["PACKAGES", "make"]

RUNS_CODE = True  # a graph may hold an engine that TensorRT has built, which it deserialises
DEVICE = "cuda"


def make(path: Path, num_threads: int | None) -> ONNXRuntimeEngine:
    """Open a session; operators that TensorRT lacks run on CUDA, or on the CPU.

    TensorRT builds an engine in the first calls, which takes up to minutes; it is kept in the user's cache folder.
    """
    options = {"trt_int8_enable": "1"}
    if folder := user_cache():
        kept = folder / "tensorrt" / sha256(path)[:32]
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(kept)}
    return open_session(path, num_threads, ("TensorrtExecutionProvider", options), CUDA)
