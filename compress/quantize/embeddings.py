"""Embeddings in integers: rows are rounded as they are looked up, and the table is stored as integers once converted.

Each row has a scale of its own, by which its largest value is the largest integer. Training thus rounds what a batch
looks up, not the table, and there is no range to calibrate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from compress.quantize.annotate import layer_of, lookups
from compress.quantize.schemes import Scheme

__all__ = ["round_embeddings", "round_vectors", "store_embeddings"]

_aten = torch.ops.aten


def round_embeddings(graph_module: GraphModule, schemes: Mapping[str, Scheme]) -> None:
    """Round what embeddings give to the integers of their schemes, in place.

    Schemes of float8 leave embeddings as they are. With a scale for each group of weights, a row still has one scale,
    and 8 bits for that; other schemes of few bits give embeddings what the first and the last layer get.

    Args:
        graph_module: Captured and normalised.
        schemes: Of each module.
    """
    for node in lookups(graph_module):
        largest = _largest(schemes[layer_of(node)])
        if largest is None:
            continue
        with graph_module.graph.inserting_after(node):
            rounded = graph_module.graph.call_function(round_vectors, (node, largest))
        rounded.meta = dict(node.meta)
        node.replace_all_uses_with(rounded)
        rounded.update_arg(0, node)
    graph_module.recompile()


def round_vectors(x: Tensor, largest: int) -> Tensor:
    """Return rows as they come back from integers, the largest value of each as ``largest``; gradients pass through.

    Args:
        x: Shape (..., D).
        largest: The largest integer, and minus the least.

    Example:
        >>> round_vectors(torch.tensor([[0.6, -2.0], [0.0, 0.0]]), 2)
        tensor([[ 1., -2.],
                [ 0.,  0.]])
    """
    step = _step(x.detach(), largest)
    return (x.detach() / step).round() * step + (x - x.detach())


def store_embeddings(graph_module: GraphModule) -> None:
    """Look up integers and their scales where ``round_vectors`` has rounded, in place.

    Args:
        graph_module: Converted, its parameters as they were trained.
    """
    graph = graph_module.graph
    for node in [node for node in graph.nodes if node.target is round_vectors]:
        lookup, largest = cast("tuple[Node, int]", node.args)
        table, indices = cast("tuple[Node, Node]", lookup.args[:2])
        weight = _attribute(graph_module, table).detach()
        step = _step(weight, largest)
        with graph.inserting_before(node):
            integers = _stored(graph_module, table, f"integers_{largest}", (weight / step).round().to(torch.int8))
            steps = _stored(graph_module, table, f"steps_{largest}", step)
            rows = graph.call_function(_aten.embedding.default, (integers, indices))
            rows = graph.call_function(_aten.to.dtype, (rows, weight.dtype))
            scale = graph.call_function(_aten.embedding.default, (steps, indices))
            values = graph.call_function(_aten.mul.Tensor, (rows, scale))
        values.meta = dict(node.meta)
        node.replace_all_uses_with(values)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    graph_module.recompile()


def _largest(scheme: Scheme) -> int | None:
    if scheme.weight_bits is None or scheme.number != "int":
        return None
    bits = 8 if scheme.group_size else scheme.weight_bits
    return int(2 ** (bits - 1) - 1)


def _step(rows: Tensor, largest: int) -> Tensor:
    step = rows.abs().amax(-1, keepdim=True) / largest
    return step.clamp(min=torch.finfo(step.dtype).tiny)


def _attribute(graph_module: GraphModule, node: Node) -> Tensor:
    owner, _, leaf = str(node.target).rpartition(".")
    value: Tensor = getattr(graph_module.get_submodule(owner), leaf)
    return value


def _stored(graph_module: GraphModule, table: Node, kind: str, value: Tensor) -> Node:
    """Return a node for a tensor that belongs to a table; several look-ups of one table share it."""
    name: Any = f"{table.target}_{kind}".replace(".", "_")
    if not hasattr(graph_module, name):
        graph_module.register_buffer(name, value)
    return graph_module.graph.get_attr(name)
