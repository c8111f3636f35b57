"""Rules of operators that multiply and sum: inputs of a weight are tied to what they read, its outputs are new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.prune.coupling.context import Context, Rule
from compress.prune.coupling.units import NONE
from compress.prune.coupling.values import Value, axes, line

__all__ = ["RULES"]

aten = torch.ops.aten


def linear(context: Context, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """X (..., i) times weight (o, i)."""
    batch = [f"b{i}" for i in range(len(x.shape) - 1)]
    operands: list[tuple[Value, Sequence[str]]] = [(x, [*batch, "i"]), (weight, ["o", "i"])]
    if bias is not None:
        operands.append((bias, ["o"]))
    return context.combine(operands, [*batch, "o"])


def matmul(context: Context, a: Value, b: Value) -> Value:
    """Matrices in the last two dimensions, broadcast over the others."""
    left = ["m", "k"][-min(2, len(a.shape)) :] if len(a.shape) > 1 else ["k"]
    right = ["k", "n"] if len(b.shape) > 1 else ["k"]
    rank = max(len(a.shape), len(b.shape)) - 2
    batch = [f"b{i}" for i in range(max(0, rank))]
    letters_a = [*batch[len(batch) - max(0, len(a.shape) - 2) :], *left]
    letters_b = [*batch[len(batch) - max(0, len(b.shape) - 2) :], *right]
    result = [*batch, *(["m"] if len(a.shape) > 1 else []), *(["n"] if len(b.shape) > 1 else [])]
    return context.combine([(a, letters_a), (b, letters_b)], result)


def addmm(context: Context, bias: Value, a: Value, b: Value, **kwargs: Any) -> Value:
    """Bias plus a product."""
    batch = ["b"] if len(a.shape) == 3 else []
    letters = [*batch, "m", "n"]
    operands = [(a, [*batch, "m", "k"]), (b, [*batch, "k", "n"]), (bias, letters[len(letters) - len(bias.shape) :])]
    return context.combine(operands, letters)


def einsum(context: Context, equation: str, values: Sequence[Value], **kwargs: Any) -> Value:
    """Any product in Einstein's notation."""
    given, _, result = equation.replace(" ", "").partition("->")
    names = given.split(",")
    rank = max(len(value.shape) - len(name.replace("...", "")) for value, name in zip(values, names))
    dots = [f"dot{i}" for i in range(rank)]

    def letters(name: str, num: int | None) -> list[str]:
        before, found, after = name.partition("...")
        count = (rank if num is None else num - len(before) - len(after)) if found else 0
        return [*before, *dots[rank - count :], *after]

    if not _:
        every = "".join(names).replace(".", "")
        result = ("..." if "..." in given else "") + "".join(sorted(c for c in set(every) if every.count(c) == 1))
    operands = [(value, letters(name, len(value.shape))) for value, name in zip(values, names)]
    return context.combine(operands, letters(result, None))


def convolution(
    context: Context, x: Value, weight: Value, bias: Value | None, groups: int, *, transposed: bool
) -> Value:
    """Channels are tied to the weight's inputs; with groups, a group goes with all of its inputs and outputs."""
    rank = len(x.shape)
    batch = ["n"] if rank == len(weight.shape) else []
    spatial = [f"s{i}" for i in range(rank - len(batch) - 1)]
    channel = len(batch)
    x = context.stay(x, range(channel + 1, rank), "positions of a convolution must stay")
    weight = context.stay(weight, range(2, len(weight.shape)), "positions of a kernel must stay")
    outputs, inputs = (1, 0) if transposed else (0, 1)
    if groups == 1:
        kernel = ["c", "o"] if transposed else ["o", "c"]
        operands: list[tuple[Value, Sequence[str]]] = [
            (_flat(x, channel + 1), [*batch, "c"]),
            (_flat(weight, 2), kernel),
        ]
        if bias is not None:
            operands.append((bias, ["o"]))
        value = context.combine(operands, [*batch, "o", *spatial])
        return Value(context.shapes[0], value.fields)
    num_out = context.shapes[0][channel]
    read, made = _labels(context, x, channel), _labels(context, weight, outputs)
    if transposed:  # (in, out / groups): a group's inputs are rows, its outputs are columns of all groups
        made, rows = context.units.fresh(num_out), _labels(context, weight, 0)
        context.units.protect(_labels(context, weight, 1), "outputs within a group must stay")
        context.units.unite(rows, read)
    else:
        context.units.protect(_labels(context, weight, inputs), "inputs within a group must stay")
    if bias is not None:
        context.units.unite(made, _labels(context, bias, 0))
    by_group = read.view(groups, -1)
    context.units.unite(by_group, by_group[:, :1])
    of_group = made.view(groups, -1)
    context.units.unite(of_group, by_group[:, :1])
    return Value(context.shapes[0], [line(made, channel, len(context.shapes[0]))])


def _conv(context: Context, x: Value, w: Value, b: Value | None = None, *rest: Any, **kwargs: Any) -> Value:
    groups = rest[3] if len(rest) > 3 else kwargs.get("groups", 1)
    return convolution(context, x, w, b, groups, transposed=False)


def _transposed(context: Context, x: Value, w: Value, b: Value | None = None, *rest: Any, **kwargs: Any) -> Value:
    groups = rest[3] if len(rest) > 3 else kwargs.get("groups", 1)
    return convolution(context, x, w, b, groups, transposed=True)


def _flat(value: Value, rank: int) -> Value:
    """Return a value without its last dimensions, along which nothing varies."""
    fields = [labels.reshape(labels.shape[:rank]) for labels in value.fields]
    return Value(value.shape[:rank], fields, uniform=frozenset(d for d in value.uniform if d < rank))


def _labels(context: Context, value: Value, dim: int) -> Tensor:
    """Return the labels along a dimension, shape (n,); ``NONE`` where there are none."""
    found = [labels.flatten() for labels in value.fields if axes(labels) == (dim,)]
    for labels in value.fields:
        if dim in axes(labels) and axes(labels) != (dim,):
            context.units.protect(labels, f"{context.where}: channels of a group vary along other dimensions")
    for labels in found[1:]:
        context.units.unite(found[0], labels)
    return found[0] if found else torch.full((value.shape[dim],), NONE)


def attention(
    context: Context,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None = None,
    *args: Any,
    enable_gqa: bool = False,
    **kwargs: Any,
) -> Value:
    """Scores are a product over the head's width, masked, and multiplied with the values."""
    if enable_gqa:
        repeat = query.shape[-3] // key.shape[-3]
        key, value = (_repeat(entry, len(entry.shape) - 3, repeat) for entry in (key, value))
    batch = [f"b{i}" for i in range(len(query.shape) - 2)]
    scores_shape = (*query.shape[:-1], key.shape[-2])
    first = Context(context.units, context.node, [scores_shape])
    scores = first.combine([(query, [*batch, "l", "e"]), (key, [*batch, "s", "e"])], [*batch, "l", "s"])
    if mask is not None:
        letters = [*batch, "l", "s"]
        scores = first.combine([(scores, letters), (mask, letters[len(letters) - len(mask.shape) :])], letters)
    return context.combine([(scores, [*batch, "l", "s"]), (value, [*batch, "s", "f"])], [*batch, "l", "f"])


def _repeat(value: Value, dim: int, times: int) -> Value:
    fields = [labels.repeat_interleave(times, dim) if labels.shape[dim] > 1 else labels for labels in value.fields]
    shape = list(value.shape)
    shape[dim] *= times
    return Value(tuple(shape), fields)


def embedding(context: Context, weight: Value, index: Value, *args: Any, **kwargs: Any) -> Value:
    """Rows of a table: its width goes on, its rows must stay."""
    weight = context.stay(weight, [0], "rows of a table are looked up")
    letters = [f"i{i}" for i in range(len(index.shape))]
    return context.combine([(_flat(Value(weight.shape[1:], [f[0] for f in weight.fields]), 1), ["d"])], [*letters, "d"])


def weight_norm(context: Context, direction: Value, scale: Value, dim: int = 0) -> Value:
    """A weight of its direction, normalised over all other dimensions, and its scale."""
    letters = [f"d{i}" for i in range(len(direction.shape))]
    return context.combine([(direction, letters), (scale, letters)], letters)


def recurrent(gates: int) -> Rule:
    """Return the rule of a recurrent layer: a hidden unit is a row of every gate and a column of what reads it."""

    def rule(context: Context, x: Value, states: Any, parameters: Sequence[Value], *rest: Any) -> list[Value]:
        has_biases, num_layers, _, _, bidirectional = rest[:5]
        directions = 2 if bidirectional else 1
        per_layer = 4 if has_biases else 2
        given = list(states) if isinstance(states, list | tuple) else [states]
        num_hidden = parameters[1].shape[1]
        units = context.units.fresh(num_hidden)
        if len(parameters) != per_layer * num_layers * directions or given[0].shape[-1] != num_hidden:
            for value in [x, *given, *parameters]:  # projections
                context.stay(value, range(len(value.shape)), "recurrent layers with projections must stay")
            return [Value(shape) for shape in context.shapes]
        for state in given:
            if len(state.shape) - 1 in state.uniform:
                state.adopt(context.units, len(state.shape) - 1, units)
            else:
                context.units.unite(_labels(context, state, len(state.shape) - 1), units)
        inputs = _labels(context, x, len(x.shape) - 1)
        for layer in range(num_layers):
            for direction in range(directions):
                first = per_layer * (layer * directions + direction)
                read, hidden, *biases = parameters[first : first + per_layer]
                context.units.unite(_labels(context, read, 1), inputs)
                context.units.unite(_labels(context, hidden, 1), units)
                for value in (read, hidden, *biases):
                    context.units.unite(_labels(context, value, 0), units.repeat(gates))
            inputs = units.repeat(directions)
        results = [Value(context.shapes[0], [line(inputs, 2, 3)])]
        results += [Value(shape, [line(units, len(shape) - 1, len(shape))]) for shape in context.shapes[1:]]
        return results

    return rule


RULES: dict[Any, Rule] = {
    aten.linear.default: linear,
    aten.matmul.default: matmul,
    aten.mm.default: matmul,
    aten.bmm.default: matmul,
    aten.mv.default: matmul,
    aten.addmm.default: addmm,
    aten.baddbmm.default: addmm,
    aten.einsum.default: einsum,
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.conv3d.default: _conv,
    aten.conv1d.padding: _conv,
    aten.conv2d.padding: _conv,
    aten.conv3d.padding: _conv,
    aten.conv_transpose1d.default: _transposed,
    aten.conv_transpose2d.input: _transposed,
    aten.conv_transpose3d.input: _transposed,
    aten.scaled_dot_product_attention.default: attention,
    aten.embedding.default: embedding,
    aten._weight_norm.default: weight_norm,
    aten.lstm.input: recurrent(4),
    aten.gru.input: recurrent(3),
    aten.rnn_tanh.input: recurrent(1),
    aten.rnn_relu.input: recurrent(1),
}
