"""Which indices of which tensors go together: labels that are united as the graph is walked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["NONE", "Block", "Units"]

NONE = 0
"""The label of an index that cannot be removed."""


@dataclass
class Block:
    """Labels that vary together along several dimensions: what is removed must leave a rectangle.

    Either whole rows along one axis go, or the same columns of every row.

    Args:
        labels: Shape (n1, n2, ...), two axes or more.
        tags: Labels that belong to the whole row at each index of an axis: ``(axis, labels of shape (n_axis,))``.
        rows: The axis whose rows are meant to go whole (heads of attention, groups of a normalisation, the same place
            in every head where heads are to become narrower), or none.
        where: Name of the node that made it.
    """

    labels: Tensor
    tags: list[tuple[int, Tensor]] = field(default_factory=list)
    rows: int | None = None
    where: str = ""


class Units:
    """Labels, united where they must be removed together, with the reasons why some must stay.

    Args:
        heads: ``"whole"``: where a product ends some of the dimensions along which labels vary together, as attention's
            scores do with a head's width, rows of them go whole; ``"width"``: all rows stay and lose the same columns.
    """

    def __init__(self, heads: str = "whole") -> None:
        self.heads = heads
        self._parent = np.arange(1024)
        self._stays = np.zeros(1024, dtype=bool)  # which roots have a reason
        self._scratch = np.zeros(1024, dtype=np.int64)
        self._num = 1  # label 0 stands for none
        self._reasons: dict[int, str] = {}
        self.blocks: list[Block] = []

    def __len__(self) -> int:
        """One more than the largest label."""
        return self._num

    def fresh(self, num: int) -> Tensor:
        """Return new labels."""
        while self._num + num > len(self._parent):
            size = len(self._parent)
            self._parent = np.concatenate([self._parent, np.arange(size, 2 * size)])
            self._stays = np.concatenate([self._stays, np.zeros(size, dtype=bool)])
            self._scratch = np.zeros(2 * size, dtype=np.int64)
        self._num += num
        return torch.arange(self._num - num, self._num)

    def find(self, labels: Tensor) -> Tensor:
        """Return the label that stands for each one's unit; ``NONE`` stays."""
        given = labels.numpy()
        roots = self._parent[given]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[given] = roots
        return torch.from_numpy(roots)

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Make units of labels that meet, element by element; what meets ``NONE`` must stay."""
        first, second = torch.broadcast_tensors(first, second)
        a, b = (self.find(labels.contiguous()).numpy().ravel() for labels in (first, second))
        low, high = np.minimum(a, b), np.maximum(a, b)
        differ = low != high
        pairs = _distinct(low[differ] * self._num + high[differ])
        low, high = pairs // self._num, pairs % self._num
        alone = low == NONE
        if alone.any():
            self.protect(torch.from_numpy(high[alone]), "it meets values that have no counterpart to remove")
            low, high = low[~alone], high[~alone]
        if self._are_distinct(high) and not self._meet(high, low):
            # The common case: as many units as before on one side, each with one of the other.
            self._parent[high] = low
            for position in np.flatnonzero(self._stays[high]).tolist():
                self._pass_on(int(high[position]), int(low[position]))
            return
        for one, other in zip(low.tolist(), high.tolist()):
            one, other = sorted((self._root(one), self._root(other)))
            if one != other:
                self._parent[other] = one
                if self._stays[other]:
                    self._pass_on(other, one)

    def protect(self, labels: Tensor, reason: str) -> None:
        """Say that labels must stay."""
        roots = _distinct(self.find(labels.contiguous()).numpy().ravel())
        roots = roots[~self._stays[roots] & (roots != NONE)]
        self._stays[roots] = True
        self._reasons.update(dict.fromkeys(roots.tolist(), reason))

    def reasons(self, roots: Tensor) -> list[str | None]:
        """Return why each unit must stay, if it must."""
        if not self._stays[roots.numpy()].any():
            return [None] * len(roots)
        return [self._reasons.get(root) for root in roots.tolist()]

    def protected(self) -> Iterable[int]:
        """Return the units that must stay."""
        return self._reasons.keys()

    def settle(self) -> None:
        """Make every block a rectangle after any removal, by uniting labels: rows that go whole, or columns.

        Blocks with an axis of their own decide first. The others go by columns of their longest axis, which leaves the
        most units, unless what has been united before already makes them rectangles.
        """
        narrow = self.heads == "width"
        for block in sorted(self.blocks, key=lambda block: (block.rows is None, not (narrow and block.tags))):
            labels = self.find(block.labels.contiguous())
            axis = self._axis(block, labels)
            row = labels.movedim(axis, 0).flatten(1)
            self.unite(row, row[:, :1])
            for tagged, tags in block.tags:
                if tagged == axis:
                    self.unite(tags, row[:, 0])
                else:
                    self.protect(tags, "it is a row of a block whose columns are removed")
        # Later decisions may have broken earlier ones: again, until nothing changes.
        before = self._num_units()
        for block in self.blocks:
            labels = self.find(block.labels.contiguous())
            if not any(_constant_but(labels, a) for a in range(labels.dim())):
                self.unite(labels.flatten(), labels.flatten()[:1])
        if self._num_units() != before:
            self.settle()

    def _axis(self, block: Block, labels: Tensor) -> int:
        """Return the axis whose rows go whole."""
        if block.rows is not None:
            return block.rows
        every = range(labels.dim())
        constant = [a for a in every if _constant_but(labels, a)]
        if constant:
            return constant[0]
        if self.heads == "whole":
            return max(every, key=lambda a: labels.shape[a])
        # Heads may be more than they are wide, and of their columns some are united already.
        fixed = {axis for axis, tags in block.tags if not bool(tags.any())}
        free = [a for a in every if a not in fixed] or every
        return max(free, key=lambda a: (_num_apart(labels, a), a))  # a head's width is the inner one

    def _num_units(self) -> int:
        return int((self._parent[: self._num] == np.arange(self._num)).sum())

    def _pass_on(self, root: int, other: int) -> None:
        """Give the reason of what was a root to the one above, unless that has its own."""
        self._reasons.setdefault(other, self._reasons.pop(root))
        self._stays[[root, other]] = False, True

    def _are_distinct(self, labels: np.ndarray) -> bool:
        position = np.arange(len(labels))
        self._scratch[labels] = position
        return bool((self._scratch[labels] == position).all())

    def _meet(self, labels: np.ndarray, others: np.ndarray) -> bool:
        self._scratch[labels] = 0
        self._scratch[others] = 1
        return bool(self._scratch[labels].any())

    def _root(self, label: int) -> int:
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = int(self._parent[label])
        return label


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """Return sorted numbers, each once; labels come nearly sorted, which a stable sort makes use of."""
    numbers = np.sort(numbers, kind="stable")
    return numbers[np.append(True, numbers[1:] != numbers[:-1])] if len(numbers) else numbers


def _constant_but(labels: Tensor, axis: int) -> bool:
    rows = labels.movedim(axis, 0).flatten(1)
    return bool((rows == rows[:, :1]).all())


def _num_apart(labels: Tensor, axis: int) -> int:
    """Return how many units the rows along an axis make: rows that share a label are one."""
    rows = labels.movedim(axis, 0).flatten(1)
    _, which = torch.unique(rows, return_inverse=True)
    units = torch.arange(len(rows))
    while True:
        least = torch.full((int(which.max()) + 1,), len(rows))
        least.scatter_reduce_(0, which.flatten(), units[:, None].expand_as(which).flatten(), "amin")
        merged = torch.minimum(units, least[which].amin(1))
        if torch.equal(merged, units):
            return len(torch.unique(units))
        units = merged
