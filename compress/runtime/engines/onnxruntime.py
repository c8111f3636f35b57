"""An ONNX file in ONNX Runtime: needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import MissingPackageError
from compress.measure.machine import cpu_flags, describe_machine

__all__ = ["PACKAGE", "ONNXRuntimeEngine", "make"]

PACKAGE = "onnxruntime"

_VNNI = {"avx512_vnni", "avx_vnni"}


class ONNXRuntimeEngine:
    """Runs an ONNX file on the CPU.

    Args:
        path: The file.
        num_threads: Threads of one call; all cores of this process without it.

    Attributes:
        threads: Threads of one call.
    """

    takes = "numpy"

    def __init__(self, path: Path, num_threads: int | None) -> None:
        import onnxruntime

        self.threads = num_threads or int(describe_machine()["cores"])
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        # Idle threads would go on spinning between calls and slow down whatever else this process does.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not cpu_flags() & _VNNI:
            # Sums of int8 products overflow on AVX2 and AVX-512 without VNNI; uint8 weights are exact, and slower.
            options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [entry.name for entry in self._session.get_inputs()]

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs of a batch of arrays."""
        return self._session.run(None, dict(zip(self._names, inputs)))


def make(path: Path, num_threads: int | None) -> ONNXRuntimeEngine:
    """Open a session."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("onnxruntime", "all") from error
    return ONNXRuntimeEngine(path, num_threads)
