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


def _arithmetic() -> dict[Any, Callable[..., Any]]:
    if not hasattr(torch.ops, "quantized_decomposed") or not hasattr(
        torch.ops.quantized_decomposed, "quantize_per_tensor"
    ):
        return {}
    operators = torch.ops.quantized_decomposed
    return {
        operators.quantize_per_tensor.default: _quantize,
        operators.dequantize_per_tensor.default: _dequantize,
        operators.dequantize_per_channel.default: _dequantize_channels,
        operators.choose_qparams.tensor: _choose,
        operators.quantize_per_tensor.tensor: _quantize_by,
        operators.dequantize_per_tensor.tensor: _dequantize_by,
    }


def _quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return (torch.round(x * (1.0 / scale)) + zero_point).clamp(low, high).to(dtype)


def _dequantize(
    x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype, *, out_dtype: Any = None
) -> Tensor:
    return (x.to(out_dtype or torch.float32) - zero_point) * scale


def _choose(x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Find a batch's scale and zero point, as dynamic quantization does at run time."""
    least, largest = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = ((largest - least) / (high - low)).clamp(min=eps)
    zero_point = (low - torch.round(least / scale)).clamp(low, high)
    return scale.double().reshape(1), zero_point.long().reshape(1)


def _quantize_by(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return (torch.round(x * (1.0 / scale).to(x.dtype)) + zero_point).clamp(low, high).to(dtype)


def _dequantize_by(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, dtype: torch.dtype, *, out_dtype: Any = None
) -> Tensor:
    wide = out_dtype or torch.float32
    return (x.to(wide) - zero_point) * scale.to(wide)


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
