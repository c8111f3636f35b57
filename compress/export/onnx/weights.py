"""Storing int8 weights in an ONNX file the way that ONNX Runtime takes them into its kernels, or leaves them in peace.

Where it finds no integer kernel for a layer it would turn the weights to floats again in every call, and what it
knows of constant weights, as blocked layouts, would not apply.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from compress.export.onnx.graph import OnnxGraph

__all__ = ["dequantised_in_each_call", "let_constants_fold", "transpose_weights", "unsigned_where_shared"]

_PRODUCTS = ("MatMul", "Gemm")


def transpose_weights(graph: OnnxGraph) -> int:
    """Store matrices transposed instead of transposing them in the graph, in place.

    ONNX Runtime does it by itself where one layer alone reads a matrix; of layers that share one, as ALBERT's do, it
    makes products in floats.

    Returns:
        How many transpositions are gone.
    """
    turned = [node for node in graph.nodes if node.op_type == "Transpose" and _matrix(graph, node) is not None]
    for node in turned:
        source: Any = _matrix(graph, node)
        matrix = f"{source.input[0]}_transposed"
        if matrix not in graph.constants:
            graph.constant(matrix, np.ascontiguousarray(graph.constants[source.input[0]].T))
        name = node.output[0]
        zero = graph.constant(f"{name}_zero", graph.constants[source.input[2]])  # see ``split_zero_points``
        floats = graph.insert(node, "DequantizeLinear", [matrix, source.input[1], zero], f"{name}_dequantized")
        _set_axis(graph.makers[floats], 1 - _axis(source) % 2)
        node.input[0] = floats
        graph.remove(node)
        if not graph.users(source.output[0]):
            graph.remove(source)
    return len(turned)


def let_constants_fold(graph: OnnxGraph, left: Mapping[str, int]) -> int:
    """Write weights of layers that get no integer kernel with operators that are computed on loading, in place.

    ONNX Runtime never folds a ``DequantizeLinear`` away. A cast and a product it does, the file stays as small, and
    what is computed is the same. (Sums in int32, ``ConvInteger``, take two to twenty times as long as floats.)

    Args:
        graph: Of the model.
        left: How often ONNX Runtime dequantises a constant in each call, from ``dequantised_in_each_call``; one that
            has found a kernel somewhere is left alone.

    Returns:
        How many weights.
    """
    sources = [node for node in graph.nodes if node.op_type == "DequantizeLinear" and graph.scale(node) is not None]
    uses: Counter[str] = Counter()
    for source in sources:
        uses[source.input[0]] += len(graph.users(source.output[0]))
    folded = {name for name in uses if name in graph.constants and uses[name] == left.get(name)}
    for source in [node for node in sources if node.input[0] in folded]:
        for layer in graph.users(source.output[0]):
            bias = graph.maker(layer.input[2], "DequantizeLinear") if len(layer.input) > 2 else None
            if bias is not None and bias.input[0] in graph.constants and graph.scale(bias) is not None:
                _fold(graph, bias)  # a layer with a bias that is not constant has no blocked layout either
        _fold(graph, source)
    return len(folded)


def _fold(graph: OnnxGraph, source: NodeProto) -> None:
    """Turn one dequantization of a constant into a cast and a product."""
    integers, (scale, zero_point) = graph.constants[source.input[0]], graph.scale(source) or (None, None)
    if scale is None or zero_point is None or zero_point.any() or scale.ndim > 1:
        return
    name, axis = source.output[0], _axis(source) % max(integers.ndim, 1)
    if scale.ndim == 1:
        scale = scale.reshape([-1 if index == axis else 1 for index in range(integers.ndim)])
    floats = graph.insert(source, "Cast", [source.input[0]], f"{name}_floats", to=1)
    factor = graph.constant(f"{name}_factor", scale)
    source.op_type = "Mul"
    del source.input[:], source.attribute[:]
    source.input.extend([floats, factor])


def dequantised_in_each_call(optimised: ModelProto) -> Counter[str]:
    """Return how often constants of more than one dimension are left to be dequantised.

    Args:
        optimised: As ONNX Runtime runs it.
    """
    stored = {entry.name for entry in optimised.graph.initializer if len(entry.dims) > 1}
    readers = Counter(name for node in optimised.graph.node for name in node.input)
    found: Counter[str] = Counter()
    for node in optimised.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            found[node.input[0]] += readers[node.output[0]]
    return found


def unsigned_where_shared(graph: OnnxGraph) -> int:
    """Store weights that several layers read in uint8, with zero at 128, in place.

    ONNX Runtime makes that of every int8 weight where sums have to be exact without VNNI, a second time of those that
    are shared, and fails to load.

    Returns:
        How many weights.
    """
    readers: Counter[str] = Counter()
    sources = [node for node in graph.nodes if node.op_type == "DequantizeLinear" and graph.scale(node) is not None]
    for node in sources:
        readers[node.input[0]] += len(graph.users(node.output[0]))
    changed = set()
    for node in sources:
        integers = graph.constants.get(node.input[0])
        if integers is None or integers.dtype != np.int8 or integers.ndim < 2 or readers[node.input[0]] < 2:
            continue
        changed.add(node.input[0])
        name = f"{node.input[0]}_unsigned"
        if name not in graph.constants:
            graph.constant(name, _unsigned(integers))
        node.input[0] = name
        node.input[2] = graph.constant(f"{node.output[0]}_unsigned_zero", _unsigned(graph.constants[node.input[2]]))
    return len(changed)


def _unsigned(integers: np.ndarray) -> np.ndarray:
    return (integers.astype(np.int16) + 128).astype(np.uint8)


def _matrix(graph: OnnxGraph, node: NodeProto) -> NodeProto | None:
    """Return what dequantises the matrix that a node transposes for products, if that is what it does."""
    source = graph.maker(node.input[0], "DequantizeLinear")
    if source is None or graph.is_output(node.output[0]) or graph.scale(source) is None:
        return None
    integers = graph.constants.get(source.input[0])
    products = all(user.op_type in _PRODUCTS for user in graph.users(node.output[0]))
    return source if integers is not None and integers.ndim == 2 and products else None


def _axis(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)


def _set_axis(node: NodeProto, axis: int) -> None:
    from onnx import helper

    node.attribute.append(helper.make_attribute("axis", axis))
