"""What executes an artefact, one file each with the same small interface."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

__all__ = ["ENGINES", "Engine", "make_engine", "missing_package", "runs_code"]

ENGINES = {
    "eager": "compress.runtime.engines.eager",
    "aoti": "compress.runtime.engines.aoti",
    "onnxruntime": "compress.runtime.engines.onnxruntime",
    "openvino": "compress.runtime.engines.openvino",
    "executorch": "compress.runtime.engines.executorch",
    "tvm": "compress.runtime.engines.tvm",
    "litert": "compress.runtime.engines.litert",
}
"""Engine name to its module, in the order of portability: ``make(path, num_threads)`` there builds it, and needs
the installed ``PACKAGES``; ``RUNS_CODE`` says whether loading its file may run code that is in it."""


class Engine(Protocol):
    """Runs a batch.

    Attributes:
        takes: ``"torch"`` or ``"numpy"``: what it takes and gives, on the CPU.
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
