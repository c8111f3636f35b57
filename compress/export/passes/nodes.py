"""What passes ask of a graph's nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

__all__ = ["add_constant", "argument", "constant", "is_pure", "replace"]


def is_pure(node: Node) -> bool:
    """Say whether an operator gives the same for the same and changes nothing."""
    target: Any = node.target
    return (
        node.op == "call_function"
        and isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def argument(node: Node, name: str) -> Any:
    """Return an operator's argument, given by position or by name, or its default.

    Raises:
        KeyError: when the operator has none of that name.
    """
    target: Any = node.target
    for position, own in enumerate(target._schema.arguments):
        if own.name == name:
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, own.default_value)
    raise KeyError(name)


def constant(graph_module: GraphModule, node: Any) -> Tensor | None:
    """Return the tensor that a node stands for, if it is a weight or constant."""
    if not (isinstance(node, Node) and node.op == "get_attr"):
        return None
    owner, _, leaf = str(node.target).rpartition(".")
    value = getattr(graph_module.get_submodule(owner), leaf)
    return value.detach() if isinstance(value, Tensor) else None


def add_constant(graph_module: GraphModule, value: Tensor, before: Node, name: str) -> Node:
    """Store a tensor and return a new node that stands for it."""
    taken = {key for key, _ in graph_module.named_buffers()}
    free = next(own for own in (f"{name}_{index}" for index in range(len(taken) + 1)) if own not in taken)
    graph_module.register_buffer(free, value.contiguous())
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.get_attr(free)
    node.meta["val"] = value
    return node


def replace(node: Node, by: Node) -> None:
    """Let readers of a node read another one, and take it out."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)
