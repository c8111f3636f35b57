"""Rewriting an exported program before it is lowered: small pure functions from program to program."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from compress.surgery.capture import export_program

__all__ = ["widen_single_channels"]

_CONVOLUTIONS = {torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default}


def widen_single_channels(program: ExportedProgram) -> ExportedProgram:
    """Give quantised convolutions with one input channel a second one that is zero.

    With one channel a tensor is contiguous and channels-last at once. Inductor and oneDNN then disagree on the layout
    of what an int8 convolution gives, and its values come out in the wrong order (seen with torch 2.13).

    Args:
        program: A quantised program; left as it is.

    Returns:
        A program with the same outputs; the very same one when there is nothing to do.
    """
    graph_module = program.module(check_guards=False)
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.target in _CONVOLUTIONS and _is_dequantized(node.args[0]) and _is_dequantized(node.args[1]):
            changed |= _widen(graph_module, node)
    if not changed:
        return program
    graph_module.recompile()
    args, _ = program.example_inputs
    return export_program(graph_module, args)


def _widen(graph_module: GraphModule, convolution: Node) -> bool:
    activation, weight = convolution.args[0], convolution.args[1]
    assert isinstance(activation, Node)
    assert isinstance(weight, Node)
    holder = weight.args[0]
    if not isinstance(holder, Node) or holder.op != "get_attr":
        return False
    owner, _, leaf = str(holder.target).rpartition(".")
    value = getattr(graph_module.get_submodule(owner), leaf)
    groups = convolution.args[6] if len(convolution.args) > 6 else 1
    if value.shape[1] != 1 or groups != 1 or len(weight.users) > 1 or len(activation.users) > 1:
        return False
    padding = [0] * (2 * (value.dim() - 2)) + [0, 1]
    # The channel's weights are zero: whatever number its values stand for, it adds nothing.
    setattr(graph_module.get_submodule(owner), leaf, _like(value, F.pad(value, padding)))
    with graph_module.graph.inserting_before(activation):
        padded = graph_module.graph.call_function(
            torch.ops.aten.constant_pad_nd.default, (activation.args[0], padding, 0)
        )
    activation.update_arg(0, padded)
    return True


def _like(old: Any, new: torch.Tensor) -> Any:
    return torch.nn.Parameter(new, requires_grad=False) if isinstance(old, torch.nn.Parameter) else new


def _is_dequantized(node: Any) -> bool:
    return isinstance(node, Node) and "dequantize_per" in str(node.target)
