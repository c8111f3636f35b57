"""Operators that give what they were given: dropout in evaluation, casts to the same type, views of the same shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from compress.export.passes.nodes import argument, replace

__all__ = ["drop_identities"]

_ATEN = torch.ops.aten


def drop_identities(graph_module: GraphModule) -> int:
    """Take out operators that change neither values nor type, shape and layout; return how many."""
    changed = 0
    for node in list(graph_module.graph.nodes):
        rule = _RULES.get(node.target)
        if rule is None or not node.args or not isinstance(node.args[0], Node):
            continue
        if rule(node) and not _joins_ends(node):
            replace(node, node.args[0])
            changed += 1
    return changed


def _joins_ends(node: Node) -> bool:
    """A program may not return an input as it is."""
    source: Any = node.args[0]
    return source.op == "placeholder" and any(user.op == "output" for user in node.users)


def _is_off(node: Node) -> bool:
    return not argument(node, "train") or argument(node, "p") == 0


def _same_form(node: Node) -> bool:
    """Whether what comes out has the type, the device, the shape and the strides of what went in."""
    source: Any = node.args[0]
    before, after = source.meta.get("val"), node.meta.get("val")
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    return (
        before.dtype == after.dtype
        and before.device == after.device
        and _written(before.shape) == _written(after.shape)
        and _written(before.stride()) == _written(after.stride())
    )


def _written(sizes: Any) -> list[str]:
    # Symbols are compared as they are written: comparing their values would restrict what the program takes.
    return [str(size) for size in sizes]


def _is_neutral(number: float) -> Callable[[Node], bool]:
    return lambda node: isinstance(node.args[1], int | float) and node.args[1] == number and _same_form(node)


def _is_in_order(node: Node) -> bool:
    dims: Any = node.args[1]
    return [dim % len(dims) for dim in dims] == list(range(len(dims)))


def _is_whole(node: Node) -> bool:
    return argument(node, "step") == 1 and _same_form(node)


_RULES: dict[Any, Callable[[Node], bool]] = {
    _ATEN.dropout.default: _is_off,
    _ATEN.feature_dropout.default: _is_off,
    _ATEN.alpha_dropout.default: _is_off,
    _ATEN.feature_alpha_dropout.default: _is_off,
    **dict.fromkeys(
        (
            _ATEN.alias.default,
            _ATEN.clone.default,
            _ATEN.contiguous.default,
            _ATEN.detach.default,
            _ATEN.detach_.default,
            _ATEN.expand.default,
            _ATEN.flatten.using_ints,
            _ATEN.lift_fresh_copy.default,
            _ATEN.reshape.default,
            _ATEN.squeeze.dim,
            _ATEN.squeeze.dims,
            _ATEN.to.device,
            _ATEN.to.dtype,
            _ATEN.to.dtype_layout,
            _ATEN._to_copy.default,
            _ATEN.view.default,
            _ATEN._unsafe_view.default,
        ),
        _same_form,
    ),
    _ATEN.add.Tensor: _is_neutral(0),
    _ATEN.sub.Tensor: _is_neutral(0),
    _ATEN.mul.Tensor: _is_neutral(1),
    _ATEN.div.Tensor: _is_neutral(1),
    _ATEN.permute.default: _is_in_order,
    _ATEN.slice.Tensor: _is_whole,
}
