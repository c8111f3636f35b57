"""The portable program in float16, for any GPU; it is checked on the CPU, so that none is needed to build it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from compress.export.precision import in_precision
from compress.export.targets import eager
from compress.export.targets.eager import requires

__all__ = ["CHECKED_BY", "EXACT", "FILE", "build", "requires"]

FILE = "program.cuda_fp16.pt2"
EXACT = False
CHECKED_BY = "eager"


def build(program: ExportedProgram, path: Path) -> None:
    """Save the program in float16.

    Raises:
        ExportSkippedError: when the program is quantised.
    """
    eager.build(in_precision(program, torch.float16), path)
