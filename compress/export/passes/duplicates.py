"""Operators that compute what another one has computed already."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch.fx import GraphModule, Node

from compress.export.passes.nodes import is_pure

__all__ = ["merge_duplicates"]


def merge_duplicates(graph_module: GraphModule) -> int:
    """Compute each value once (common subexpressions); return how many operators went.

    Constants are the same where their types are, too: ``x + 1`` and ``x + 1.0`` are of different dtypes.
    """
    graph = graph_module.graph
    first: dict[Hashable, Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if not is_pure(node):
            continue
        same = first.setdefault((node.target, _comparable(node.args), _comparable(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            merged += 1
    return merged


def _comparable(value: Any) -> Hashable:
    if isinstance(value, Node):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    if isinstance(value, Mapping):
        return tuple((key, _comparable(each)) for key, each in value.items())
    return type(value), repr(value)
