"""A package compiled by AOTInductor for this CPU, in bfloat16 where the processor computes in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from compress.errors import ExportSkippedError
from compress.export.precision import in_precision
from compress.export.targets import Census, aoti
from compress.measure.machine import has_bf16

__all__ = ["EXACT", "FILE", "build", "requires"]

FILE = "model.aoti_bf16.pt2"
EXACT = False


def build(program: ExportedProgram, path: Path, *, max_autotune: bool = False) -> Census:
    """Compile the program in bfloat16 into one file, and count its kernels; ``max_autotune`` as for ``aoti``.

    Raises:
        ExportSkippedError: when the processor emulates bfloat16, the program is quantised, or there is no
            compiler.
    """
    if not has_bf16():
        raise ExportSkippedError(
            "aoti_bf16: expected a processor with instructions for bfloat16 (AVX512-BF16, AMX or Arm's BF16), got one "
            "without, which is slower in it than in float32. Leave the target out."
        )
    return aoti.build(in_precision(program, torch.bfloat16), path, max_autotune=max_autotune)


def requires() -> dict[str, Any]:
    """Return what a machine needs to run code compiled on this one."""
    return aoti.requires()
