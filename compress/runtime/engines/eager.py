"""The portable program, run operator by operator in torch: runs wherever torch does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import MissingPackageError

__all__ = ["EagerEngine", "make"]


class EagerEngine:
    """Runs a program of plain ATen operators.

    Args:
        path: A ``.pt2`` file from ``torch.export.save``. Loading unpickles: only from a trusted source.
    """

    takes = "torch"

    def __init__(self, path: Path) -> None:
        import torch

        self._torch = torch
        self._program = torch.export.load(path).module(check_guards=False)

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs of a batch of tensors."""
        with self._torch.no_grad():
            outputs = self._program(*inputs)
        return [outputs] if self._torch.is_tensor(outputs) else list(outputs)


def make(path: Path, num_threads: int | None) -> EagerEngine:
    """Load the program; ``num_threads`` sets torch's number for the whole process."""
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError("torch", "all") from error
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return EagerEngine(path)
