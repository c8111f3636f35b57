"""Label tensors: which unit each element of a value belongs to.

A value has a list of fields, one for each family of units that its elements belong to. A field has the value's number
of dimensions and size 1 where it does not vary: a channel's labels are (1, C, 1, 1) whatever the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compress.prune.coupling.units import Units

__all__ = ["Value", "axes", "compact", "line", "move"]


@dataclass(eq=False)
class Value:
    """What is known of a node's result.

    Args:
        shape: Its shape.
        fields: Labels; an element goes when one of its labels does.
        constant: The result itself, where it depends on no input and no labelled tensor.
        uniform: Dimensions along which all elements are the same, so that any of them can go.
        parents: Values that are uniform along the same dimensions because this one is.
    """

    shape: tuple[int, ...]
    fields: list[Tensor] = field(default_factory=list)
    constant: Any = None
    uniform: frozenset[int] = frozenset()
    parents: list[Value] = field(default_factory=list)

    def adopt(self, units: Units, dim: int, labels: Tensor) -> None:
        """Let the elements along a uniform dimension go with the labels of what they meet."""
        own = [given for given in self.fields if axes(given) == (dim,)]
        if own:
            units.unite(own[0].flatten(), labels)
            return
        self.fields.append(line(labels, dim, len(self.shape)))
        for parent in self.parents:
            # Dimensions are counted from the right, as in broadcasting.
            below = dim - len(self.shape) + len(parent.shape)
            if below in parent.uniform and parent.shape[below] == self.shape[dim]:
                parent.adopt(units, below, labels)


def axes(labels: Tensor) -> tuple[int, ...]:
    """Return the dimensions along which a field varies."""
    return tuple(d for d, size in enumerate(labels.shape) if size > 1)


def line(labels: Tensor, dim: int, rank: int) -> Tensor:
    """Return a field that varies along one dimension, of labels of shape (n,)."""
    shape = [1] * rank
    shape[dim] = -1
    return labels.reshape(shape)


def compact(units: Units, labels: Tensor) -> Tensor | None:
    """Return a field with size 1 where it does not vary; none where nothing of it can be removed."""
    labels = units.find(labels.contiguous())
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1:
            first = labels.narrow(dim, 0, 1)
            if bool((labels == first).all()):
                labels = first.contiguous()
    if axes(labels):
        return labels
    units.protect(labels, "it is all that is left of a tensor")
    return None


def move(units: Units, value: Value, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return a value's fields after an operator that only moves elements, by running it on them."""
    moved = []
    for labels in value.fields:
        if not bool(labels.any()):
            continue
        result = compact(units, run(labels.expand(value.shape)))
        if result is not None:
            moved.append(result)
    return moved
