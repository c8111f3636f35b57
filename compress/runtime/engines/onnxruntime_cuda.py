"""An ONNX file in ONNX Runtime on a GPU: needs onnxruntime-gpu, and no torch."""

from __future__ import annotations

from pathlib import Path

from compress.runtime.engines.onnxruntime import CUDA, PACKAGES, ONNXRuntimeEngine, open_session

__all__ = ["PACKAGES", "make"]

RUNS_CODE = False
DEVICE = "cuda"


def make(path: Path, num_threads: int | None) -> ONNXRuntimeEngine:
    """Open a session on the first GPU that is visible; operators that CUDA lacks run on the CPU."""
    return open_session(path, num_threads, CUDA)
