"""Operators that compute what another one has computed already."""

from __future__ import annotations

from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx.passes.dialect.common.cse_pass import CSEPass

from compress.export.passes.nodes import is_pure

__all__ = ["merge_duplicates"]


def merge_duplicates(graph_module: GraphModule) -> int:
    """Compute each value once (common subexpressions); return how many operators went."""
    nodes = len(graph_module.graph.nodes)
    impure = {
        node.target.overloadpacket
        for node in graph_module.graph.nodes
        if isinstance(node.target, OpOverload) and not is_pure(node)
    }
    result = CSEPass(impure)(graph_module)
    assert result is not None
    merged = result.graph_module.graph
    merged.set_codegen(graph_module.graph._codegen)  # the form of inputs and outputs, which the pass forgets
    graph_module.graph = merged
    return nodes - len(graph_module.graph.nodes)
