"""Activations behind integer layers in an ONNX file, as ONNX Runtime has to have them to compute the layers so.

oneDNN computes a convolution and its HardSwish, SiLU or GELU in one kernel and quantises what comes out; so PT2E says
nothing of what is between. ONNX Runtime has no such kernel, and an integer convolution there only where its own result
is quantised: without this it would compute the convolution in floats.

A matrix product may give floats there, but not to a ReLU: behind that it looks for a quantization alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compress.export.onnx.graph import SAME_VALUES

if TYPE_CHECKING:
    from onnx import NodeProto

    from compress.export.onnx.graph import OnnxGraph

__all__ = ["free_products", "quantize_preactivations"]

_STEPS = 100_001
_BEYOND = 12.0  # above the largest result, all of them are straight from here on, to less than a step
_WIDEST = 8.0  # times the result's range, three bits: LeakyReLU behind a range around zero reaches much farther

Activation = Callable[[Tensor], Tensor]


def quantize_preactivations(graph: OnnxGraph) -> int:
    """Quantise the results of quantised convolutions whose activation's result is quantised, in place.

    What is known of the result bounds what goes in: beyond some numbers the quantised result changes no more, so
    clipping there loses nothing. In between it costs a second rounding; where that would be of steps more than eight
    times as wide as the result's, the convolution is left as it is.

    Returns:
        How many there were.
    """
    changed = 0
    for convolution in [node for node in graph.nodes if node.op_type == "Conv"]:
        name = convolution.output[0]
        if any(graph.maker(source, "DequantizeLinear") is None for source in convolution.input[:2]):
            continue
        found = None if graph.is_output(name) else _activation(graph, name)
        limits = found and _limits(graph, *found)
        if limits:
            graph.quantize(name, graph.users(name), *limits)
            changed += 1
    return changed


def free_products(graph: OnnxGraph) -> int:
    """Write ReLUs between quantised matrix products and floats as the larger of a number and zero, in place.

    Returns:
        How many there were.
    """
    changed = 0
    for relu in [node for node in graph.nodes if node.op_type == "Relu"]:
        product, users = graph.makers.get(relu.input[0]), graph.users(relu.output[0])
        if product is None or product.op_type not in ("MatMul", "Gemm") or len(graph.users(relu.input[0])) != 1:
            continue
        if any(graph.maker(source, "DequantizeLinear") is None for source in product.input[:2]):
            continue
        if graph.is_output(relu.output[0]) or any(user.op_type != "QuantizeLinear" for user in users):
            relu.op_type = "Max"
            relu.input.append(graph.constant(f"{relu.output[0]}_least", np.zeros((), np.float32)))
            changed += 1
    return changed


def _activation(graph: OnnxGraph, name: str) -> tuple[Activation, str] | None:
    """Return the function that alone reads a value, and the name of its result."""
    users = graph.users(name)
    if len(users) == 2:
        gate, product = sorted(users, key=lambda node: node.op_type == "Mul")
        gated = gate.op_type == "Sigmoid" and product.op_type == "Mul" and graph.users(gate.output[0]) == [product]
        return (functional.silu, product.output[0]) if gated and gate.output[0] in product.input else None
    make = _ACTIVATIONS.get(users[0].op_type) if len(users) == 1 else None
    return None if make is None else (make(users[0]), users[0].output[0])


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def _gelu(node: NodeProto) -> Activation:
    approximate = _attribute(node, "approximate", b"none").decode()
    return lambda x: functional.gelu(x, approximate=approximate)


def _leaky_relu(node: NodeProto) -> Activation:
    slope = _attribute(node, "alpha", 0.01)
    return lambda x: functional.leaky_relu(x, slope)


def _elu(node: NodeProto) -> Activation:
    alpha = _attribute(node, "alpha", 1.0)
    return lambda x: functional.elu(x, alpha)


_ACTIVATIONS: dict[str, Callable[[NodeProto], Activation]] = {
    "HardSwish": lambda node: functional.hardswish,
    "Gelu": _gelu,
    "LeakyRelu": _leaky_relu,
    "Elu": _elu,
}


def _ranges(graph: OnnxGraph, name: str) -> Iterator[tuple[float, float] | None]:
    """Yield the range to which each reader quantises a value, whatever shape it has by then; ``None`` of others."""
    if graph.is_output(name):
        yield None
    for node in graph.users(name):
        if node.op_type in SAME_VALUES:
            yield from _ranges(graph, node.output[0])
        else:
            yield graph.range(node) if node.op_type == "QuantizeLinear" else None


def _limits(graph: OnnxGraph, function: Activation, result: str) -> tuple[float, float] | None:
    """Return the numbers between which a function's quantised result changes; ``None`` where it is not known."""
    ranges = list(_ranges(graph, result))
    known = [limits for limits in ranges if limits is not None]
    if not known or len(known) < len(ranges):
        return None
    low, high = min(limits[0] for limits in known), max(limits[1] for limits in known)
    reach = _BEYOND + high + _WIDEST * (high - low)
    span = torch.linspace(-reach, reach, _STEPS, dtype=torch.float64)
    values = (function(span).clamp(low, high) * (255 / (high - low))).round()
    changes = (values[1:] != values[:-1]).nonzero().flatten()
    if not len(changes):
        return None
    least, most = min(float(span[changes[0]]), 0.0), max(float(span[changes[-1] + 1]), 0.0)
    return (least, most) if most - least <= _WIDEST * (high - low) else None
