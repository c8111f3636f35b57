"""The portable program: plain ATen operators that run wherever torch does, without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from compress.export.archive import repack
from compress.export.graph import drop_traces

__all__ = ["FILE", "build", "requires"]

FILE = "program.pt2"


def build(program: ExportedProgram, path: Path) -> None:
    """Save the program, its quantization operators written out as arithmetic.

    A loading process then needs no library that registers them. There is no census: this engine computes in floating
    point by design.
    """
    with torch.no_grad():
        plain = program.run_decompositions(_arithmetic())
    drop_traces(plain)
    # Example inputs would be stored along with it, and nothing reads them.
    plain._example_inputs = None
    torch.export.save(plain, path)
    repack(path)


def requires() -> dict[str, Any]:
    """Return what a machine needs: nothing but torch."""
    return {}


def _arithmetic() -> dict[Any, Callable[..., Tensor]]:
    if not hasattr(torch.ops, "quantized_decomposed") or not hasattr(
        torch.ops.quantized_decomposed, "quantize_per_tensor"
    ):
        return {}
    operators = torch.ops.quantized_decomposed
    return {
        operators.quantize_per_tensor.default: _quantize,
        operators.dequantize_per_tensor.default: _dequantize,
        operators.dequantize_per_channel.default: _dequantize_channels,
    }


def _quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return (torch.round(x * (1.0 / scale)) + zero_point).clamp(low, high).to(dtype)


def _dequantize(
    x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype, *, out_dtype: Any = None
) -> Tensor:
    return (x.to(out_dtype or torch.float32) - zero_point) * scale


def _dequantize_channels(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    axis: int,
    low: int,
    high: int,
    dtype: torch.dtype,
    *,
    out_dtype: Any = None,
) -> Tensor:
    wide = [1] * x.dim()
    wide[axis] = -1
    values = x.to(out_dtype or torch.float32)
    if zero_points is not None:
        values = values - zero_points.view(wide)
    return values * scales.view(wide).to(values.dtype)
