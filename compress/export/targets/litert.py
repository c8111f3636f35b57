"""LiteRT's file (TensorFlow Lite), of one sample at a time: its converter takes no dynamic batch."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from compress.errors import MissingPackageError, first_line
from compress.export.passes.nodes import add_constant, constant
from compress.export.targets import Census, ExportSkippedError
from compress.export.xnnpack_graph import (
    quantize_branches,
    revive_channels,
    sign_activations,
    split_dequantizers,
    widen_weights,
)
from compress.runtime.engines.litert import open_content

__all__ = ["FILE", "build", "census", "quantize_weights", "requires"]

FILE = "model.tflite"

_MATRIX = {"CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL", "CONV_3D"}


def build(program: ExportedProgram, path: Path) -> Census:
    """Convert the program for one sample, and count the kernels of the file.

    A product of integers is one only where its result is quantised too; others are computed in floats.

    Raises:
        ExportSkippedError: when the converter does not take the program, or it has several outputs.
        MissingPackageError: when litert-torch or ai-edge-litert is not installed.
    """
    if len(program.graph_signature.user_outputs) > 1:
        raise ExportSkippedError(
            f"litert: expected one output, since the file has several in an order of its own, got "
            f"{len(program.graph_signature.user_outputs)}. Leave the target out."
        )
    try:
        import litert_torch
        from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
        from litert_torch.quantize.quant_config import QuantConfig
    except ImportError as error:
        raise MissingPackageError("litert-torch", "litert") from error
    graph_module = program.module(check_guards=False)
    settings: dict[str, Any] = {}
    if _rewrite(graph_module):  # only then the converter looks for integers
        quantizer = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        settings["quant_config"] = QuantConfig(pt2e_quantizer=quantizer)
    args, _ = program.example_inputs
    try:
        with torch.no_grad(), _quiet():
            litert_torch.convert(graph_module, tuple(tensor[:1] for tensor in args), **settings).export(str(path))
    except Exception as error:  # it raises many kinds; each means the same to the user
        raise ExportSkippedError(
            f"litert: expected a program that it converts, got: {first_line(error)}. Leave the target out."
        ) from error
    return census(path)


def census(path: Path) -> Census:
    """Count the kernels of a file by the type of what they multiply."""
    interpreter = open_content(path.read_bytes(), 1, delegate=False)
    dtypes = {entry["index"]: entry["dtype"].__name__ for entry in interpreter.get_tensor_details()}
    int8, floats, others = Counter[str](), Counter[str](), Counter[str]()
    for operator in interpreter._get_ops_details():
        name, first = operator["op_name"], dtypes.get(int(operator["inputs"][0]), "")
        if name in _MATRIX:
            (int8 if first == "int8" else floats)[f"{name} {first}"] += 1
        elif name == "QUANTIZE" and first == "float32":
            others[name] += 1
    return Census(int8.total(), floats.total(), {**int8, **floats, **others}, others.total())


def quantize_weights(graph_module: GraphModule) -> int:
    """Write integer weights as floats that are quantised, as the converter wants them; return how many."""
    operators, changed = torch.ops.quantized_decomposed, 0
    for node in list(graph_module.graph.nodes):
        if node.target is not operators.dequantize_per_channel.default:
            continue
        values = [constant(graph_module, value) if isinstance(value, Node) else value for value in node.args]
        if values[0] is None:
            continue
        floats = add_constant(graph_module, operators.dequantize_per_channel.default(*values), node, "floats")
        with graph_module.graph.inserting_before(node):
            integers = graph_module.graph.call_function(
                operators.quantize_per_channel.default, (floats, *node.args[1:])
            )
        node.update_arg(0, integers)
        changed += 1
    graph_module.graph.lint()
    graph_module.recompile()
    return changed


def requires() -> dict[str, Any]:
    """Return what a machine needs: nothing but LiteRT, whose kernels fit any processor."""
    return {}


def _rewrite(graph_module: GraphModule) -> int:
    passes = (split_dequantizers, sign_activations, revive_channels, widen_weights, quantize_branches, quantize_weights)
    return sum(each(graph_module) for each in passes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter's prints and notes, those of its compiled part too, away from the user."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
        logging.root.setLevel(level)
