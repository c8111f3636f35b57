"""Rules of operators that move elements: they are run on the labels themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.prune.coupling.context import Context, Rule, operators
from compress.prune.coupling.units import Block
from compress.prune.coupling.values import Value, axes, compact, move

__all__ = ["RULES"]

aten = torch.ops.aten


def moved(context: Context, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Run the operator on the labels."""
    target: Any = context.node.target

    def run(labels: Tensor, index: int | None) -> Tensor:
        try:
            result = target(labels, *args, **kwargs)
        except (RuntimeError, NotImplementedError):  # some know floats only; labels are whole numbers below 2**53
            result = target(labels.double(), *args, **kwargs).long()
        return result if index is None else result[index]

    several = len(context.shapes) > 1 or context.node.meta.get("val").__class__ in (list, tuple)
    if not several:
        value = Value(context.shapes[0], move(context.units, x, lambda labels: run(labels, None)))
        return _checked(context, value)
    return [
        _checked(context, Value(shape, move(context.units, x, lambda labels, index=index: run(labels, index))))  # type: ignore[misc]
        for index, shape in enumerate(context.shapes)
    ]


def _checked(context: Context, value: Value) -> Value:
    """Note fields that vary along several dimensions: what is removed must leave a rectangle."""
    for labels in value.fields:
        varying = axes(labels)
        if len(varying) > 1:
            context.units.blocks.append(Block(labels.reshape([labels.shape[d] for d in varying]), where=context.where))
    return value


def expand(context: Context, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Repeat along new dimensions, which can then have any size."""
    shape = context.shapes[0]
    before = (1,) * (len(shape) - len(x.shape)) + tuple(x.shape)
    fields = [labels.reshape((1,) * (len(shape) - labels.dim()) + tuple(labels.shape)) for labels in x.fields]
    grown = {d for d, (old, new) in enumerate(zip(before, shape)) if old == 1 < new}
    kept = {d + len(shape) - len(x.shape) for d in x.uniform}
    return Value(shape, fields, uniform=frozenset(grown | kept), parents=[x])


def cat(context: Context, values: Sequence[Value], dim: int = 0) -> Value:
    """Put values side by side; labels along other dimensions meet."""
    shape = context.shapes[0]
    dim %= len(shape)
    parts = [value for value in values if value.shape != (0,)]
    letters = [f"d{i}" for i in range(len(shape))]
    # Along the other dimensions it is as if the parts were added: each part narrowed to nothing in ``dim``.
    outer = [
        (
            Value(
                (*value.shape[:dim], 1, *value.shape[dim + 1 :]),
                [labels for labels in value.fields if labels.shape[dim] == 1],
                uniform=value.uniform - {dim},
                parents=[value],
            ),
            letters,
        )
        for value in parts
    ]
    result = context.combine(outer, letters)
    fields = list(result.fields)
    along = [[labels for labels in value.fields if labels.shape[dim] > 1 or _single(value, dim)] for value in parts]
    keys = dict.fromkeys(_others(labels, dim) for part in along for labels in part if labels.shape[dim] > 1)
    for key in keys:
        pieces = []
        for value, part in zip(parts, along):
            found = [labels for labels in part if labels.shape[dim] > 1 and _others(labels, dim) == key]
            size = [1] * len(shape)
            size[dim] = value.shape[dim]
            for d in key:
                size[d] = shape[d]
            piece = found[0] if found else torch.zeros(size, dtype=torch.int64)
            for labels in found[1:]:
                context.units.unite(piece, labels)
            pieces.append(piece.expand(size))
        joined = compact(context.units, torch.cat(pieces, dim))
        if joined is not None:
            fields.append(joined)
    return _checked(context, Value(shape, fields))


def _single(value: Value, dim: int) -> bool:
    return value.shape[dim] == 1


def _others(labels: Tensor, dim: int) -> tuple[int, ...]:
    return tuple(d for d in axes(labels) if d != dim)


def stack(context: Context, values: Sequence[Value], dim: int = 0) -> Value:
    """Put values on top of each other: what goes in one goes in all."""
    rank = len(context.shapes[0])
    dim %= rank
    letters = [f"d{i}" for i in range(rank) if i != dim]
    inner = Context(context.units, context.node, [values[0].shape])
    together = inner.combine([(value, letters) for value in values], letters)
    return Value(context.shapes[0], [labels.unsqueeze(dim) for labels in together.fields])


def index(context: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    """Look up by constant indices; other indices keep what they look into as it is."""
    known = [None if entry is None else entry.constant for entry in indices]
    if any(entry is not None and known[i] is None for i, entry in enumerate(indices)):
        looked = [d for d, entry in enumerate(indices) if entry is not None]
        x = context.stay(x, looked, "rows are looked up by values that are not constant")
        if x.fields and len(looked) == 1 and looked[0] == 0:
            extra = len(context.shapes[0]) - len(x.shape)
            fields = [labels.reshape((1,) * extra + tuple(labels.shape)) for labels in x.fields]
            return Value(context.shapes[0], fields)
        for labels in x.fields:
            context.units.protect(labels, f"{context.where}: values are looked up by what is not constant")
        return Value(context.shapes[0])
    fields = move(context.units, x, lambda labels: aten.index.Tensor(labels, known))
    return _checked(context, Value(context.shapes[0], fields))


def by_constant(position: int) -> Rule:
    """Return a rule for operators whose index is a tensor at a position of their arguments."""

    def rule(context: Context, x: Value, *args: Any, **kwargs: Any) -> Value:
        given = args[position - 1]
        if not isinstance(given, Value) or given.constant is None:
            for labels in x.fields:
                context.units.protect(labels, f"{context.where}: values are looked up by what is not constant")
            return Value(context.shapes[0])
        plain = [arg.constant if isinstance(arg, Value) else arg for arg in args]
        return moved(context, x, *plain, **kwargs)

    return rule


def pad(context: Context, x: Value, widths: Sequence[int], *args: Any, **kwargs: Any) -> Value:
    """Add a border, which has no labels."""
    if args and args[0] not in ("constant", None) and not isinstance(args[0], int | float):
        return moved(context, x, widths, *args, **kwargs)
    fields = move(context.units, x, lambda labels: torch.nn.functional.pad(labels, list(widths)))
    return _checked(context, Value(context.shapes[0], fields))


def copy(context: Context, x: Value, source: Value, *args: Any) -> Value:
    """Write one value into another of the same labels."""
    letters = [f"d{i}" for i in range(len(x.shape))]
    return context.combine([(x, letters), (source, letters[len(letters) - len(source.shape) :])], letters)


_MOVES = """
    view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int permute.default transpose.int
    t.default numpy_T.default mT.default squeeze.default squeeze.dim squeeze.dims unsqueeze.default select.int
    slice.Tensor split.Tensor split_with_sizes.default split.sizes chunk.default unbind.int narrow.default roll.default
    flip.default repeat.default repeat_interleave.self_int tile.default pixel_shuffle.default pixel_unshuffle.default
    channel_shuffle.default movedim.int movedim.intlist swapaxes.default swapdims.default unfold.default im2col.default
    diagonal.default rot90.default tensor_split.sections tensor_split.indices hsplit.int tril.default triu.default
    reflection_pad1d.default reflection_pad2d.default replication_pad1d.default replication_pad2d.default view.dtype
"""


def _like(context: Context, x: Value, other: Value) -> Any:
    fields = move(context.units, x, lambda labels: labels.reshape(other.shape))
    return _checked(context, Value(context.shapes[0], fields))


RULES: dict[Any, Rule] = {
    **dict.fromkeys(operators(_MOVES), moved),
    aten.view_as.default: _like,
    aten.reshape_as.default: _like,
    aten.expand.default: expand,
    aten.expand_as.default: lambda context, x, other: expand(context, x),
    aten.broadcast_to.default: expand,
    aten.cat.default: cat,
    aten.concat.default: cat,
    aten.stack.default: stack,
    aten.index.Tensor: index,
    aten.index_select.default: by_constant(2),
    aten.gather.default: by_constant(2),
    aten.take_along_dim.default: by_constant(1),
    aten.pad.default: pad,
    aten.constant_pad_nd.default: pad,
    aten.copy_.default: copy,
}
