"""From an exported program to an ONNX model with explicit quantize and dequantize nodes."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram

from compress.errors import ExportSkippedError, MissingPackageError, first_line
from compress.export.graph import flatten_attention, rewritten, weight_bytes
from compress.export.onnx.graph import rewrite
from compress.surgery.lengths import lengths_of
from compress.surgery.recurrent import kept_whole

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["OPSET", "translate"]

OPSET = 20
"""Version of the operators that files are written with (of ONNX 1.15)."""

_LARGEST = 1_900_000_000  # bytes; a protobuf file ends at 2 GiB


def translate(program: ExportedProgram, *, target: str, rewrite: Callable[[ModelProto], None] = rewrite) -> ModelProto:
    """Translate a program.

    Args:
        program: Quantised or not.
        target: The target that asks, for messages.
        rewrite: Makes of the translation what the engine wants, in place; ONNX Runtime's by default.

    Raises:
        ExportSkippedError: when the program is larger than one ONNX file can be, or has an operator that ONNX lacks.
        MissingPackageError: when onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("onnxscript") from error
    size = weight_bytes(program)
    if size > _LARGEST:
        raise ExportSkippedError(
            f"{target}: expected at most {_LARGEST:,} bytes of weights, got {size:,}. Leave the target out."
        )
    program = rewritten(program, flatten_attention)
    try:
        with torch.no_grad(), _quiet(), kept_whole(lengths_of(program)):
            translated = torch.onnx.export(program, dynamo=True, opset_version=OPSET)
    except torch.onnx.OnnxExporterError as error:
        raise ExportSkippedError(
            f"{target}: expected operators that ONNX has, got one that it lacks: {_first(error)} Leave the target out."
        ) from error
    assert translated is not None
    model = translated.model_proto
    rewrite(model)
    return model


def _first(error: BaseException) -> str:
    """Return the first line of what began a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's prints and its warnings about absent optional packages away from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
