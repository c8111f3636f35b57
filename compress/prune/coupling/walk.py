"""Run an exported program on labels instead of numbers."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from compress.prune.coupling import moves, pointwise, products, reductions
from compress.prune.coupling.context import Context, Rule
from compress.prune.coupling.units import Units
from compress.prune.coupling.values import Value, line

__all__ = ["Labels", "walk"]

RULES: dict[Any, Rule] = {**pointwise.RULES, **moves.RULES, **products.RULES, **reductions.RULES}

_CREATORS = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")


@dataclass
class Labels:
    """What a walk has found.

    Args:
        units: The labels and what unites them.
        tensors: Labels of each parameter and buffer by name and dimension.
        values: What is known of each node's result.
        unknown: Operators without a rule, and the lines of the user's model that call them.
    """

    units: Units
    tensors: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    values: dict[Node, Any] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


def walk(graph_module: GraphModule, heads: str = "whole") -> Labels:
    """Label every parameter and buffer and follow the labels through the graph.

    Args:
        graph_module: Of an exported program, as its ``module()`` or ``Captured`` gives it; sizes that vary count as
            those of the example inputs.
        heads: As in ``Units``.
    """
    labels = Labels(Units(heads))
    arguments = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            shapes = _shapes(node.meta.get("val"))
            arguments.append(Value(shapes[0]) if shapes else node.meta.get("val"))
    results = _run(labels, graph_module, arguments)
    for value in _values(results):
        for fields in value.fields:
            labels.units.protect(fields, "the network's output")
    return labels


def _tensor(labels: Labels, name: str, tensor: Tensor) -> Value:
    if not tensor.is_floating_point() or tensor.dim() == 0:
        return Value(tuple(tensor.shape), constant=None if tensor.is_meta else tensor)
    if name not in labels.tensors:
        labels.tensors[name] = {d: labels.units.fresh(size) for d, size in enumerate(tensor.shape) if size > 1}
    fields = [line(vector, dim, tensor.dim()) for dim, vector in labels.tensors[name].items()]
    return Value(tuple(tensor.shape), fields)


def _run(labels: Labels, graph_module: GraphModule, arguments: Sequence[Any]) -> Any:
    values: dict[Node, Any] = {}
    given = iter(arguments)
    # Tied tensors are one, by the name that comes first.
    owned = [*graph_module.named_parameters(), *graph_module.named_buffers()]
    names = {id(tensor): name for name, tensor in reversed(owned)}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = _attribute(labels, graph_module, str(node.target), names)
        elif node.op == "output":
            labels.values |= values
            return torch.fx.map_arg(node.args[0], values.__getitem__)
        else:
            values[node] = _call(labels, node, values)
    raise AssertionError("a graph has an output")


def _attribute(labels: Labels, graph_module: GraphModule, name: str, names: Mapping[int, str]) -> Any:
    found: Any = graph_module
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, Tensor):
        return found
    if id(found) in names and "lifted_tensor" not in name:
        return _tensor(labels, names[id(found)], found)
    return Value(tuple(found.shape), constant=found)


def _call(labels: Labels, node: Node, values: dict[Node, Any]) -> Any:
    given: Any = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
    target: Any = node.target
    args, kwargs = given
    if node.target is operator.getitem:
        return args[0][args[1]]
    if any(isinstance(arg, GraphModule) for arg in args):  # a region under no_grad or autocast
        position = next(i for i, arg in enumerate(args) if isinstance(arg, GraphModule))
        return _run(labels, args[position], args[position + 1 :])
    shapes = _shapes(node.meta.get("val"))
    if not shapes:
        value = node.meta.get("val")
        return _size(value) if isinstance(value, torch.SymInt) else value
    tensors = _values((args, kwargs))
    if all(value.constant is not None for value in tensors) and torch.Tag.nondeterministic_seeded not in target.tags:
        return _constant(node, args, kwargs, shapes)
    if (made := _created(node, args, shapes[0])) is not None:
        return made
    context = Context(labels.units, node, shapes)
    rule = _rule(target)
    if rule is None:
        return _unknown(labels, context, tensors)
    return rule(context, *args, **kwargs)


def _rule(target: Any) -> Rule | None:
    """Return the rule of an operator; one that works in place has that of its twin."""
    packet, _, overload = str(target).removeprefix("aten.").partition(".")
    twin = getattr(getattr(torch.ops.aten, packet.rstrip("_"), None), overload, None)
    for candidate in (target, twin):
        if candidate in RULES:
            return RULES[candidate]
        if candidate is not None and torch.Tag.pointwise in candidate.tags:
            return pointwise.pointwise
    return pointwise.pointwise if packet in ("fill_", "zero_") else None


def _created(node: Node, args: Any, shape: tuple[int, ...]) -> Value | None:
    """Return what an operator makes that takes no more from its input than type and size."""
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    if name not in _CREATORS or name in ("zeros", "ones", "full"):
        return None
    fill = {"zeros": 0.0, "ones": 1.0}.get(name.removeprefix("new_").removesuffix("_like"))
    if fill is None:
        fill = args[-1] if not isinstance(args[-1], Value) else None
    meta: Any = node.meta["val"]
    constant = torch.full(shape, fill, dtype=meta.dtype) if isinstance(fill, int | float) else None
    return Value(shape, constant=constant, uniform=frozenset(range(len(shape))))


def _constant(node: Node, args: Any, kwargs: Any, shapes: Sequence[tuple[int, ...]]) -> Any:
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    plain_args, plain_kwargs = _plain(args), _plain(kwargs)
    if "device" in plain_kwargs:
        plain_kwargs["device"] = "cpu"
    result = node.target(*plain_args, **plain_kwargs)  # type: ignore[operator]
    if isinstance(result, list | tuple):
        return [Value(tuple(entry.shape), constant=entry) for entry in result]
    uniform = frozenset(range(result.dim())) if name in _CREATORS else frozenset()
    if name == "expand":
        uniform = frozenset(d for d in range(result.dim()) if result.stride(d) == 0)
    return Value(tuple(result.shape), constant=result, uniform=uniform)


def _unknown(labels: Labels, context: Context, tensors: Sequence[Value]) -> Any:
    name = str(context.node.target)
    labels.unknown.setdefault(name, user_line(context.node))
    for value in tensors:
        for fields in value.fields:
            labels.units.protect(fields, f"{name} has no rule")
    results = [Value(shape) for shape in context.shapes]
    return results[0] if len(results) == 1 and not isinstance(context.node.meta["val"], list | tuple) else results


def user_line(node: Node) -> str:
    """Return the line of the user's model that an operator comes from, as ``file:line: code``."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    places = [i for i, line in enumerate(lines) if line.startswith("File ")]
    if not places:
        return "unknown line"
    last = places[-1]
    file, _, number = lines[last].removeprefix('File "').partition('", line ')
    code = lines[last + 1] if last + 1 < len(lines) else ""
    return f"{file}:{number.partition(',')[0]}: {code}"


def _shapes(result: Any) -> list[tuple[int, ...]]:
    if isinstance(result, Tensor):
        return [tuple(_size(size) for size in result.shape)]
    if isinstance(result, list | tuple):
        return [shape for entry in result for shape in _shapes(entry)]
    return []


def _size(size: Any) -> int:
    """Return a size, or what it is for the example inputs."""
    return size if isinstance(size, int) else int(size.node.hint)


def _values(nested: Any) -> list[Value]:
    if isinstance(nested, Value):
        return [nested]
    if isinstance(nested, Mapping):
        return [value for entry in nested.values() for value in _values(entry)]
    if isinstance(nested, list | tuple):
        return [value for entry in nested for value in _values(entry)]
    return []


def _plain(nested: Any) -> Any:
    if isinstance(nested, Value):
        return nested.constant
    if isinstance(nested, dict):
        return {key: _plain(entry) for key, entry in nested.items()}
    if isinstance(nested, list | tuple):
        return type(nested)(_plain(entry) for entry in nested)
    return nested
