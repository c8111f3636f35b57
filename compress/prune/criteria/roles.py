"""What parameters do for the units that lie along their dimensions, read off the graph.

A layer's weight *makes* the units of its outputs and *reads* those of its inputs, a normalisation's weight *scales*
them, and everything else (biases, tables of positions, layer scales) *joins* them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from compress.prune.coupling.context import operators

__all__ = ["JOINS", "MAKES", "READS", "SCALES", "Use", "roles_of", "uses"]

MAKES, READS, SCALES, JOINS = "makes", "reads", "scales", "joins"

aten = torch.ops.aten


@dataclass(frozen=True)
class Use:
    """An operator that takes a parameter.

    Args:
        node: The operator.
        source: The value that meets the parameter there, if any.
        name: The parameter, as the graph lists it first.
        roles: What it does, for each of its dimensions.
    """

    node: Node
    source: Node | None
    name: str
    roles: dict[int, str]


@dataclass(frozen=True)
class _View:
    """A node that is a parameter: its name, and which of the parameter's dimensions each of its own is."""

    name: str
    dims: tuple[int, ...]


def roles_of(graph_module: GraphModule) -> dict[tuple[str, int], str]:
    """Return what each dimension of each parameter does, at the operator that takes the parameter first.

    Example:
        >>> from torch import nn
        >>> from compress.prune.coupling import static_graph
        >>> graph = static_graph(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), [torch.ones(2, 3)])
        >>> {slot: role for slot, role in roles_of(graph).items() if "weight" in slot[0]}
        {('0.weight', 0): 'makes', ('0.weight', 1): 'reads', ('1.weight', 0): 'scales'}
    """
    found: dict[tuple[str, int], str] = {}
    for use in uses(graph_module):
        for dim, role in use.roles.items():
            found.setdefault((use.name, dim), role)
    return found


def uses(graph_module: GraphModule) -> Iterator[Use]:
    """Yield every operator that takes a parameter, in the order of the graph.

    Args:
        graph_module: Of an exported program, as its ``module()`` or ``Captured`` gives it.
    """
    names = {id(tensor): name for name, tensor in reversed(list(graph_module.named_parameters()))}
    yield from _uses(graph_module, names, ())


def _uses(graph_module: GraphModule, names: Mapping[int, str], given: Sequence[_View | None]) -> Iterator[Use]:
    views: dict[Node, _View] = {}
    arguments = iter(given)
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            view = next(arguments, None)
            if view is not None:
                views[node] = view
        elif node.op == "get_attr":
            tensor = _attribute(graph_module, str(node.target))
            if id(tensor) in names:
                views[node] = _View(names[id(tensor)], tuple(range(tensor.dim())))
        elif node.op == "call_function":
            region = next((i for i, arg in enumerate(node.args) if _is_region(graph_module, arg)), None)
            if region is not None:  # under no_grad or autocast
                inner = _attribute(graph_module, str(node.args[region].target))
                yield from _uses(inner, names, [views.get(arg) for arg in node.args[region + 1 :]])
            elif (moved := _moved(node, views)) is not None:
                views[node] = moved
            else:
                yield from _taken(node, views)


def _taken(node: Node, views: Mapping[Node, _View]) -> Iterator[Use]:
    source = next((each for each in node.all_input_nodes if each not in views and each.op != "get_attr"), None)
    for position, arg in enumerate(node.args):
        for place, entry in enumerate(arg if isinstance(arg, list | tuple) else [arg]):
            if isinstance(entry, Node) and entry in views:
                view = views[entry]
                sides = _sides(node, position, place, len(view.dims))
                roles = {dim: sides.get(own, JOINS) for own, dim in enumerate(view.dims)}
                yield Use(node, source, view.name, roles)


def _sides(node: Node, position: int, place: int, rank: int) -> dict[int, str]:
    """Return the role of each dimension of an operand, where it has one."""
    target = node.target
    if target in _EINSUM:
        return _letters(str(node.args[0]), place)
    if target in _RECURRENT:
        return {0: MAKES, 1: READS} if rank == 2 else {}
    first, second = _PRODUCTS.get(target, (None, None))
    if position == first:  # a matrix on the left: its rows are outputs
        return {rank - 2: MAKES, rank - 1: READS}
    if position == second:
        return {rank - 1: MAKES, rank - 2: READS} if rank > 1 else {0: READS}
    known = _LAYERS.get(target)
    return known[1] if known is not None and known[0] == position else {}


def _letters(equation: str, place: int) -> dict[int, str]:
    given, _, result = equation.replace(" ", "").partition("->")
    own = given.split(",")[place]
    if "." in own:
        return {}
    return {dim: MAKES if letter in result else READS for dim, letter in enumerate(own)}


def _moved(node: Node, views: Mapping[Node, _View]) -> _View | None:
    """Return the parameter that an operator hands on, its dimensions exchanged or not."""
    view = views.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    if view is None:
        return None
    rank, dims = len(view.dims), list(view.dims)
    if node.target in _SAME:
        return view
    if node.target is aten.t.default:
        return _View(view.name, tuple(reversed(dims)))
    if node.target is aten.transpose.int:
        one, other = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
        dims[one], dims[other] = dims[other], dims[one]
        return _View(view.name, tuple(dims))
    if node.target is aten.permute.default:
        return _View(view.name, tuple(dims[int(dim)] for dim in node.args[1]))  # type: ignore[union-attr, arg-type]
    return None


def _is_region(graph_module: GraphModule, arg: Any) -> bool:
    return (
        isinstance(arg, Node)
        and arg.op == "get_attr"
        and isinstance(_attribute(graph_module, str(arg.target)), GraphModule)
    )


def _attribute(graph_module: GraphModule, name: str) -> Any:
    found: Any = graph_module
    for part in name.split("."):
        found = getattr(found, part)
    return found if isinstance(found, Tensor | GraphModule) else None


_SAME = set(operators("_weight_norm.default to.dtype to.device _to_copy.default detach.default alias.default"))
_EINSUM = set(operators("einsum.default"))
_RECURRENT = set(operators("lstm.input gru.input rnn_tanh.input rnn_relu.input"))
# Positions of the left and of the right factor.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}
# Position of the weight, and what its dimensions do.
_LAYERS: dict[Any, tuple[int, dict[int, str]]] = {
    aten.linear.default: (1, {0: MAKES, 1: READS}),
    aten.embedding.default: (0, {1: MAKES}),
    **dict.fromkeys(
        operators("conv1d.default conv2d.default conv3d.default conv1d.padding conv2d.padding conv3d.padding"),
        (1, {0: MAKES, 1: READS}),
    ),
    **dict.fromkeys(
        operators("conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input"), (1, {0: READS, 1: MAKES})
    ),
    **dict.fromkeys(operators("batch_norm.default instance_norm.default"), (1, {0: SCALES})),
    **dict.fromkeys(operators("layer_norm.default group_norm.default rms_norm.default"), (2, {0: SCALES})),
}
