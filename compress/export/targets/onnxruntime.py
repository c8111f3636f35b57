"""An ONNX file with explicit quantize and dequantize nodes, fused to integer kernels by ONNX Runtime when it loads."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram

from compress.errors import MissingPackageError
from compress.export.onnx.activations import free_products, quantize_preactivations
from compress.export.onnx.graph import OnnxGraph, mark_narrow
from compress.export.onnx.recurrent import quantize_recurrent
from compress.export.onnx.translate import translate
from compress.export.onnx.weights import (
    dequantised_in_each_call,
    let_constants_fold,
    transpose_weights,
    unsigned_where_shared,
)
from compress.export.targets import Census

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["FILE", "build", "census", "requires"]

FILE = "model.onnx"

_INT8 = {
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "MatMulIntegerToFloat",
    "ConvInteger",
    "MatMulInteger",
    "QAttention",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
}
_FLOAT = {"Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul", "FusedGemm", "ConvTranspose", "LSTM", "GRU", "Einsum"}


def build(program: ExportedProgram, path: Path) -> Census:
    """Translate the program and count the kernels that ONNX Runtime makes of it.

    Raises:
        ExportSkippedError: when the program is larger than one ONNX file can be, or has an operator that ONNX lacks.
        MissingPackageError: when onnx, onnxscript or onnxruntime is not installed.
    """
    model = translate(program, target="onnxruntime")
    graph = OnnxGraph(model)
    quantize_preactivations(graph)
    transpose_weights(graph)
    free_products(graph)
    graph.finish()
    quantize_recurrent(model)
    narrow = mark_narrow(model)
    path.write_bytes(model.SerializeToString())
    graph = OnnxGraph(model)
    let_constants_fold(graph, dequantised_in_each_call(_optimised(path)))
    if not narrow:
        unsigned_where_shared(graph)
    graph.finish()
    path.write_bytes(model.SerializeToString())
    return census(path)


def census(path: Path) -> Census:
    """Count the kernels of the graph as ONNX Runtime optimises it here."""
    counts = Counter(node.op_type for node in _nodes(_optimised(path).graph) if node.op_type != "Einsum" or _sums(node))
    int8, floats = (sum(counts[name] for name in names) for names in (_INT8, _FLOAT))
    kept = {name: count for name, count in counts.items() if name in _INT8 | _FLOAT or "Quantize" in name}
    return Census(int8, floats, kept, counts["QuantizeLinear"] + counts["DynamicQuantizeLinear"])


def _optimised(path: Path) -> ModelProto:
    """Return a model as ONNX Runtime runs it."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError("onnxruntime") from error
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(optimised)
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(str(optimised), load_external_data=False)


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield the nodes of a graph and of those within it, as the body of a loop."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _sums(einsum: NodeProto) -> bool:
    """Say whether it is a product of matrices, and not one element by element."""
    inputs, arrow, output = next(a.s for a in einsum.attribute if a.name == "equation").decode().partition("->")
    letters = [letter for letter in inputs if letter.isalpha()]
    return any(letter not in output if arrow else letters.count(letter) > 1 for letter in letters)


def requires() -> dict[str, Any]:
    """Return what a machine needs: nothing but ONNX Runtime, which compiles on loading."""
    return {}
