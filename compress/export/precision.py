"""A float program in half precision: weights and all that is computed in bfloat16 or float16, its ends in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from compress.errors import CaptureError, ExportSkippedError
from compress.export.graph import rewritten

__all__ = ["has_halves", "in_precision"]


def in_precision(program: ExportedProgram, dtype: torch.dtype) -> ExportedProgram:
    """Return a program that computes in half precision; what it takes and gives stays in float32.

    Numbers too large for the precision, as those that attention's masks are filled with, become its largest.

    Args:
        program: In float32; left as it is.
        dtype: ``torch.bfloat16`` or ``torch.float16``; with ``torch.float32`` the program is returned as it is.

    Raises:
        ExportSkippedError: when the program is quantised, or cannot be captured in that precision.

    Example:
        >>> program = torch.export.export(nn.Linear(2, 2), (torch.ones(3, 2),))
        >>> half = in_precision(program, torch.bfloat16)
        >>> {value.dtype for value in half.state_dict.values()}, half.module()(torch.ones(3, 2)).dtype
        ({torch.bfloat16}, torch.float32)
    """
    if any("quantize_per" in str(node.target) for node in program.graph.nodes):
        raise ExportSkippedError(
            f"{str(dtype).removeprefix('torch.')}: expected a network in floats, got a quantised one. Leave out the "
            "target, or quantize."
        )
    if dtype == torch.float32:
        return program
    try:
        return rewritten(program, lambda graph_module: _halve(graph_module, dtype))
    except CaptureError as error:
        raise ExportSkippedError(
            f"{str(dtype).removeprefix('torch.')}: expected a network that can be computed in it, got one that cannot: "
            f"{error} Leave out the target."
        ) from error


def has_halves(program: ExportedProgram) -> bool:
    """Say whether a program computes anything in half precision or less: engines then agree to so many digits only.

    Example:
        >>> has_halves(torch.export.export(nn.Linear(2, 2).bfloat16(), (torch.ones(3, 2).bfloat16(),)))
        True
    """
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    values = [node.meta.get("val") for graph in graphs for node in graph.nodes]
    return any(isinstance(value, torch.Tensor) and value.is_floating_point() and value.itemsize < 4 for value in values)


def _halve(graph_module: GraphModule, dtype: torch.dtype) -> int:
    changed = _halve_tensors(graph_module, dtype)
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and _halve_arguments(node, dtype):
            changed += 1
        elif node.op == "call_function" and _begins_floats(node):
            changed += _cast(graph_module, node, dtype)
    # After the arguments: these casts are to float32 on purpose.
    for node in list(graph_module.graph.nodes):
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            changed += _cast(graph_module, node, dtype)
        elif node.op == "output":
            with graph_module.graph.inserting_before(node):
                node.args = torch.fx.map_arg(node.args, lambda given: _as_before(graph_module, given))
    return changed


def _begins_floats(node: Node) -> bool:
    """Say whether a node makes float32 of what is not, as zeros and the quotient of integers."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return False
    # Weights and constants bring no value along.
    given = [other.meta.get("val") for other in node.all_input_nodes]
    read = any(other.op == "get_attr" for other in node.all_input_nodes)
    return not read and not any(isinstance(each, torch.Tensor) and each.is_floating_point() for each in given)


def _cast(graph_module: GraphModule, node: Node, dtype: torch.dtype) -> int:
    with graph_module.graph.inserting_after(node):
        cast = graph_module.graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    return 1


def _as_before(graph_module: GraphModule, given: Node) -> Node:
    if given.meta["val"].dtype != torch.float32:
        return given
    return graph_module.graph.call_function(torch.ops.aten.to.dtype, (given, torch.float32))


def _halve_tensors(graph_module: GraphModule, dtype: torch.dtype) -> int:
    """Put new tensors in the places of weights, buffers and constants, which the program goes on using."""
    changed = 0
    for module in graph_module.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.dtype == torch.float32:
                module._parameters[name] = nn.Parameter(_clamped(parameter, dtype), requires_grad=False)
                changed += 1
        for holder in (module._buffers, module.__dict__):
            for name, value in list(holder.items()):
                if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                    holder[name] = _clamped(value, dtype)
                    changed += 1
    return changed


def _halve_arguments(node: Node, dtype: torch.dtype) -> bool:
    limits = torch.finfo(dtype)

    def halved(value: Any) -> Any:
        if value == torch.float32 and isinstance(value, torch.dtype):
            return dtype
        if isinstance(value, float) and abs(value) > limits.max and abs(value) != float("inf"):
            return limits.max if value > 0 else limits.min
        return value

    args, kwargs = torch.utils._pytree.tree_map(halved, (node.args, dict(node.kwargs)))
    same = (args, kwargs) == (node.args, dict(node.kwargs))
    node.args, node.kwargs = args, kwargs
    return not same


def _clamped(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limits = torch.finfo(dtype)
    value = value.detach()
    return torch.where(value.isinf(), value, value.clamp(limits.min, limits.max)).to(dtype)
