"""Storing int8 weights in an ONNX file the way that ONNX Runtime takes them into its kernels, or leaves them in peace.

Where it finds no integer kernel for a layer it would turn the weights to floats again in every call, and what it
knows of constant weights, as blocked layouts, would not apply.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import NodeProto

    from compress.export.onnx_graph import OnnxGraph

__all__ = ["let_constants_fold", "transpose_weights", "unsigned_where_shared"]

_PRODUCTS = ("MatMul", "Gemm")
_LAYERS = ("Conv", "ConvTranspose", *_PRODUCTS)


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
        floats = graph.insert(node, "DequantizeLinear", [matrix, *source.input[1:]], f"{name}_dequantized")
        _set_axis(graph.makers[floats], 1 - _axis(source) % 2)
        node.input[0] = floats
        graph.remove(node)
        if not graph.users(source.output[0]):
            graph.remove(source)
    return len(turned)


def let_constants_fold(graph: OnnxGraph) -> int:
    """Write the weights of layers that get no integer kernel with operators that are computed on loading, in place.

    ONNX Runtime never folds a ``DequantizeLinear`` away. A cast and a product it does, the file stays as small, and
    what is computed is the same. (Sums in int32, ``ConvInteger``, took two to six times as long as floats.)

    Returns:
        How many weights.
    """
    changed = 0
    for source in [node for node in graph.nodes if node.op_type == "DequantizeLinear"]:
        integers, scales = graph.constants.get(source.input[0]), graph.scale(source)
        users = graph.users(source.output[0])
        if integers is None or scales is None or not users or not all(_is_open(graph, user, source) for user in users):
            continue
        scale, zero_point = scales
        if zero_point.any() or integers.dtype not in (np.int8, np.uint8) or scale.ndim > 1:
            continue
        name, axis = source.output[0], _axis(source)
        if scale.ndim == 1:
            scale = scale.reshape([-1 if index == axis else 1 for index in range(integers.ndim)])
        floats = graph.insert(source, "Cast", [source.input[0]], f"{name}_floats", to=1)
        factor = graph.constant(f"{name}_factor", scale)
        source.op_type = "Mul"
        del source.input[:], source.attribute[:]
        source.input.extend([floats, factor])
        changed += 1
    return changed


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


def _is_open(graph: OnnxGraph, layer: NodeProto, weight: NodeProto) -> bool:
    """Say whether a layer multiplies by a weight in floats, whatever ONNX Runtime fuses."""
    if layer.op_type not in _LAYERS or len(layer.input) < 2 or layer.input[1] != weight.output[0]:
        return False
    if graph.maker(layer.input[0], "DequantizeLinear") is None or layer.op_type == "ConvTranspose":
        return True
    if layer.op_type in _PRODUCTS:
        return False  # there is a kernel from integers to floats
    users = graph.users(layer.output[0])
    in_integers = users and all(user.op_type == "QuantizeLinear" for user in users)
    has_bias = len(layer.input) > 2 and layer.input[2] in graph.constants  # in floats: it did not fit into int32
    return bool(graph.is_output(layer.output[0]) or not in_integers or has_bias)


def _axis(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)


def _set_axis(node: NodeProto, axis: int) -> None:
    from onnx import helper

    node.attribute.append(helper.make_attribute("axis", axis))
