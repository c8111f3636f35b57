"""A package compiled by AOTInductor for the GPU of this machine, in float16."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from compress.export.targets import Census
from compress.export.targets.aoti_cuda import build_in, requires

__all__ = ["EXACT", "FILE", "build", "requires"]

FILE = "model.aoti_cuda_fp16.pt2"
EXACT = False


def build(program: ExportedProgram, path: Path) -> Census:
    """Compile the program into one file, and count its kernels.

    Raises:
        ExportSkippedError: when there is no GPU, or the program is quantised.
        ExportError: when the compiler fails.
    """
    return build_in(torch.float16, program, path)
