"""Write new sizes into a graph whose parameters have lost slices.

A graph has sizes written into views, splits and the like. The labels say what is left of each node's result, so every
such argument can be computed anew; nothing about the model's code is needed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from compress.errors import EditError
from compress.prune.coupling.units import Units
from compress.prune.coupling.values import Value, axes
from compress.prune.coupling.walk import Labels

__all__ = ["resize"]

aten = torch.ops.aten


def resize(graph_module: GraphModule, labels: Labels, removed: Tensor) -> GraphModule:
    """Rewrite a graph's sizes in place.

    Args:
        graph_module: The graph that was walked.
        labels: What the walk found.
        removed: Labels of the units that go.

    Raises:
        EditError: when an operator's arguments cannot be written for what is left.
    """
    left = _Left(labels.units, removed)
    for part in [
        graph_module,
        *(m for m in graph_module.modules() if isinstance(m, GraphModule) and m is not graph_module),
    ]:
        for node in list(part.graph.nodes):
            if node in labels.values:
                _rewrite(node, labels, left)
        part.recompile()
    return graph_module


class _Left:
    """What is left of each value."""

    def __init__(self, units: Units, removed: Tensor) -> None:
        self._units = units
        self._removed = torch.zeros(len(units), dtype=torch.bool)
        self._removed[units.find(removed.contiguous())] = True

    def kept(self, value: Value) -> list[Tensor | None]:
        """Return for each dimension which indices are kept, or none when all are."""
        result: list[Tensor | None] = [None] * len(value.shape)
        for labels in value.fields:
            gone = self._removed[self._units.find(labels.contiguous())]
            if not bool(gone.any()):
                continue
            dim = next((d for d in axes(gone) if _varies_along(gone, d)), None)
            if dim is None:
                raise EditError("prune: expected what is left to be a rectangle, got a ragged one. Keep this group.")
            keep = ~gone.movedim(dim, 0).reshape(gone.shape[dim], -1)[:, 0]
            before = result[dim]
            result[dim] = keep if before is None else before & keep
        return result

    def shape(self, value: Value) -> list[int | None]:
        """Return the new size of each dimension that shrinks."""
        return [None if keep is None else int(keep.sum()) for keep in self.kept(value)]


def _varies_along(gone: Tensor, dim: int) -> bool:
    rows = gone.movedim(dim, 0).reshape(gone.shape[dim], -1)
    return bool((rows == rows[:, :1]).all())


def _rewrite(node: Node, labels: Labels, left: _Left) -> None:
    value = labels.values[node]
    values = value if isinstance(value, list | tuple) else [value]
    values = [entry for entry in values if isinstance(entry, Value)]
    shapes = [left.shape(entry) for entry in values]
    given = [labels.values[arg] for arg in node.all_input_nodes if isinstance(labels.values.get(arg), Value)]
    changed = any(size is not None for shape in shapes for size in shape)
    changed |= any(size is not None for entry in given for size in left.shape(entry))
    if node.op != "call_function" or not changed:
        return
    rule = _REWRITES.get(node.target)
    if rule is not None:
        rule(node, labels, left, values, shapes)
    _new_meta(node, values, shapes)


def _new_meta(node: Node, values: Sequence[Value], shapes: Sequence[Sequence[int | None]]) -> None:
    metas: Any = node.meta.get("val")
    fresh = []
    for meta, value, shape in zip(metas if isinstance(metas, list | tuple) else [metas], values, shapes):
        sizes = [old if new is None else new for old, new in zip(value.shape, shape)]
        fresh.append(torch.empty(sizes, dtype=meta.dtype, device="meta"))
    if fresh:
        node.meta["val"] = type(metas)(fresh) if isinstance(metas, list | tuple) else fresh[0]


def _sizes(old: Sequence[Any], new: Sequence[int | None]) -> list[Any]:
    """Return sizes of which those that shrink are replaced; -1 and computed ones stay."""
    return [
        entry if size is None or not isinstance(entry, int) or entry == -1 else size for entry, size in zip(old, new)
    ]


def _sized(position: int) -> Callable[..., None]:
    """Return a rewrite of the list of sizes at a position; sizes are counted from the right."""

    def rewrite(node: Node, labels: Labels, left: _Left, values: Sequence[Value], shapes: Any) -> None:
        old = node.args[position]
        assert isinstance(old, list | tuple)
        new = shapes[0][len(shapes[0]) - len(old) :]
        full = values[0].shape[len(shapes[0]) - len(old) :]
        node.update_arg(position, [_computed(node, *entry) for entry in zip(_sizes(old, new), new, full)])

    return rewrite


def _computed(node: Node, entry: Any, new: int | None, old: int) -> Any:
    """Return a size; one that is computed from the batch, as batch times heads, is scaled."""
    if new is None or not isinstance(entry, Node):
        return entry
    with node.graph.inserting_before(node):
        scaled = node.graph.call_function(operator.mul, (entry, new))
        return node.graph.call_function(operator.floordiv, (scaled, old))


def _unflatten(node: Node, labels: Labels, left: _Left, values: Sequence[Value], shapes: Any) -> None:
    dim, old = node.args[1], node.args[2]
    assert isinstance(dim, int)
    assert isinstance(old, list | tuple)
    first = dim % (len(values[0].shape) - len(old) + 1)
    node.update_arg(2, _sizes(old, shapes[0][first : first + len(old)]))


def _given(node: Node, labels: Labels, position: int = 0) -> Value:
    """Return what is known of an argument."""
    argument = node.args[position]
    assert isinstance(argument, Node)
    return labels.values[argument]


def _dim(node: Node, position: int, rank: int) -> int:
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % rank


def _split(node: Node, labels: Labels, left: _Left, values: Sequence[Value], shapes: Any) -> None:
    dim = _dim(node, 2, len(values[0].shape))
    if all(shape[dim] is None for shape in shapes):
        return
    sizes = [value.shape[dim] if shape[dim] is None else shape[dim] for value, shape in zip(values, shapes)]
    node.target = aten.split_with_sizes.default
    node.args = (node.args[0], sizes, dim)
    node.kwargs = {}


def _source(node: Node, labels: Labels, left: _Left, dim: int) -> Tensor | None:
    return left.kept(_given(node, labels))[dim]


def _slice(node: Node, labels: Labels, left: _Left, values: Sequence[Value], shapes: Any) -> None:
    dim = _dim(node, 1, len(values[0].shape))
    keep = _source(node, labels, left, dim)
    if keep is None:
        return
    given: list[Any] = [*node.args, *[None] * 5]
    start, end, step = given[2:5]
    picked = range(len(keep))[slice(start, end, step)]
    if step not in (None, 1):
        raise EditError(
            f"prune: expected slices of step 1 where channels go, got {step} in {node.name}. Keep this group."
        )
    first = int(keep[: picked.start].sum())
    node.args = (node.args[0], dim, first, first + int(keep[picked.start : picked.stop].sum()))


def _narrow(node: Node, labels: Labels, left: _Left, values: Sequence[Value], shapes: Any) -> None:
    dim = _dim(node, 1, len(values[0].shape))
    keep = _source(node, labels, left, dim)
    if keep is not None:
        start = node.args[2]
        assert isinstance(start, int)
        size = values[0].shape[dim]
        node.args = (node.args[0], dim, int(keep[:start].sum()), int(keep[start : start + size].sum()))


def _select(node: Node, labels: Labels, left: _Left, values: Sequence[Value], shapes: Any) -> None:
    rank = len(values[0].shape) + 1
    dim = _dim(node, 1, rank)
    keep = _source(node, labels, left, dim)
    if keep is not None:
        index = node.args[2]
        assert isinstance(index, int)
        node.update_arg(2, int(keep[: index % len(keep)].sum()))


def _group_norm(node: Node, labels: Labels, left: _Left, values: Sequence[Value], shapes: Any) -> None:
    groups, new = node.args[1], shapes[0][1]
    assert isinstance(groups, int)
    if new is not None and groups > 1:
        node.update_arg(1, new // (values[0].shape[1] // groups))


def _layer_norm(node: Node, labels: Labels, left: _Left, values: Sequence[Value], shapes: Any) -> None:
    _sized(1)(node, labels, left, values, shapes)


def _convolution(transposed: bool) -> Callable[..., None]:
    def rewrite(node: Node, labels: Labels, left: _Left, values: Sequence[Value], shapes: Any) -> None:
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        if groups == 1:
            return
        source = _given(node, labels)
        weight = _given(node, labels, 1)
        channel = len(source.shape) - (len(weight.shape) - 2) - 1
        keep = left.kept(source)[channel]
        if keep is None:
            return
        assert isinstance(groups, int)
        new = int(keep.sum()) // (len(keep) // groups)
        if len(node.args) > 6:
            node.update_arg(6, new)
        else:
            node.update_kwarg("groups", new)

    return rewrite


def _attention(node: Node, labels: Labels, left: _Left, values: Sequence[Value], shapes: Any) -> None:
    query = _given(node, labels)
    if left.shape(query)[-1] is not None and node.kwargs.get("scale") is None:
        # The operator would take the scale from the narrower head, and scores would be others.
        node.update_kwarg("scale", query.shape[-1] ** -0.5)


def _channel_tile(node: Node, labels: Labels, left: _Left, values: Sequence[Value], shapes: Any) -> None:
    source, new = left.shape(_given(node, labels)), shapes[0]
    if any(size is not None for size in new) and all(size is None for size in source):
        raise EditError(f"prune: expected copies that stay whole, got others in {node.name}. Keep this group.")


def _lookup(node: Node, labels: Labels, left: _Left, values: Sequence[Value], shapes: Any) -> None:
    indices = node.args[1]
    assert isinstance(indices, list | tuple)
    kept = left.kept(_given(node, labels))
    if any(entry is not None and kept[dim] is not None for dim, entry in enumerate(indices)):
        raise EditError(f"prune: expected rows that are looked up to stay, got others in {node.name}. Keep this group.")


_REWRITES: dict[Any, Callable[..., None]] = {
    aten.view.default: _sized(1),
    aten.reshape.default: _sized(1),
    aten._unsafe_view.default: _sized(1),
    aten.expand.default: _sized(1),
    aten.broadcast_to.default: _sized(1),
    aten.zeros.default: _sized(0),
    aten.ones.default: _sized(0),
    aten.full.default: _sized(0),
    aten.empty.memory_format: _sized(0),
    aten.new_zeros.default: _sized(1),
    aten.new_ones.default: _sized(1),
    aten.new_full.default: _sized(1),
    aten.unflatten.int: _unflatten,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.split.sizes: _split,
    aten.chunk.default: _split,
    aten.tensor_split.sections: _split,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.select.int: _select,
    aten.group_norm.default: _group_norm,
    aten.layer_norm.default: _layer_norm,
    aten.scaled_dot_product_attention.default: _attention,
    aten.rms_norm.default: _layer_norm,
    aten.repeat.default: _channel_tile,
    aten.index.Tensor: _lookup,
    **{op: _convolution(False) for op in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)},
    **{op: _convolution(False) for op in (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)},
    **{
        op: _convolution(True)
        for op in (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
    },
}
