"""An ONNX file in ONNX Runtime: needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import MissingPackageError
from compress.measure.machine import describe_machine, has_vnni
from compress.runtime.manifest import TensorSpec

__all__ = ["PACKAGES", "ONNXRuntimeEngine", "make"]

PACKAGES = ("onnxruntime",)
RUNS_CODE = False

_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}  # the others are named as numpy names them


class ONNXRuntimeEngine:
    """Runs an ONNX file on the CPU.

    Args:
        path: The file.
        num_threads: Threads of one call; all cores of this process without it.

    Attributes:
        threads: Threads of one call.
        inputs: The file's inputs.
        outputs: The file's outputs.
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
        if not has_vnni():
            # Sums of int8 products overflow on AVX2 and AVX-512 without VNNI; uint8 weights are exact, and slower.
            options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = tuple(map(_spec, self._session.get_inputs()))
        self.outputs = tuple(map(_spec, self._session.get_outputs()))

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs of a batch of arrays."""
        return self._session.run(None, dict(zip([spec.name for spec in self.inputs], inputs)))


def _spec(entry: Any) -> TensorSpec:
    dtype = _DTYPES.get(entry.type, entry.type.removeprefix("tensor(").rstrip(")"))
    return TensorSpec(entry.name, dtype, tuple(size if isinstance(size, int) else None for size in entry.shape))


def make(path: Path, num_threads: int | None) -> ONNXRuntimeEngine:
    """Open a session."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("onnxruntime", "all") from error
    return ONNXRuntimeEngine(path, num_threads)
