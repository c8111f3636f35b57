"""LSTMs and GRUs with integer weights in an ONNX file as what ONNX Runtime computes in integers.

ONNX itself has no recurrent operator on integers. ``com.microsoft.DynamicQuantizeLSTM`` takes int8 weights with a scale
for each row, and quantises inputs and hidden states to uint8 by their extremes as it goes. A GRU becomes
products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.export.onnx.graph import OnnxGraph
from compress.export.onnx.gru import DOMAIN, Rows, scan_gru

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["quantize_recurrent"]


def quantize_recurrent(model: ModelProto) -> int:
    """Rewrite each LSTM and each GRU whose weights are dequantised integers, in place.

    Args:
        model: As exported; its weights may be reordered on the way by slices and concatenations.

    Returns:
        How many were rewritten.
    """
    from onnx import helper

    graph = OnnxGraph(model)
    num = sum(_rewrite(graph, node) for node in list(graph.nodes) if node.op_type in _KINDS)
    if num:
        graph.finish()
        _drop_unread(graph)
        if all(entry.domain != DOMAIN for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return num


def _rewrite(graph: OnnxGraph, node: NodeProto) -> bool:
    if any(attribute.name == "layout" and attribute.i for attribute in node.attribute):
        return False
    inputs, states = (_integers(graph, name) for name in node.input[1:3])
    return inputs is not None and states is not None and _KINDS[node.op_type](graph, node, (inputs, states))


def _lstm(graph: OnnxGraph, node: NodeProto, weights: tuple[Rows, Rows]) -> bool:
    inputs = [*node.input, *[""] * (8 - len(node.input))]
    scales: list[str] = []
    for place, rows in enumerate(weights, 1):
        name = f"{node.output[0]}_{'wr'[place - 1]}"
        inputs[place] = graph.constant(name, np.ascontiguousarray(rows.values.transpose(0, 2, 1)))
        zeros = np.zeros(rows.scales.shape, np.int8)
        scales += [graph.constant(f"{name}_scale", rows.scales), graph.constant(f"{name}_zero", zeros)]
    for attribute in [attribute for attribute in node.attribute if attribute.name == "layout"]:
        node.attribute.remove(attribute)  # which that operator does not know
    del node.input[:]
    node.input.extend([*inputs, *scales])
    node.op_type, node.domain = "DynamicQuantizeLSTM", DOMAIN
    return True


def _gru(graph: OnnxGraph, node: NodeProto, weights: tuple[Rows, Rows]) -> bool:
    has_biases = len(node.input) > 3 and node.input[3] != ""
    biases = _evaluate(graph, node.input[3], lambda _: None) if has_biases else None
    return (biases is not None or not has_biases) and scan_gru(graph, node, weights, biases)


_KINDS: dict[str, Callable[[OnnxGraph, NodeProto, tuple[Rows, Rows]], bool]] = {"LSTM": _lstm, "GRU": _gru}


def _integers(graph: OnnxGraph, name: str) -> Rows | None:
    """Return a weight's integers and the scale of each row, where it is made of dequantised int8 alone."""

    def integers(node: NodeProto) -> np.ndarray | None:
        values, found = graph.constants.get(node.input[0]), graph.scale(node)
        is_symmetric = found is not None and not np.any(found[1])
        return values if values is not None and values.dtype == np.int8 and is_symmetric else None

    def scales(node: NodeProto) -> np.ndarray | None:
        values, found = graph.constants.get(node.input[0]), graph.scale(node)
        if values is None or found is None:
            return None
        return np.broadcast_to(found[0].reshape(-1, 1), (len(values), 1)).astype(np.float32)

    values, rows = _evaluate(graph, name, integers), _evaluate(graph, name, scales)
    if values is None or rows is None or values.dtype != np.int8:
        return None
    return Rows(values, np.ascontiguousarray(rows[..., 0]))


def _evaluate(graph: OnnxGraph, name: str, leaf: Callable[[NodeProto], np.ndarray | None]) -> np.ndarray | None:
    """Compute a value that is made of dequantised constants by slices, concatenations and added dimensions."""
    if name in graph.constants:
        return graph.constants[name]
    node = graph.makers.get(name)
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":
        return leaf(node)
    if node.op_type not in _OPERATORS:
        return None
    inputs = [_evaluate(graph, source, leaf) for source in node.input]
    return None if any(value is None for value in inputs) else _OPERATORS[node.op_type](inputs, node)


def _slice(inputs: list[Any], node: NodeProto) -> np.ndarray:
    x, starts, ends, *rest = inputs
    axes = rest[0] if rest else np.arange(len(starts))
    steps = rest[1] if len(rest) > 1 else np.ones(len(starts), np.int64)
    where: list[slice] = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps):
        where[int(axis)] = slice(int(start), int(end), int(step))
    return x[tuple(where)]


def _concat(inputs: list[Any], node: NodeProto) -> np.ndarray:
    return np.concatenate(inputs, axis=next(entry.i for entry in node.attribute if entry.name == "axis"))


def _unsqueeze(inputs: list[Any], node: NodeProto) -> np.ndarray:
    return np.expand_dims(inputs[0], tuple(int(axis) for axis in inputs[1]))


_OPERATORS: dict[str, Callable[[list[Any], NodeProto], np.ndarray]] = {
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
}


def _drop_unread(graph: OnnxGraph) -> None:
    """Take out nodes whose results nobody reads any more, and their constants."""
    while True:
        read = {name for node in graph.nodes for name in node.input} | {entry.name for entry in graph.graph.output}
        kept = [node for node in graph.nodes if any(name in read for name in node.output if name)]
        if len(kept) == len(graph.nodes):
            break
        graph.nodes = kept
    graph.finish()
