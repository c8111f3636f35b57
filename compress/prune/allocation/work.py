"""The multiply-accumulates of a network, operator by operator, as a function of the widths of its groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from compress.prune.allocation.sizes import Extent, Sizes
from compress.prune.anatomy import Anatomy

__all__ = ["Work", "list_work"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """One convolution or matrix product.

    Args:
        name: Its node in the graph.
        kind: ``conv``, ``linear`` (one factor is a weight) or ``product`` (none is).
        read: What is summed over.
        made: What comes out: output channels, columns.
        times: What multiplies: batch, positions, kernel.
        fixed: What else tells how long it takes, by name: stride, padding and the like.
    """

    name: str
    kind: str
    read: tuple[Extent, ...]
    made: tuple[Extent, ...]
    times: tuple[Extent, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def macs(self, removed: Mapping[str, int]) -> float:
        """Return the multiply-accumulates once some units of each group are gone."""
        return volume((*self.read, *self.made, *self.times), removed)


def volume(extents: Sequence[Extent], removed: Mapping[str, int]) -> float:
    """Return the product of sizes."""
    return math.prod(extent.after(removed) for extent in extents)


def list_work(anatomy: Anatomy, sizes: Sizes) -> list[Work]:
    """Return the work that ``compress.measure.macs`` counts, in the order of the graph, for the example inputs."""
    values = anatomy.coupling.labels.values
    return [
        work
        for node in values
        if node.op == "call_function" and node.target in _RULES
        for work in _RULES[node.target](_Call(node, values, sizes))
    ]


@dataclass(frozen=True)
class _Call:
    """A node of the graph and what is known of its arguments."""

    node: Node
    values: Mapping[Node, Any]
    sizes: Sizes

    def argument(self, name: str) -> Any:
        """Return an argument by its name in the operator's schema, or its default."""
        target: Any = self.node.target
        for position, entry in enumerate(target._schema.arguments):
            if entry.name == name:
                if position < len(self.node.args):
                    return self.node.args[position]
                return self.node.kwargs.get(name, entry.default_value)
        return None

    def positional(self, position: int) -> Any:
        """Return one of the first arguments, whatever the operator calls it."""
        return self.node.args[position]

    def extents(self, what: Any) -> list[Extent]:
        value = self.values[what]
        return self.sizes.of(value[0] if isinstance(value, list | tuple) else value)

    @property
    def result(self) -> list[Extent]:
        return self.extents(self.node)


def _linear(call: _Call) -> Iterator[Work]:
    made, read = call.extents(call.positional(1))
    yield Work(call.node.name, "linear", (read,), (made,), tuple(call.extents(call.positional(0))[:-1]))


def _matmul(first: int) -> Callable[[_Call], Iterator[Work]]:
    def rule(call: _Call) -> Iterator[Work]:
        a, b = (call.extents(call.positional(first + i)) for i in range(2))
        columns = tuple(b[-1:]) if len(b) > 1 else ()
        rows = call.result[: len(call.result) - len(columns)]
        yield Work(call.node.name, "product", (a[-1],), columns, tuple(rows))

    return rule


def _einsum(call: _Call) -> Iterator[Work]:
    equation, operands = call.node.args[:2]
    assert isinstance(operands, list | tuple)
    given, arrow, result = str(equation).replace(" ", "").partition("->")
    if "." in given or not arrow or len(operands) != 2:
        return
    every = {c: e for name, what in zip(given.split(","), operands) for c, e in zip(name, call.extents(what))}
    last = given.split(",")[1]
    parts: dict[str, list[Extent]] = {"read": [], "made": [], "times": []}
    for letter, extent in every.items():
        only_last = letter in last and letter not in given.split(",")[0]
        parts["read" if letter not in result else "made" if only_last else "times"].append(extent)
    read, made, times = (tuple(part) for part in parts.values())
    yield Work(call.node.name, "product", read, made, times)


def _attention(call: _Call) -> Iterator[Work]:
    query, key, value = (call.extents(call.positional(i)) for i in range(3))
    yield Work(f"{call.node.name}.scores", "product", (query[-1],), (key[-2],), tuple(query[:-1]))
    yield Work(f"{call.node.name}.values", "product", (key[-2],), (value[-1],), tuple(query[:-1]))


def _recurrent(call: _Call) -> Iterator[Work]:
    """Each weight of each layer at each step."""
    x, weights = call.extents(call.positional(0)), call.argument("params")
    steps, batch = (x[1], x[0]) if call.argument("batch_first") else (x[0], x[1])
    for number, weight in enumerate(weights):
        extents = call.extents(weight)
        if len(extents) == 2:
            made, read = extents
            # What reads the input runs over all steps at once, what reads the state does not.
            alone = {"repeat": steps.full} if number % (4 if call.argument("has_biases") else 2) else {}
            yield Work(f"{call.node.name}.{number}", "linear", (read,), (made,), (batch, steps), alone)


def _convolution(transposed: bool) -> Callable[[_Call], Iterator[Work]]:
    def rule(call: _Call) -> Iterator[Work]:
        x, weight, result = call.extents(call.positional(0)), call.extents(call.positional(1)), call.result
        rank = len(weight) - 2
        kernel = [extent.full for extent in weight[2:]]
        dilation = _each(call.argument("dilation"), rank)
        fixed = {
            "kernel": kernel,
            "stride": _each(call.argument("stride"), rank),
            "dilation": dilation,
            "padding": _padding(call.argument("padding"), kernel, dilation),
            "image": [extent.full for extent in x[len(x) - rank :]],
            "groups": call.argument("groups"),
            "transposed": transposed,
        }
        if transposed:
            fixed["output_padding"] = _each(call.argument("output_padding"), rank)
        around = x if transposed else result
        times = (*around[: len(around) - rank - 1], *around[len(around) - rank :], *weight[2:])
        read, made = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
        yield Work(call.node.name, "conv", (read,), (made,), times, fixed)

    return rule


def _each(given: Any, rank: int) -> list[int]:
    values = list(given) if isinstance(given, list | tuple) else [given]
    return values * rank if len(values) == 1 else values


def _padding(given: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[list[int]]:
    """Return padding before and after in each dimension."""
    if given == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation)]
        return [[total // 2, total - total // 2] for total in totals]
    return [[pad, pad] for pad in _each(0 if given == "valid" else given, len(kernel))]


_RULES: dict[Any, Callable[[_Call], Iterator[Work]]] = {
    aten.linear.default: _linear,
    **{op: _matmul(0) for op in (aten.matmul.default, aten.mm.default, aten.bmm.default)},
    **{op: _matmul(1) for op in (aten.addmm.default, aten.baddbmm.default)},
    aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
    **dict.fromkeys((aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input), _recurrent),
    **{op: _convolution(False) for op in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)},
    **{op: _convolution(False) for op in (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)},
    **{
        op: _convolution(True)
        for op in (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
    },
}
