"""What a program may not do, refused by name before anything is built from it."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from compress.errors import ExportError
from compress.export.passes.nodes import argument

__all__ = ["check_operators"]

# Of an operator that may be random, arguments that make it certain.
_OFF: dict[str, Any] = {"train": False, "training": False, "p": 0, "dropout": 0, "dropout_p": 0}


def check_operators(program: ExportedProgram) -> None:
    """Make sure that a program gives the same for the same inputs.

    Args:
        program: As captured, in eval mode.

    Raises:
        ExportError: when it draws random numbers, which each engine would draw in its own way, or once for all; or
            when it casts beside ``torch.autocast``: torch 2.13 records types as if there were none, and checks them.
    """
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    for graph in graphs:
        for node in _alive(graph):
            if _is_random(node):
                raise ExportError(
                    f"forward: expected the same outputs for the same inputs, got random numbers of {node.target}"
                    f"{_layer(node)}. Draw them in training alone (if self.training), or take them as an input."
                )
            if _casts_under_autocast(node):
                raise ExportError(
                    "forward: expected no casts beside torch.autocast, got some. Leave autocast out; targets of half "
                    "precision, as aoti_bf16, make their programs of one in float32."
                )


def _alive(graph: Graph) -> list[Node]:
    """Return the nodes that outputs, or what is changed in place, depend on, in order."""
    found: set[Node] = set()
    open_nodes = [node for node in graph.nodes if node.op == "output" or _changes(node)]
    while open_nodes:
        node = open_nodes.pop()
        if node not in found:
            found.add(node)
            open_nodes += node.all_input_nodes
    return [node for node in graph.nodes if node in found]


def _changes(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _is_random(node: Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    names = {own.name for own in target._schema.arguments}
    return not any(argument(node, name) == value for name, value in _OFF.items() if name in names)


def _casts_under_autocast(node: Node) -> bool:
    """Say whether types are checked within an autocast, or of what comes out of it."""
    if node.target is not torch.ops.higher_order.wrap_with_autocast or not node.args[2]:
        return False
    owner, body = node.graph.owning_module, node.args[4]
    assert isinstance(owner, GraphModule)
    assert isinstance(body, Node)
    open_nodes = [node, *owner.get_submodule(str(body.target)).graph.nodes]  # type: ignore[misc, union-attr]
    found = set()
    while open_nodes:
        user = open_nodes.pop()
        if user.target is torch.ops.aten._assert_tensor_metadata.default:
            return True
        if user not in found:
            found.add(user)
            open_nodes += user.users
    return False


def _layer(node: Node) -> str:
    """Return `` in 'LAYER'``, where it is known."""
    name, _ = [("", None), *(node.meta.get("nn_module_stack") or {}).values()][-1]
    return f" in {name!r}" if name else ""
