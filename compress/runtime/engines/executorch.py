"""ExecuTorch's program of kernel calls, run by XNNPACK on the CPU: needs torch for its tensors, nothing else of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from compress.errors import MissingPackageError

__all__ = ["PACKAGES", "ExecuTorchEngine", "make"]

PACKAGES = ("executorch", "torch")
RUNS_CODE = False  # a table of calls to kernels that the runtime has, and their weights

# As ExecuTorch numbers them.
_DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "", "", "", "bool")

_LOCK = Lock()  # a method serves one thread at a time, and all methods share the process's threads
_RESETS: list[int] = []
"""Numbers of threads that were set: a method that was loaded before such a change holds threads that are gone."""


class ExecuTorchEngine:
    """Runs a program on the CPU, larger batches than it takes in parts.

    Args:
        path: The ``.pte`` file.
        num_threads: Threads of one call, of the whole process; what ExecuTorch finds right without it.
    """

    takes = "torch"

    def __init__(self, path: Path, num_threads: int | None) -> None:
        import torch

        self._torch = torch
        self._binding = binding = _binding()
        with _LOCK:
            if num_threads is not None and num_threads != binding._threadpool_get_thread_count():
                binding._unsafe_reset_threadpool(num_threads)
                _RESETS.append(num_threads)
            check = binding.Verification.InternalConsistency
            self._program = binding._load_program(str(path), program_verification=check)  # its method needs it alive
            self._load()

    @property
    def threads(self) -> int:
        """Threads of one call."""
        return int(self._binding._threadpool_get_thread_count())

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs of a batch of tensors."""
        # It takes the memory in the order of the dimensions, and asks for the strides of that, of size one as well.
        inputs = [tensor.detach().reshape(-1).view(tensor.shape) for tensor in inputs]
        num = len(inputs[0])
        with _LOCK:
            if self._loaded_after != len(_RESETS):
                self._load()
            if num <= self._largest:
                return self._method(inputs)
            parts = [
                self._method([tensor[start : start + self._largest] for tensor in inputs])
                for start in range(0, num, self._largest)
            ]
        return [self._torch.cat(outputs) for outputs in zip(*parts)]

    def _load(self) -> None:
        self._method = self._program.load_method("forward")
        self._loaded_after = len(_RESETS)
        about = self._method.method_meta()
        inputs = [about.input_tensor_meta(index) for index in range(about.num_inputs())]
        self._largest = inputs[0].sizes()[0]
        # The largest batch goes first, so that XNNPACK takes all its memory here and none has to grow between calls.
        self._method(
            [self._torch.zeros(tuple(one.sizes()), dtype=getattr(self._torch, _DTYPES[one.dtype()])) for one in inputs]
        )


def make(path: Path, num_threads: int | None) -> ExecuTorchEngine:
    """Load the program; ``num_threads`` sets ExecuTorch's number for the whole process."""
    return ExecuTorchEngine(path, num_threads)


def _binding() -> Any:
    """Import the compiled part alone: the Python around it imports what exports, torchao among it."""
    try:
        import torch  # noqa: F401  the other needs its libraries
    except ImportError as error:
        raise MissingPackageError("torch") from error
    try:
        from executorch.extension.pybindings import _C
    except ImportError as error:
        raise MissingPackageError("executorch", "executorch") from error
    return _C
