"""What meets in an operator: element-wise ones and contractions alike, as in Einstein's notation.

Every operand names its dimensions by letters. Labels that meet under one letter are united; a letter that is not in the
result is contracted, and its labels end there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.prune.coupling.units import NONE, Block, Units
from compress.prune.coupling.values import Value, axes

__all__ = ["Operand", "combine"]

Key = tuple[str, ...]


@dataclass
class Operand:
    """A value and the letters of its dimensions."""

    value: Value
    letters: Sequence[str]


@dataclass
class _Seen:
    """An operand's labels by letters."""

    operand: Operand
    owns: set[str]
    singles: dict[str, Tensor]
    joints: dict[Key, Tensor]


def combine(units: Units, operands: Sequence[Operand], result: Sequence[str], where: str) -> list[Tensor]:
    """Unite the labels that meet and return the result's fields.

    Args:
        units: The labels.
        operands: What meets.
        result: Letters of the result's dimensions; a letter that is missing is contracted.
        where: Name of the node, for reasons.
    """
    sizes: dict[str, int] = defaultdict(lambda: 1)
    for operand in operands:
        for letter, size in zip(operand.letters, operand.value.shape):
            sizes[letter] = max(sizes[letter], size)
    order = {letter: position for position, letter in enumerate(sizes)}
    seen = [_read(units, operand, sizes, order, where) for operand in operands]
    singles: dict[str, Tensor] = {}
    for letter in sizes:
        labels = _meet_singles(units, seen, letter, where)
        if labels is not None:
            singles[letter] = labels
    joints: dict[Key, Tensor] = {}
    for key in dict.fromkeys(key for entry in seen for key in entry.joints):
        labels = _meet_joints(units, seen, key, sizes, where)
        _carry_on(units, key, labels, result, singles, joints, where)
    fields = [_place({letter: 0}, labels, result) for letter, labels in singles.items() if letter in result]
    fields += [_place({letter: i for i, letter in enumerate(key)}, labels, result) for key, labels in joints.items()]
    return fields


def _read(units: Units, operand: Operand, sizes: dict[str, int], order: dict[str, int], where: str) -> _Seen:
    value, letters = operand.value, operand.letters
    owns = {
        letter
        for dim, letter in enumerate(letters)
        if value.shape[dim] == sizes[letter] > 1 and dim not in value.uniform
    }
    singles: dict[str, Tensor] = {}
    joints: dict[Key, Tensor] = {}
    for labels in value.fields:
        labels = units.find(labels.contiguous())
        varying = axes(labels)
        if not varying:
            continue
        key = tuple(sorted((letters[d] for d in varying), key=order.__getitem__))
        if len(set(key)) < len(key):  # a diagonal
            units.protect(labels, f"{where}: two dimensions are one")
            continue
        flat = labels.permute(*_first(varying, labels.dim())).reshape([labels.shape[d] for d in varying])
        flat = flat.permute(*sorted(range(len(varying)), key=lambda i: order[letters[varying[i]]]))
        if len(key) == 1:
            if key[0] in singles:  # two families along one dimension: all of it becomes one
                units.unite(singles[key[0]], flat)
            singles.setdefault(key[0], flat)
            owns.add(key[0])
        else:
            if key in joints:
                units.unite(joints[key], flat)
            joints.setdefault(key, flat)
    return _Seen(operand, owns, singles, joints)


def _first(dims: Sequence[int], rank: int) -> list[int]:
    return [*dims, *(d for d in range(rank) if d not in dims)]


def _meet_singles(units: Units, seen: Sequence[_Seen], letter: str, where: str) -> Tensor | None:
    found = [entry.singles[letter] for entry in seen if letter in entry.singles]
    if not found:
        return None
    first = found[0]
    for labels in found[1:]:
        units.unite(first, labels)
    stays = False
    for entry in seen:
        if letter in entry.singles or letter not in entry.operand.letters:
            continue
        joint = [(key, labels) for key, labels in entry.joints.items() if letter in key]
        for key, labels in joint:
            units.blocks.append(Block(labels, [(key.index(letter), first)], where=where))
        if joint:
            continue
        dim = list(entry.operand.letters).index(letter)
        if letter in entry.owns:
            units.protect(first, f"{where}: it meets values that have no counterpart to remove")
            stays = True
        elif dim in entry.operand.value.uniform and entry.operand.value.shape[dim] > 1:
            entry.operand.value.adopt(units, dim, first)
    # Where heads stay, what stays with them must not be mistaken for a second family of their columns.
    return None if stays and units.heads == "width" else first


def _meet_joints(units: Units, seen: Sequence[_Seen], key: Key, sizes: dict[str, int], where: str) -> Tensor:
    labels = next(entry.joints[key] for entry in seen if key in entry.joints)
    tags: list[tuple[int, Tensor]] = []
    for entry in seen:
        if key in entry.joints:
            units.unite(labels, entry.joints[key])
            continue
        for axis, letter in enumerate(key):
            if letter in entry.owns and letter not in entry.singles:
                # It has all of this dimension and nothing to remove there: rows of this axis stay.
                tags.append((axis, torch.full((sizes[letter],), NONE)))
    if tags:
        units.blocks.append(Block(labels, tags, where=where))
    return labels


def _carry_on(
    units: Units,
    key: Key,
    labels: Tensor,
    result: Sequence[str],
    singles: dict[str, Tensor],
    joints: dict[Key, Tensor],
    where: str,
) -> None:
    """Take labels that vary along several letters to the result, where some of the letters may end."""
    kept = [i for i, letter in enumerate(key) if letter in result]
    if len(kept) == len(key):
        joints[key] = labels
        return
    if not kept:
        return
    shape = [labels.shape[i] for i in kept]
    rows = labels.permute(*_first(kept, labels.dim())).reshape(torch.Size(shape).numel(), -1)
    if units.heads == "width":
        units.blocks.append(Block(rows, rows=1, where=where))
        return
    # A row is gone when all of it is: a label of its own, tied to whole rows.
    tags = units.fresh(len(rows))
    units.blocks.append(Block(rows, [(0, tags)], rows=0, where=where))
    if len(kept) == 1:
        letter = key[kept[0]]
        if letter in singles:
            units.unite(singles[letter], tags)
        singles.setdefault(letter, tags)
        return
    rest = tuple(key[i] for i in kept)
    if rest in joints:
        units.unite(joints[rest], tags.reshape(shape))
    joints.setdefault(rest, tags.reshape(shape))


def _place(dims: dict[str, int], labels: Tensor, result: Sequence[str]) -> Tensor:
    """Return labels with one dimension for each letter of the result, of size 1 where they have none."""
    present = [letter for letter in result if letter in dims]
    labels = labels.permute(*(dims[letter] for letter in present))
    for position, letter in enumerate(result):
        if letter not in dims:
            labels = labels.unsqueeze(position)
    return labels
