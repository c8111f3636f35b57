"""The portable program on a GPU, operator by operator, in CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.errors import MissingPackageError
from compress.runtime.engines.eager import fold_constants
from compress.runtime.engines.on_cuda import OnCUDA

__all__ = ["PACKAGES", "make"]

PACKAGES = ("torch",)
RUNS_CODE = True
DEVICE = "cuda"


def make(path: Path, num_threads: int | None) -> OnCUDA:
    """Load the program onto the current GPU. Loading unpickles: only from a trusted source."""
    try:
        import torch
        from torch.export.passes import move_to_device_pass
    except ImportError as error:
        raise MissingPackageError("torch", "all") from error
    torch.cuda.init()
    program = move_to_device_pass(torch.export.load(path), "cuda")
    module = fold_constants(program.module(check_guards=False))

    def run(inputs: list[Any]) -> list[Any]:
        outputs = module(*inputs)
        return [outputs] if torch.is_tensor(outputs) else list(outputs)

    return OnCUDA(run)
