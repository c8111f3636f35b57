"""Dead code, assertions of what the program was captured with, and weights that nobody reads."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

__all__ = ["drop_unused"]

_ASSERTIONS = {torch.ops.aten._assert_tensor_metadata.default}


def drop_unused(graph_module: GraphModule) -> int:
    """Take out operators whose results nobody reads, and weights likewise; return how many of both."""
    nodes = len(graph_module.graph.nodes)
    for node in list(graph_module.graph.nodes):
        if node.target in _ASSERTIONS:
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    unread = [
        name
        for named in (graph_module.named_parameters, graph_module.named_buffers)
        for name, _ in named(remove_duplicate=False)
        if name not in read
    ]
    for name in unread:
        owner, _, leaf = name.rpartition(".")
        delattr(graph_module.get_submodule(owner), leaf)
    return nodes - len(graph_module.graph.nodes) + len(unread)
