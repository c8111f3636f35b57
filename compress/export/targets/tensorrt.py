"""An ONNX file that TensorRT takes; its engine is built where it is served, and checked by ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from compress.errors import ExportSkippedError
from compress.export.onnx.tensorrt import obstacles, rewrite
from compress.export.onnx.translate import translate

__all__ = ["CHECKED_BY", "FILE", "build", "requires"]

FILE = "model.tensorrt.onnx"
CHECKED_BY = "onnxruntime"


def build(program: ExportedProgram, path: Path) -> None:
    """Translate the program and check that TensorRT takes it.

    Raises:
        ExportSkippedError: when TensorRT would refuse the file, which says why, or ONNX lacks an operator.
        MissingPackageError: when onnx or onnxscript is not installed.
    """
    model = translate(program, target="tensorrt", rewrite=rewrite)
    found = obstacles(model)
    if found:
        raise ExportSkippedError(
            f"tensorrt: expected int8 around zero and operators that TensorRT has, got {'; '.join(found[:3])}"
            f"{f' and {len(found) - 3} more' if len(found) > 3 else ''}. Use quantize.scheme int8_portable, or leave "
            "the target out."
        )
    path.write_bytes(model.SerializeToString())


def requires() -> dict[str, Any]:
    """Return what a machine needs: its engine says what is missing."""
    return {}
