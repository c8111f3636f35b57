"""A package compiled by AOTInductor for the GPU of this machine, in float32."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from compress.errors import ExportSkippedError
from compress.export.apart import why_not_loaded
from compress.export.for_gpu import for_gpu
from compress.export.targets import Census
from compress.export.targets.aoti import check_compiler, compile_package
from compress.runtime.requirements import cuda_requirements

__all__ = ["FILE", "build", "build_in", "requires"]

FILE = "model.aoti_cuda.pt2"


def build_in(dtype: torch.dtype, program: ExportedProgram, path: Path, *, max_autotune: bool = False) -> Census:
    """Compile the program in a precision; its inputs and outputs stay in float32.

    Args:
        dtype: What it computes in.
        program: Not quantised.
        path: Of the file.
        max_autotune: Let Inductor measure several kernels for each matrix product and convolution, which takes minutes.

    Raises:
        ExportSkippedError: when there is no GPU or no compiler, torch cannot load what it has compiled, the
            program is quantised, or its samples see each other, since small batches are filled up when served.
    """
    program, few = for_gpu("aoti_cuda", program, dtype)
    check_compiler()
    # Convolutions run in channels-last; with a dynamic batch Inductor does not do so of itself.
    settings = {"force_layout_optimization": True, "max_autotune": max_autotune}
    census = compile_package(program, path, settings)
    # Seen with torch 2.11 on an H200: its loader crashes, whatever the network.
    reason = why_not_loaded("aoti_cuda", path, few)
    if reason is not None:
        path.unlink()
        raise ExportSkippedError(
            f"aoti_cuda: expected a package that torch {torch.__version__} can load here, got: {reason}. "
            "Take inductor_cuda, or try another version of torch."
        )
    return census


build = partial(build_in, torch.float32)


def requires() -> dict[str, Any]:
    """Return what a machine needs: the same kind of GPU, and what the code around the kernels needs."""
    return cuda_requirements()
