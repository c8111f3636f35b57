"""Embeddings in integers: rows are rounded as they are looked up, and the table is stored as integers once converted.

Each row has a scale of its own, by which its largest value is the largest integer. Training thus rounds what a batch
looks up, not the table, and there is no range to calibrate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from compress.quantize.graph.annotate import layer_of, lookups
from compress.quantize.graph.normalize import constant_of
from compress.quantize.schemes import Scheme

__all__ = ["look_up_floats", "round_embeddings", "round_vectors", "store_embeddings"]

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
    return _integers(x.detach(), step, largest) * step + (x - x.detach())


def look_up_floats(graph_module: GraphModule) -> None:
    """Leave what embeddings give as it is, in place, with as many nodes as before."""
    for node in graph_module.graph.nodes:
        if node.target is round_vectors:
            node.target = _as_they_are
    graph_module.recompile()


def store_embeddings(graph_module: GraphModule) -> None:
    """Look up integers and their scales where ``round_vectors`` has rounded, in place.

    Args:
        graph_module: Converted, its parameters as they were trained.
    """
    graph, store = graph_module.graph, _Store(graph_module)
    for node in [node for node in graph.nodes if node.target is round_vectors]:
        lookup, largest = cast("tuple[Node, int]", node.args)
        table, indices = cast("tuple[Node, Node]", lookup.args[:2])
        weight = constant_of(graph_module, table)
        step = _step(weight, largest)
        with graph.inserting_before(node):
            integers = store(f"{table.target}_integers_{largest}", _integers(weight, step, largest).to(torch.int8))
            steps = store(f"{table.target}_steps_{largest}", step)
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


def _as_they_are(x: Tensor, largest: int) -> Tensor:
    return x


def _step(rows: Tensor, largest: int) -> Tensor:
    step = rows.abs().amax(-1, keepdim=True) / largest
    return step.clamp(min=torch.finfo(step.dtype).tiny)


def _integers(rows: Tensor, step: Tensor, largest: int) -> Tensor:
    return (rows / step).round().clamp(-largest, largest)  # in bfloat16, a quotient may be one more


class _Store:
    """Keeps tensors in a graph module under names of their own; look-ups of one table share what belongs to it."""

    def __init__(self, graph_module: GraphModule) -> None:
        self._graph_module = graph_module
        self._names: dict[str, str] = {}

    def __call__(self, key: str, value: Tensor) -> Node:
        if key not in self._names:
            name = key.replace(".", "_")
            while hasattr(self._graph_module, name):
                name += "_"
            self._graph_module.register_buffer(name, value)
            self._names[key] = name
        return self._graph_module.graph.get_attr(self._names[key])
