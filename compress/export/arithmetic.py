"""Quantization operators written out as plain arithmetic, which runs wherever torch does, and found again in it.

The portable program of an artefact holds the arithmetic. A target that is added later needs the operators, by which
engines know what is computed in integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

__all__ = ["recognise", "written_out"]

_ATEN = torch.ops.aten
_INTEGERS = (torch.int8, torch.uint8, torch.int16)


def written_out() -> dict[Any, Callable[..., Any]]:
    """Return what each quantization operator computes, as functions of plain ATen operators."""
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


def recognise(graph_module: GraphModule) -> int:
    """Put quantization operators where their arithmetic is, in place.

    Args:
        graph_module: Of a program that ``written_out`` was applied to.

    Returns:
        How many were found.
    """
    # The operators are registered by this import; torch has no public one.
    import torch.ao.quantization.fx._decomposed  # noqa: F401

    found = 0
    for node in list(graph_module.graph.nodes):
        replaced = _as_quantize(node) or _as_dequantize(node)
        if replaced is None:
            continue
        operator, args = replaced
        with graph_module.graph.inserting_before(node):
            fresh = graph_module.graph.call_function(operator, args)
        fresh.meta = dict(node.meta)
        node.replace_all_uses_with(fresh)
        found += 1
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return found


def _as_quantize(node: Node) -> tuple[Any, tuple[Any, ...]] | None:
    """Read ``clamp(round(x * (1 / scale)) + zero_point, low, high).to(dtype)``."""
    steps = [_ATEN._to_copy.default, _ATEN.clamp.default, _ATEN.add.Tensor, _ATEN.round.default, _ATEN.mul.Tensor]
    chain = _chain(node, *steps)
    if chain is None:
        return None
    dtype = node.kwargs.get("dtype")
    _, clamped, shifted, _, scaled = chain
    inverse, zero_point, limits = scaled.args[1], shifted.args[1], clamped.args[1:3]
    if not isinstance(inverse, float) or not isinstance(zero_point, int) or len(limits) != 2 or dtype not in _INTEGERS:
        return None
    args = (scaled.args[0], _scale(node, inverse), zero_point, *limits, dtype)
    return torch.ops.quantized_decomposed.quantize_per_tensor.default, args


def _as_dequantize(node: Node) -> tuple[Any, tuple[Any, ...]] | None:
    """Read ``(x.to(float32) - zero_point) * scale``, for a tensor or along an axis of a weight."""
    chain = _chain(node, _ATEN.mul.Tensor, _ATEN.sub.Tensor, _ATEN._to_copy.default)
    chain = chain or _chain(node, _ATEN.mul.Tensor, _ATEN._to_copy.default)
    if chain is None or chain[-1].kwargs.get("dtype") != torch.float32:
        return None
    integers, scale = chain[-1].args[0], node.args[1]
    zero_point = chain[1].args[1] if len(chain) == 3 else None
    dtype = _dtype(integers)
    if dtype not in _INTEGERS:
        return None
    operators, limits = torch.ops.quantized_decomposed, _limits(integers, dtype)
    if isinstance(scale, float) and isinstance(zero_point, int):
        return operators.dequantize_per_tensor.default, (integers, scale, zero_point, *limits, dtype)
    scales, points = _along_axis(scale), _along_axis(zero_point)
    if scales is None or (zero_point is not None and (points is None or points[1] != scales[1])):
        return None
    args = (integers, scales[0], points[0] if points else None, scales[1], *limits, dtype)
    return operators.dequantize_per_channel.default, args


def _chain(node: Node, *operators: Any) -> list[Node] | None:
    """Return a node and those it is computed from by their first arguments, when they are these operators."""
    found: list[Node] = []
    value: Any = node
    for operator in operators:
        if not isinstance(value, Node) or value.target is not operator:
            return None
        found.append(value)
        value = value.args[0]
    return found


def _scale(quantized: Node, inverse: float) -> float:
    """Return the scale whose inverse is written there: the very number where what reads the integers has it."""
    for cast in quantized.users:
        for node in (user for shifted in cast.users for user in shifted.users):
            scale = node.args[1] if node.target is _ATEN.mul.Tensor else None
            if isinstance(scale, float) and scale and 1.0 / scale == inverse:
                return scale
    return 1.0 / inverse


def _along_axis(value: Any) -> tuple[Node, int] | None:
    """Read a vector that is viewed with its values along one axis."""
    if not isinstance(value, Node) or value.target not in (_ATEN.view.default, _ATEN.reshape.default):
        return None
    vector, sizes = value.args
    if not isinstance(vector, Node) or not isinstance(sizes, list) or sorted(sizes) != [-1, *[1] * (len(sizes) - 1)]:
        return None
    return vector, sizes.index(-1)


def _dtype(value: Any) -> torch.dtype | None:
    if not isinstance(value, Node):
        return None
    if value.op == "get_attr":
        holder: Any = value.graph.owning_module
        for part in str(value.target).split("."):
            holder = getattr(holder, part)
        return holder.dtype
    return getattr(value.meta.get("val"), "dtype", None)


def _limits(integers: Any, dtype: torch.dtype) -> tuple[int, int]:
    if integers.target is torch.ops.quantized_decomposed.quantize_per_tensor.default:
        return integers.args[3:5]
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


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
