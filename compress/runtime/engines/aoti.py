"""A package compiled ahead of time by Inductor for one kind of processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import MissingPackageError
from compress.runtime.engines.aliases import owned

__all__ = ["PACKAGES", "AOTIEngine", "make"]

PACKAGES = ("torch",)
RUNS_CODE = True


class AOTIEngine:
    """Runs an AOTInductor package.

    Args:
        path: The package. It is native code: only from a trusted source.
    """

    takes = "torch"

    def __init__(self, path: Path) -> None:
        import torch

        self._torch = torch
        # The package's own call parses its signature from JSON each time, which takes as long as a small network.
        self._loader = torch._inductor.aoti_load_package(str(path)).loader

    @property
    def threads(self) -> int:
        """Threads of one call."""
        return self._torch.get_num_threads()

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs of a batch of tensors."""
        # Compiled code takes the strides of capture for granted, those of dimensions of size one as well, which
        # contiguous() leaves as they are: hence through a flat view.
        given = [tensor.detach().reshape(-1).view(tensor.shape) for tensor in inputs]
        return owned(self._loader.boxed_run(list(given)), given)  # constants it copies by itself


def make(path: Path, num_threads: int | None) -> AOTIEngine:
    """Load the package; ``num_threads`` sets torch's number for the whole process."""
    try:
        import torch
        import torch._inductor
    except ImportError as error:
        raise MissingPackageError("torch") from error
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return AOTIEngine(path)
