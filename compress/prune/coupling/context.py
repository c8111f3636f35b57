"""What a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from compress.prune.coupling.combine import Operand, combine
from compress.prune.coupling.units import Units
from compress.prune.coupling.values import Value, axes

__all__ = ["Context", "Rule", "operators"]


@dataclass(frozen=True)
class Context:
    """One operator of the graph.

    Args:
        units: The labels.
        node: The node.
        shapes: Shapes of its results.
    """

    units: Units
    node: Node
    shapes: Sequence[tuple[int, ...]]

    @property
    def where(self) -> str:
        """How reasons call the node."""
        return f"{self.node.target}".removeprefix("aten.")

    def combine(self, operands: Sequence[tuple[Value, Sequence[str]]], result: Sequence[str]) -> Value:
        """Return the value of what meets under letters."""
        fields = combine(self.units, [Operand(*operand) for operand in operands], result, self.where)
        return Value(self.shapes[0], fields)

    def stay(self, value: Value, dims: Sequence[int], reason: str) -> Value:
        """Return a value without the fields that vary along some dimensions; what they label must stay."""
        kept = []
        for labels in value.fields:
            if set(axes(labels)) & {d % len(value.shape) for d in dims}:
                self.units.protect(labels, f"{self.where}: {reason}")
            else:
                kept.append(labels)
        return Value(value.shape, kept, uniform=value.uniform - set(dims), parents=[value])


def operators(names: str) -> list[Any]:
    """Return ATen operators by ``name.overload``, those that this version of torch has.

    Example:
        >>> operators("relu.default view.default no_such.thing")
        [<OpOverload(op='aten.relu', overload='default')>, <OpOverload(op='aten.view', overload='default')>]
    """
    found = []
    for name in names.split():
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        if operator is not None:
            found.append(operator)
    return found


Rule = Callable[..., Any]
"""``rule(context, *args, **kwargs)`` with ``Value`` for tensors; returns a ``Value`` or a list of them."""
