"""Where in a graph the units of a group can be looked at."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from compress.prune.anatomy import Anatomy
from compress.prune.coupling import Group, moves, reductions
from compress.prune.coupling.context import operators
from compress.prune.coupling.units import Units
from compress.prune.coupling.values import Value, axes
from compress.prune.criteria.roles import READS, Use, uses

__all__ = ["Place", "find_places"]


@dataclass(frozen=True)
class Place:
    """A value of which one dimension holds the units of a group.

    Args:
        group: The group's name.
        dim: The dimension.
        indices: Where on it each unit lies, shape (units, indices).
    """

    group: str
    dim: int
    indices: Tensor

    def values(self, result: Tensor) -> Tensor:
        """Return a result's elements by unit, shape (elements, units)."""
        lines = result.detach().movedim(self.dim, 0)[self.indices.to(result.device)]  # (units, indices, ...)
        return lines.flatten(1).T


def find_places(anatomy: Anatomy) -> dict[Node, list[Place]]:
    """Return the nodes to look at, with the groups that are looked at there.

    A group's place is the value that the first layer to read its units reads, before views, pooling, concatenation
    and dropout. Units that no layer reads (two activations meet in a product) are looked at where they are last.
    """
    labels = anatomy.coupling.labels
    readers = [use for use in uses(anatomy.graph) if READS in use.roles.values()]
    found: dict[Node, list[Place]] = defaultdict(list)
    for name, group in anatomy.groups.items():
        carrying = _Carrying(name, _roots(anatomy, group), labels.units, labels.values)
        node = next(carrying.read_by(readers), None)
        if node is None:
            node = next((each for each in reversed(labels.values) if carrying.at(each) is not None), None)
        if node is not None and (place := carrying.at(node)) is not None:
            found[node].append(place)
    return dict(found)


def _roots(anatomy: Anatomy, group: Group) -> Tensor:
    """Return the label of each unit, shape (units,)."""
    (name, dim), indices = next(iter(group.slots.items()))
    labels = anatomy.coupling.labels
    return labels.units.find(labels.tensors[name][dim][indices[:, 0]])


@dataclass(frozen=True)
class _Carrying:
    """Says which values hold all units of a group, along one dimension.

    Args:
        group: Its name.
        roots: The label of each unit.
        units: All labels.
        values: What is known of each node's result.
    """

    group: str
    roots: Tensor
    units: Units
    values: dict[Node, Any]

    def read_by(self, readers: Sequence[Use]) -> Iterator[Node]:
        """Yield for each layer that reads the units the value that it reads, before that was moved or pooled."""
        for use in readers:
            if use.source is not None and self.at(use.source) is not None:
                yield self._back(use.source)

    def _back(self, node: Node) -> Node:
        while True:
            above = node.args[0] if node.target is operator.getitem else node  # one of several results
            if not isinstance(above, Node) or above.target not in _HAND_ON:
                return node
            onward = next((each for each in above.all_input_nodes if self.at(each) is not None), None)
            if onward is None:
                return node
            node = onward

    def at(self, node: Node) -> Place | None:
        """Return where the units lie in a node's result, if they do."""
        value = self.values.get(node)
        if not isinstance(value, Value):
            return None
        ordered, order = self.roots.sort()
        for field in value.fields:
            labels = self.units.find(field.contiguous())
            nearest = torch.searchsorted(ordered, labels).clamp_max(len(ordered) - 1)
            unit = torch.where(ordered[nearest] == labels, order[nearest], -1)
            for dim in axes(field):
                line = unit.movedim(dim, 0).flatten(1)
                counts = torch.bincount(line[:, 0] + 1, minlength=len(order) + 1)[1:]
                if bool((line == line[:, :1]).all()) and bool((counts == counts[0]).all()) and counts[0] > 0:
                    indices = line[:, 0].argsort(stable=True)[(line[:, 0] < 0).sum() :]
                    return Place(self.group, dim, indices.view(len(order), -1))
        return None


_HAND_ON = {
    *moves.RULES,
    *reductions.RULES,
    *operators("dropout.default dropout_.default feature_dropout.default alpha_dropout.default contiguous.default"),
    *operators("clone.default to.dtype to.device _to_copy.default"),
}
