"""What executes an artefact, one file each with the same small interface."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from compress.measure.machine import has_cuda

__all__ = ["ENGINES", "READS", "Engine", "device_of", "engines_for", "make_engine", "missing_package", "runs_code"]

ENGINES = {
    "eager": "compress.runtime.engines.eager",
    "aoti": "compress.runtime.engines.aoti",
    "aoti_bf16": "compress.runtime.engines.aoti",
    "cuda_bf16": "compress.runtime.engines.eager_cuda",
    "cuda_fp16": "compress.runtime.engines.eager_cuda",
    "aoti_cuda": "compress.runtime.engines.aoti_cuda",
    "aoti_cuda_bf16": "compress.runtime.engines.aoti_cuda",
    "aoti_cuda_fp16": "compress.runtime.engines.aoti_cuda",
    "inductor_cuda": "compress.runtime.engines.inductor_cuda",
    "inductor_cuda_bf16": "compress.runtime.engines.inductor_cuda",
    "inductor_cuda_fp16": "compress.runtime.engines.inductor_cuda",
    "onnxruntime": "compress.runtime.engines.onnxruntime",
    "openvino": "compress.runtime.engines.openvino",
    "executorch": "compress.runtime.engines.executorch",
    "tvm": "compress.runtime.engines.tvm",
    "litert": "compress.runtime.engines.litert",
    "tensorrt": "compress.runtime.engines.tensorrt",
    "eager_cuda": "compress.runtime.engines.eager_cuda",
    "onnxruntime_cuda": "compress.runtime.engines.onnxruntime_cuda",
}
"""Engine name to its module, in the order of portability: ``make(path, num_threads)`` there builds it, and needs
the installed ``PACKAGES``; ``RUNS_CODE`` says whether loading its file may run code that is in it, ``DEVICE`` where it
runs if that is not the CPU."""

READS = {"eager_cuda": "eager", "onnxruntime_cuda": "onnxruntime"}
"""Engines that read the file of another target than that of their own name."""


class Engine(Protocol):
    """Runs a batch.

    Those that can compute into memory of the caller have ``into(inputs, outputs)``, of contiguous arrays.

    Attributes:
        takes: ``"numpy"`` or ``"torch"``: arrays or tensors on the CPU, and gives such; ``"cuda"``: tensors on any
            device, and gives them on the same.
    """

    takes: str

    @property
    def threads(self) -> int:
        """Threads of one call."""

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs of a batch."""


def make_engine(name: str, path: Path, *, num_threads: int | None = None) -> Engine:
    """Load an engine's file.

    Args:
        name: A key of ``ENGINES``.
        path: The file.
        num_threads: Threads of one call; the engine's default without it.

    Raises:
        MissingPackageError: when the engine's library is not installed.
    """
    return import_module(ENGINES[name]).make(path, num_threads)


def engines_for(targets: Collection[str], device: str) -> list[str]:
    """Return the engines for what an artefact holds.

    Args:
        targets: Names of its targets; those that this version does not know come last.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for both; without a GPU, for the CPU alone.
    """
    known = [name for name in ENGINES if READS.get(name, name) in targets]
    devices = {"cpu", "cuda"} if device == "auto" else {device}
    if not has_cuda():
        devices.discard("cuda")
    found = [name for name in known if device_of(name) in devices]
    return [*found, *(name for name in targets if name not in ENGINES)]


def device_of(name: str) -> str:
    """Return where an engine runs: ``"cpu"`` or ``"cuda"``."""
    return str(getattr(import_module(ENGINES[name]), "DEVICE", "cpu"))


def runs_code(name: str) -> bool:
    """Say whether loading an engine's file may run code that is in it."""
    return bool(import_module(ENGINES[name]).RUNS_CODE)


def missing_package(name: str) -> str | None:
    """Return the package that an engine needs and that is not installed, or ``None``."""
    return next((package for package in import_module(ENGINES[name]).PACKAGES if not _is_installed(package)), None)


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # something keeps it from being imported
        return False
