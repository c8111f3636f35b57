"""The portable program: plain ATen operators that run wherever torch does, without a compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from compress.export.archive import repack
from compress.export.arithmetic import written_out
from compress.export.graph import drop_assertions, drop_traces, loosen_views
from compress.export.precision import in_precision
from compress.surgery.lengths import lengths_of
from compress.surgery.recurrent import kept_whole

__all__ = ["FILE", "build", "build_in", "requires"]

FILE = "program.pt2"


def build(program: ExportedProgram, path: Path) -> None:
    """Save the program, its quantization operators written out as arithmetic.

    A loading process then needs no library that registers them. There is no census: this engine computes in floating
    point by design.
    """
    with torch.no_grad(), kept_whole(lengths_of(program)):
        plain = program.run_decompositions(written_out())
    drop_traces(plain)
    drop_assertions(plain)
    loosen_views(plain.graph_module)
    # Example inputs would be stored along with it, and nothing reads them.
    plain._example_inputs = None
    torch.export.save(plain, path)
    repack(path)


def build_in(dtype: torch.dtype, program: ExportedProgram, path: Path) -> None:
    """Save the program in half precision; its inputs and outputs stay in float32.

    Raises:
        ExportSkippedError: when the program is quantised, or cannot be captured in that precision.
    """
    build(in_precision(program, dtype), path)


def requires() -> dict[str, Any]:
    """Return what a machine needs: nothing but torch."""
    return {}
