"""An ONNX file in ONNX Runtime: needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import EngineError, MissingPackageError
from compress.measure.machine import describe_machine, has_vnni
from compress.runtime.manifest import TensorSpec

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CUDA", "NARROW", "PACKAGES", "ONNXRuntimeEngine", "make", "open_session"]

PACKAGES = ("onnxruntime",)
RUNS_CODE = False
NARROW = "compress.narrow_weights"
"""What a file holds at its end, among its notes, when its int8 weights have 7 bits."""

_END = 4096  # bytes; nothing but notes follows the graph

Provider = tuple[str, dict[str, str]]
"""Name and options of what runs operators."""

CUDA: Provider = ("CUDAExecutionProvider", {"use_tf32": "0"})  # float32 stays float32

_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}  # the others are named as numpy names them


class ONNXRuntimeEngine:
    """Runs an ONNX file.

    Args:
        path: The file.
        num_threads: Threads of one call; all cores of this process without it.
        providers: What runs its operators, in the order of preference, before the CPU.

    Attributes:
        threads: Threads of one call.
        providers: What was started.
        inputs: The file's inputs.
        outputs: The file's outputs.
    """

    takes = "numpy"

    def __init__(self, path: Path, num_threads: int | None, providers: Sequence[Provider] = ()) -> None:
        import onnxruntime

        self.threads = num_threads or int(describe_machine()["cores"])
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        # Idle threads would go on spinning between calls and slow down whatever else this process does.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not (has_vnni() or _is_narrow(path)):
            # Sums of int8 products overflow on AVX2 and AVX-512 without VNNI; uint8 weights are exact, and slower.
            options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=[*providers, "CPUExecutionProvider"])
        self.providers: list[str] = self._session.get_providers()
        self.inputs = tuple(map(_spec, self._session.get_inputs()))
        self.outputs = tuple(map(_spec, self._session.get_outputs()))

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs of a batch of arrays."""
        return self._session.run(None, dict(zip([spec.name for spec in self.inputs], inputs)))

    def into(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Write the outputs of a batch of arrays into contiguous arrays."""
        binding = self._session.io_binding()
        for spec, value in zip(self.inputs, inputs):
            binding.bind_cpu_input(spec.name, value)
        for spec, value in zip(self.outputs, outputs):
            binding.bind_output(spec.name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        self._session.run_with_iobinding(binding)


def _is_narrow(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _END))
        return NARROW.encode() in file.read()


def _spec(entry: Any) -> TensorSpec:
    dtype = _DTYPES.get(entry.type, entry.type.removeprefix("tensor(").rstrip(")"))
    return TensorSpec(entry.name, dtype, tuple(size if isinstance(size, int) else None for size in entry.shape))


def make(path: Path, num_threads: int | None) -> ONNXRuntimeEngine:
    """Open a session on the CPU."""
    return open_session(path, num_threads)


def open_session(path: Path, num_threads: int | None, *providers: Provider) -> ONNXRuntimeEngine:
    """Open a session.

    Args:
        path: The ONNX file.
        num_threads: Threads of one call on the CPU.
        providers: What runs its operators, before the CPU: names and options.

    Raises:
        MissingPackageError: when onnxruntime is not installed.
        EngineError: when what is installed lacks a provider, or it cannot be started here.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError("onnxruntime") from error
    absent = [name for name, _ in providers if name not in onnxruntime.get_available_providers()]
    if absent:
        raise EngineError(
            f"onnxruntime: expected one with {', '.join(absent)}, got none. Install onnxruntime-gpu in its place."
        )
    engine = ONNXRuntimeEngine(path, num_threads, providers)
    absent = [name for name, _ in providers if name not in engine.providers]
    if absent:  # it goes on without them, and without a word
        raise EngineError(
            f"onnxruntime: expected {', '.join(absent)} to start, got {', '.join(engine.providers)} alone. Install the "
            "libraries that it needs."
        )
    return engine
