"""What TensorRT wants of an ONNX file: integers around zero, and operators that its parser has.

Source: NVIDIA TensorRT documentation, "Explicit Quantization"; onnx-tensorrt, docs/operators.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from compress.export.onnx.graph import OnnxGraph, drop_metadata, split_zero_points

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["obstacles", "rewrite"]

_PAIR = ("QuantizeLinear", "DequantizeLinear")
_MIDDLES = (127, 128)
_ABSENT = {
    "BitShift",
    "Compress",
    "ConcatFromSequence",
    "ConvInteger",
    "Det",
    "DynamicQuantizeLinear",
    "Hardmax",
    "MatMulInteger",
    "MaxRoiPool",
    "MaxUnpool",
    "Multinomial",
    "QLinearConv",
    "QLinearMatMul",
    "SequenceAt",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceLength",
    "SplitToSequence",
    "StringNormalizer",
    "TfIdfVectorizer",
    "Unique",
}


def rewrite(model: ModelProto) -> None:
    """Write uint8 with zero in the middle as int8 with zero at 0, in place: the same numbers, but for one at an end."""
    graph = OnnxGraph(model)
    for node in graph.nodes:
        if node.op_type not in _PAIR:
            continue
        found = graph.scale(node)
        if found is not None and found[1].dtype == np.uint8 and np.isin(found[1], _MIDDLES).all():
            if node.input[0] in graph.constants:
                integers = graph.constants[node.input[0]].astype(np.int16) - found[1].astype(np.int16)
                node.input[0] = graph.constant(f"{node.output[0]}_signed", integers.clip(-128, 127).astype(np.int8))
            node.input[2] = graph.constant(f"{node.output[0]}_middle", np.zeros(found[1].shape, np.int8))
    split_zero_points(graph)
    graph.finish()
    drop_metadata(model)


def obstacles(model: ModelProto) -> list[str]:
    """Say what TensorRT would refuse, one line each; nothing where it takes the file.

    Args:
        model: As ``rewrite`` left it.
    """
    graph = OnnxGraph(model)
    found = [f"{node.op_type} ({node.output[0]})" for node in graph.nodes if node.op_type in _ABSENT or node.domain]
    for node in graph.nodes:
        if node.op_type in _PAIR:
            found += [f"{node.op_type} of {node.input[0]}: {reason}" for reason in _of_pair(graph, node)]
    return found


def _of_pair(graph: OnnxGraph, node: NodeProto) -> list[str]:
    pair = graph.scale(node)
    if pair is None:
        return ["scale and zero point are no constants"]
    scale, zero = pair
    reasons = []
    if zero.dtype == np.int32:
        reasons.append("int32, where biases are floats")
    elif zero.dtype != np.int8 or zero.any():
        reasons.append(f"zero point {int(zero.flat[0])} in {zero.dtype}, where int8 around 0 is wanted")
    if scale.size > 1 and node.input[0] not in graph.constants:
        reasons.append("a scale for each channel, where activations have one")
    return reasons
