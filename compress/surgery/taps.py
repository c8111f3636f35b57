"""Named activations of a captured graph as extra outputs: module hooks no longer fire there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from compress.errors import CaptureError

__all__ = ["layer_names", "twin_graph", "with_features"]

_STEPS_TO_NORM = 4  # what fake quantization puts between a convolution and the BatchNorm behind it, at most


def layer_names(graph_module: GraphModule) -> list[str]:
    """Return the names of the modules whose operators are in a captured graph, in order of their last operator."""
    last: dict[str, int] = {}
    for position, node in enumerate(graph_module.graph.nodes):
        for name in _stack(node):
            last[name] = position
    return sorted(last, key=lambda name: last[name])


def twin_graph(graph_module: GraphModule) -> GraphModule:
    """Return a graph of its own over the very parameters, buffers and submodules of another."""
    twin = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    # The registries themselves, so that what is moved or replaced in one is moved in the other.
    twin._parameters, twin._buffers, twin._modules = (
        graph_module._parameters,
        graph_module._buffers,
        graph_module._modules,
    )
    for name, value in vars(graph_module).items():
        if isinstance(value, Tensor):  # made by code, in no registry
            vars(twin)[name] = value
    return twin


def with_features(graph_module: GraphModule, names: Sequence[str]) -> GraphModule:
    """Return a graph that gives ``(outputs, [activation of each name])``.

    Parameters, buffers and submodules are shared with the argument, which stays as it is. A layer that is called
    several times gives its last activation, as a hook would.

    Args:
        graph_module: Captured by ``torch.export``; nodes remember the modules they came from.
        names: Names of modules in the network that was captured.

    Raises:
        CaptureError: when a layer has left no operator in the graph.
    """
    twin = twin_graph(graph_module)
    found = [_activation(twin, name) for name in names]
    output = next(node for node in twin.graph.nodes if node.op == "output")
    codegen: Any = twin.graph._codegen
    info = codegen.pytree_info
    leaves = list(output.args[0]) if isinstance(output.args[0], list | tuple) else [output.args[0]]
    like = pytree.tree_unflatten([0] * len(leaves), info.out_spec)
    spec = pytree.tree_structure((like, [0] * len(found)))
    codegen.pytree_info = info._replace(out_spec=spec)
    output.args = ((*leaves, *found),)
    twin._out_spec = spec
    twin.recompile()
    return twin


def _activation(graph_module: GraphModule, name: str) -> Node:
    nodes = [node for node in graph_module.graph.nodes if name in _stack(node)]
    if not nodes:
        raise CaptureError(
            f"features: expected the activation of {name!r} in the captured graph, got no operator of that layer. "
            f"Name a layer that computes something, e.g. {', '.join(layer_names(graph_module)[-3:])}."
        )
    return _before_norm(nodes[-1])


def _before_norm(node: Node) -> Node:
    """Return what BatchNorm sees of a convolution: fake quantization scales the weight and undoes it behind."""
    here = node
    if "conv" in str(node.target):
        for _ in range(_STEPS_TO_NORM):
            users = [user for user in here.users if user.op == "call_function"]
            if len(users) != 1:
                break
            if users[0].target is torch.ops.aten.batch_norm.default:
                return here
            here = users[0]
    return node


def _stack(node: Node) -> list[str]:
    entries: dict[Any, Any] = node.meta.get("nn_module_stack") or {}
    return [name for name, _ in entries.values() if name]
