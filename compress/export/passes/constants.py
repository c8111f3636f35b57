"""Operators over weights and constants alone, computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from compress.export.passes.nodes import add_constant, constant, is_pure, replace

__all__ = ["fold_constants"]

_SMALL = 4096  # bytes that a constant may take whatever it is made from


def fold_constants(graph_module: GraphModule) -> int:
    """Compute what no input changes; return how many results were stored.

    Dequantized weights stay integers, and nothing is stored that takes more bytes than what it is made from.
    """
    values: dict[Node, Tensor] = {}
    for node in graph_module.graph.nodes:
        stored = constant(graph_module, node)
        if stored is not None:
            values[node] = stored
        elif is_pure(node) and "dequantize" not in str(node.target) and all(n in values for n in node.all_input_nodes):
            result = _compute(node, values)
            if isinstance(result, Tensor) and result.nbytes <= _limit(node, values):
                values[node] = result
    changed = 0
    for node, value in values.items():
        if node.op == "call_function" and any(user not in values for user in node.users):
            replace(node, add_constant(graph_module, value, node, "folded"))
            changed += 1
    graph_module.graph.eliminate_dead_code()
    return changed


def _limit(node: Node, values: dict[Node, Tensor]) -> int:
    return max(_SMALL, sum(values[source].nbytes for source in node.all_input_nodes))


def _compute(node: Node, values: dict[Node, Tensor]) -> Any:
    target: Any = node.target
    with torch.no_grad():
        return target(*map_arg(node.args, values.__getitem__), **map_arg(node.kwargs, values.__getitem__))
