"""The size of every dimension of every tensor in a network as a function of the widths of its groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from compress.prune.anatomy import Anatomy
from compress.prune.coupling.values import Value, axes

__all__ = ["Extent", "Sizes"]


@dataclass(frozen=True)
class Extent:
    """The size of one dimension.

    Args:
        full: The size now.
        parts: Factors that shrink; each lists the indices that one unit of each group takes along.
    """

    full: int
    parts: tuple[tuple[tuple[str, float], ...], ...] = ()

    def after(self, removed: Mapping[str, int]) -> float:
        """Return the size once some units of each group are gone.

        Example:
            >>> Extent(12, ((("a", 3.0),),)).after({"a": 2})
            6.0
        """
        size = float(self.full)
        for part in self.parts:
            # In this order: whole numbers stay exact.
            size = size * (self.full - sum(each * removed.get(name, 0) for name, each in part)) / self.full
        return size


class Sizes:
    """Reads extents off a network's labels.

    Args:
        anatomy: The network.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._labels = anatomy.coupling.labels
        self._widths = anatomy.widths
        self._names = list(anatomy.groups)
        self._owner = np.full(int(max((v.max() for v in self._vectors()), default=0)) + 1, -1)
        for number, group in enumerate(anatomy.groups.values()):
            (name, dim), indices = next(iter(group.slots.items()))
            roots = self._labels.units.find(self._labels.tensors[name][dim])[indices[:, 0]]
            self._owner[roots.numpy()] = number

    def removed(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Return how many units of each group are gone at some widths; a group that is not named is whole."""
        return {name: width - widths.get(name, width) for name, width in self._widths.items()}

    def tensor(self, name: str, shape: tuple[int, ...]) -> list[Extent]:
        """Return the extents of a parameter or buffer, by its name in the graph."""
        dims = self._labels.tensors.get(name, {})
        return self.of(
            Value(shape, [v.reshape([-1 if i == d else 1 for i in range(len(shape))]) for d, v in dims.items()])
        )

    def of(self, value: Value) -> list[Extent]:
        """Return the extents of a node's result."""
        parts: list[list[dict[str, float]]] = [[] for _ in value.shape]
        for field in value.fields:
            for dim, taken in self._taken(field).items():
                # Fields that share a group say the same thing twice; others are factors of a flattened dimension.
                same = next((part for part in parts[dim] if part.keys() & taken.keys()), None)
                if same is None:
                    parts[dim].append(taken)
                else:
                    same.update({name: max(each, same.get(name, 0.0)) for name, each in taken.items()})
        return [Extent(size, tuple(tuple(part.items()) for part in each)) for size, each in zip(value.shape, parts)]

    def _taken(self, field: Tensor) -> dict[int, dict[str, float]]:
        """Return how many indices along which dimension one unit of each group takes with it."""
        roots = self._labels.units.find(field.contiguous()).numpy()
        owners = self._owner[roots]
        found: dict[int, dict[str, float]] = {}
        for number in np.unique(owners[owners >= 0]).tolist():
            own = owners == number
            # One unit shows along which dimension they lie; all of them, how many indices.
            dim = _direction(roots == roots[own][0], axes(field))
            if dim is not None:
                name = self._names[number]
                count = int(own.any(axis=tuple(d for d in range(own.ndim) if d != dim)).sum())
                found.setdefault(dim, {})[name] = count / self._widths[name]
        return found

    def _vectors(self) -> list[Tensor]:
        return [vector for dims in self._labels.tensors.values() for vector in dims.values()]


def _direction(gone: np.ndarray, dims: tuple[int, ...]) -> int | None:
    """Return the dimension along which a unit takes whole slices."""
    for dim in dims:
        rows = np.moveaxis(gone, dim, 0).reshape(gone.shape[dim], -1)
        if bool((rows == rows[:, :1]).all()):
            return dim
    return None
