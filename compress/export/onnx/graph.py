"""Rewriting an ONNX file so that ONNX Runtime fuses its quantize and dequantize nodes to integer kernels.

PT2E leaves out the quantization of what oneDNN can fuse in floating point: the branch of a residual sum that a
convolution feeds, and the last layer's bias. ONNX Runtime has no such kernels and would compute these layers in
floats. Each function here mends one such place in a model, in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.export.graph import LARGEST_NARROW
from compress.runtime.engines.onnxruntime import NARROW

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = [
    "SAME_VALUES",
    "OnnxGraph",
    "drop_metadata",
    "drop_relus",
    "mark_narrow",
    "narrow_relus",
    "pool_globally",
    "quantize_biases",
    "quantize_branches",
    "rewrite",
    "split_zero_points",
]

_WEIGHTED = ("Conv", "Gemm")
_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool")
SAME_VALUES = ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that give another shape to what they take."""

_NOTHING_NEW = (*_POOLS, *SAME_VALUES, "QuantizeLinear", "DequantizeLinear")
_EXACTLY = 1 + 1e-6  # scales are float32


def rewrite(model: ModelProto) -> None:
    """Apply every rewriting of this file, in place."""
    graph = OnnxGraph(model)
    pool_globally(graph)
    narrow_relus(graph)
    drop_relus(graph)
    quantize_branches(graph)
    quantize_biases(graph)
    split_zero_points(graph)
    graph.finish()
    drop_metadata(model)


class OnnxGraph:
    """A model with what rewriting needs: who makes a value, who reads it, and constants as arrays.

    Args:
        model: Changed in place; call ``finish`` at the end.
    """

    def __init__(self, model: ModelProto) -> None:
        from onnx import numpy_helper

        self.graph = model.graph
        self.nodes = list(model.graph.node)
        self.constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
        self.makers = {name: node for node in self.nodes for name in node.output}

    def users(self, name: str) -> list[NodeProto]:
        """Return the nodes that read a value."""
        return [node for node in self.nodes if name in node.input]

    def is_output(self, name: str) -> bool:
        """Say whether a value is an output of the model."""
        return any(entry.name == name for entry in self.graph.output)

    def maker(self, name: str, kind: str) -> NodeProto | None:
        """Return the node of a kind that makes a value, if it is one."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def scale(self, node: NodeProto) -> tuple[np.ndarray, np.ndarray] | None:
        """Return scale and zero point of a quantize or dequantize node, where they are constants."""
        if len(node.input) < 3 or node.input[1] not in self.constants or node.input[2] not in self.constants:
            return None
        return self.constants[node.input[1]], self.constants[node.input[2]]

    def range(self, node: NodeProto) -> tuple[float, float] | None:
        """Return the least and largest number that a per-tensor quantize or dequantize node can give."""
        found = self.scale(node)
        if found is None or found[0].size != 1:
            return None
        scale, zero_point = float(found[0]), int(found[1])
        limits = np.iinfo(found[1].dtype)
        return (limits.min - zero_point) * scale, (limits.max - zero_point) * scale

    def rank(self, name: str) -> int | None:
        """Return how many dimensions a value has, where the model says so."""
        values = [entry for entry in self.graph.value_info if entry.name == name]
        return len(values[0].type.tensor_type.shape.dim) if values else None

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add a constant and return its name."""
        from onnx import numpy_helper

        self.constants[name] = value
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def insert(self, before: NodeProto, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node in front of another one and return its output's name."""
        from onnx import helper

        node = helper.make_node(kind, inputs, [output], name=f"node_{output}", **attributes)
        self.nodes.insert(next(i for i, other in enumerate(self.nodes) if other is before), node)
        self.makers[output] = node
        return output

    def remove(self, node: NodeProto) -> None:
        """Take out a node; its readers read its first input."""
        for user in self.users(node.output[0]):
            _redirect(user, node.output[0], node.input[0])
        self.nodes = [other for other in self.nodes if other is not node]
        del self.makers[node.output[0]]

    def quantize(self, name: str, users: Sequence[NodeProto], low: float, high: float) -> None:
        """Have nodes read a value rounded to uint8 between two numbers."""
        scale = np.float32((high - low) / 255)
        zero_point = np.uint8(np.clip(np.rint(-low / float(scale)), 0, 255))
        constants = [
            self.constant(f"{name}_scale", np.array(scale)),
            self.constant(f"{name}_zero", np.array(zero_point)),
        ]
        first = next(node for node in self.nodes if any(node is user for user in users))
        integers = self.insert(first, "QuantizeLinear", [name, *constants], f"{name}_quantized")
        floats = self.insert(first, "DequantizeLinear", [integers, *constants], f"{name}_dequantized")
        for user in users:
            _redirect(user, name, floats)

    def finish(self) -> None:
        """Write the nodes back, and drop constants that nobody reads any more."""
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input} | {entry.name for entry in self.graph.output}
        kept = [entry for entry in self.graph.initializer if entry.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)


def narrow_relus(graph: OnnxGraph) -> None:
    """Quantise what comes out of a ReLU or ReLU6 without the numbers below zero, in half the steps, in place.

    A range that is symmetric around zero wastes half of its numbers there, and ONNX Runtime fuses a ReLU only where
    nothing below zero can be said, and nothing above its ceiling. The clipping stays where it was, to a quarter of a
    step. What is pooled or reshaped behind it is quantised alike: a pool runs in integers only where its input and its
    result have the same steps.
    """
    for node in [node for node in graph.nodes if not graph.is_output(node.output[0])]:
        ceiling = _ceiling_of(graph, node.output[0])
        if ceiling is None:
            continue
        quantizers = graph.users(node.output[0])
        if not quantizers or any(user.op_type != "QuantizeLinear" for user in quantizers):
            continue
        readers = [reader for user in quantizers for reader in graph.users(user.output[0])]
        if any(reader.op_type != "DequantizeLinear" for reader in readers):
            continue
        ends = [(entry, found) for entry in (*quantizers, *readers) if (found := graph.scale(entry))]
        if len(ends) < len(quantizers) + len(readers) or not all(_is_symmetric(*found) for _, found in ends):
            continue
        for entry, found in ends:
            top = min(float(found[0]) * (255 - int(found[1])), ceiling)
            scale = np.array(top / 255, dtype=found[0].dtype).reshape(found[0].shape)
            entry.input[1] = graph.constant(f"{entry.output[0]}_half", scale)
            entry.input[2] = graph.constant(f"{entry.output[0]}_none", np.zeros_like(found[1]))


def _is_symmetric(scale: np.ndarray, zero_point: np.ndarray) -> bool:
    return scale.size == 1 and zero_point.dtype == np.uint8 and int(zero_point) in (127, 128)


def _ceiling_of(graph: OnnxGraph, name: str) -> float | None:
    """Return the most that a value can be which is never negative; ``None`` of others."""
    node = graph.makers.get(name)
    while node is not None and node.op_type in _NOTHING_NEW:
        node = graph.makers.get(node.input[0])
    return None if node is None else _ceiling(graph, node)


def drop_relus(graph: OnnxGraph) -> None:
    """Take out ReLUs, and ReLU6, whose result is quantised with nothing beyond: quantization clips there already."""
    for node in list(graph.nodes):
        ceiling = _ceiling(graph, node)
        if ceiling is None:
            continue
        users = graph.users(node.output[0])
        ranges = [graph.range(user) if user.op_type == "QuantizeLinear" else None for user in users]
        if (
            users
            and not graph.is_output(node.output[0])
            and all(found is not None and found[0] == 0 and found[1] <= ceiling * _EXACTLY for found in ranges)
        ):
            graph.remove(node)


def _ceiling(graph: OnnxGraph, node: NodeProto) -> float | None:
    """Return what a ReLU, or a clipping from zero on, gives at most; ``None`` of other nodes."""
    if node.op_type == "Relu":
        return float("inf")
    if node.op_type != "Clip":
        return None
    least, most = (graph.constants.get(name) for name in [*node.input[1:], "", ""][:2])
    if least is None or float(least) != 0 or (most is None and len(node.input) > 2 and node.input[2]):
        return None
    return float("inf") if most is None else float(most)


def quantize_branches(graph: OnnxGraph) -> None:
    """Quantise what a convolution or matrix product adds to an already quantised value.

    The sum ``z = y + s`` is quantised, so it is clipped to a known range, as ``s`` is; hence no value of ``y``
    outside ``[min z - max s, max z - min s]`` makes a difference, and that range loses nothing by clipping.
    """
    for add in [node for node in graph.nodes if node.op_type == "Add" and not graph.is_output(node.output[0])]:
        total = [graph.range(user) if user.op_type == "QuantizeLinear" else None for user in graph.users(add.output[0])]
        for branch, other in (tuple(add.input), tuple(add.input)[::-1]):
            maker, quantized = graph.makers.get(branch), graph.maker(other, "DequantizeLinear")
            if maker is None or maker.op_type not in _WEIGHTED or quantized is None or len(total) != 1:
                continue
            added = graph.range(quantized)
            if total[0] is None or added is None or len(graph.users(branch)) != 1:
                continue
            graph.quantize(branch, [add], total[0][0] - added[1], total[0][1] - added[0])
            break


def quantize_biases(graph: OnnxGraph) -> None:
    """Turn float biases of quantised layers into int32 in units of input scale times weight scale."""
    for node, activation, weight in list(_quantized_layers(graph)):
        if len(node.input) < 3 or node.input[2] not in graph.constants:
            continue
        bias = graph.constants[node.input[2]]
        unit = _usable_scales(graph, weight) * float(graph.constants[activation.input[1]])
        if bias.dtype != np.float32 or unit.size not in (1, bias.size):
            continue
        name = f"{node.name}_bias"
        values = np.rint(bias.astype(np.float64) / unit)
        if np.abs(values).max(initial=0) > np.iinfo(np.int32).max:
            continue
        inputs = [
            graph.constant(f"{name}_int32", values.astype(np.int32)),
            graph.constant(f"{name}_scale", unit.astype(np.float32)),
            graph.constant(f"{name}_zero", np.zeros(unit.shape, np.int32)),
        ]
        node.input[2] = graph.insert(node, "DequantizeLinear", inputs, f"{name}_dequantized", axis=0)


def split_zero_points(graph: OnnxGraph) -> None:
    """Give each weight a zero point of its own: ONNX Runtime fails on shared ones where it turns weights to uint8."""
    for node in graph.nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in graph.constants and graph.scale(node):
            node.input[2] = graph.constant(f"{node.output[0]}_zero", graph.constants[node.input[2]])


def pool_globally(graph: OnnxGraph) -> None:
    """Write the mean over height and width as ``GlobalAveragePool``, which has an integer kernel."""
    for node in graph.nodes:
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in graph.constants:
            continue
        keep = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
        source = graph.maker(node.input[0], "DequantizeLinear")
        if graph.rank(node.input[0]) not in (4, None):
            continue
        if sorted(graph.constants[node.input[1]].tolist()) in ([-2, -1], [2, 3]) and keep and source is not None:
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]


def drop_metadata(model: ModelProto) -> None:
    """Drop the exporter's notes: they are a third of a small file and hold paths of the machine that exported."""
    entries = [model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info]
    for entry in [*entries, *model.graph.input, *model.graph.output]:
        del entry.metadata_props[:]
        entry.doc_string = ""
    # ONNX Runtime infers these shapes itself.
    del model.graph.value_info[:]


def mark_narrow(model: ModelProto) -> bool:
    """Note in a model that its int8 weights have 7 bits, where all do, those of loops too, and nothing else is int8.

    Returns:
        Whether that is so.
    """
    graph = OnnxGraph(model)
    tables = {node.input[0] for node in graph.nodes if node.op_type == "Gather"}
    constants = _all_constants(model.graph)
    weights = [value for name, value in constants if value.dtype == np.int8 and value.ndim > 1 and name not in tables]
    others = any(
        node.op_type == "QuantizeLinear" and (found := graph.scale(node)) is not None and found[1].dtype == np.int8
        for node in graph.nodes
    )
    narrow = all(np.abs(value.astype(np.int16)).max(initial=0) <= LARGEST_NARROW for value in weights)
    if not (weights and narrow and not others):
        return False
    model.metadata_props.add(key=NARROW, value="1")
    return True


def _all_constants(graph: GraphProto) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the constants of a graph and of the bodies of its loops, by name."""
    from onnx import numpy_helper

    yield from ((constant.name, numpy_helper.to_array(constant)) for constant in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all_constants(attribute.g)


def _quantized_layers(graph: OnnxGraph) -> Iterator[tuple[NodeProto, NodeProto, NodeProto]]:
    for node in graph.nodes:
        if node.op_type not in _WEIGHTED:
            continue
        activation, weight = (graph.maker(name, "DequantizeLinear") for name in node.input[:2])
        if activation is not None and weight is not None and graph.range(activation) and graph.scale(weight):
            yield node, activation, weight


def _usable_scales(graph: OnnxGraph, weight: NodeProto) -> np.ndarray:
    """Return the weight's scales, those of channels that are all zero set to one: else their bias would overflow."""
    scales, integers = graph.constants[weight.input[1]], graph.constants.get(weight.input[0])
    if integers is None or scales.ndim != 1:
        return scales.astype(np.float64)
    axis = next((attribute.i for attribute in weight.attribute if attribute.name == "axis"), 1)
    dead = ~np.moveaxis(integers, axis, 0).reshape(len(scales), -1).any(1)
    if np.any(scales[dead] != 1):
        scales = np.where(dead, np.float32(1), scales)
        weight.input[1] = graph.constant(f"{weight.output[0]}_scale", scales)
    return scales.astype(np.float64)


def _redirect(node: NodeProto, old: str, new: str) -> None:
    for index, name in enumerate(node.input):
        if name == old:
            node.input[index] = new
