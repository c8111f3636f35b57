"""Factors that move along a graph's channels: from what makes a channel to what reads it, the function unchanged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

__all__ = [
    "CONVOLUTIONS",
    "LINEAR",
    "Coupling",
    "Reader",
    "move",
    "parameter",
    "read_ranges",
    "readers_of",
    "used_once",
]

CONVOLUTIONS = {
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv3d.default,
}
LINEAR = torch.ops.aten.linear.default
_BATCH_NORM = torch.ops.aten.batch_norm.default

# f(c x) = c f(x) for each c > 0, element by element. ReLU6 and GELU are not among them.
_HOMOGENEOUS = {
    torch.ops.aten.relu.default,
    torch.ops.aten.relu_.default,
    torch.ops.aten.leaky_relu.default,
    torch.ops.aten.leaky_relu_.default,
    torch.ops.aten.dropout.default,
    torch.ops.aten.dropout_.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.feature_dropout_.default,
}
_POOLS = {
    torch.ops.aten.max_pool1d.default,
    torch.ops.aten.max_pool2d.default,
    torch.ops.aten.max_pool3d.default,
    torch.ops.aten.avg_pool1d.default,
    torch.ops.aten.avg_pool2d.default,
    torch.ops.aten.avg_pool3d.default,
    torch.ops.aten.adaptive_avg_pool1d.default,
    torch.ops.aten.adaptive_avg_pool2d.default,
    torch.ops.aten.adaptive_avg_pool3d.default,
}
_FLATTEN = {torch.ops.aten.flatten.using_ints, torch.ops.aten.view.default, torch.ops.aten.reshape.default}


@dataclass(frozen=True)
class Reader:
    """A layer that reads channels.

    Args:
        product: Its convolution or linear operator.
        repeat: How many inputs in a row belong to one channel, after flattening.
    """

    product: Node
    repeat: int = 1

    @property
    def weight(self) -> str:
        """The name of the weight, shape (outputs, inputs / groups, ...)."""
        return str(self.product.args[1].target)  # type: ignore[union-attr]

    @property
    def groups(self) -> int:
        """Of a convolution; else 1."""
        return _argument(self.product, 6, 1) if self.product.target in CONVOLUTIONS else 1


@dataclass(frozen=True)
class Coupling:
    """Channels, by what makes and what reads them.

    Args:
        source: The node that gives the channels.
        made_by: Parameters, channels in dimension 0, in which the channels are linear together.
        readers: All that reads them.
    """

    source: Node
    made_by: tuple[str, ...]
    readers: tuple[Reader, ...]


def move(graph_module: GraphModule, coupling: Coupling, factors: Tensor) -> None:
    """Divide channels by factors where they are made, and multiply where they are read.

    Args:
        graph_module: Its parameters change in place.
        coupling: Of this graph.
        factors: Positive, one for each channel.
    """
    with torch.no_grad():
        for name in coupling.made_by:
            made = parameter(graph_module, name)
            made.div_(factors.to(made).view(-1, *[1] * (made.dim() - 1)))
        for reader in coupling.readers:
            inputs = _by_input(parameter(graph_module, reader.weight), reader.groups)
            each = factors.to(inputs).repeat_interleave(reader.repeat)
            inputs.mul_(each.view(reader.groups, 1, -1, *[1] * (inputs.dim() - 3)))


def read_ranges(graph_module: GraphModule, coupling: Coupling) -> Tensor:
    """Return the largest magnitude of the weights that read each channel, norms behind them folded in."""
    ranges = []
    for reader in coupling.readers:
        inputs = _by_input(folded(graph_module, reader.product), reader.groups).abs().amax(1).flatten(0, 1)
        ranges.append(inputs.reshape(len(inputs), -1).amax(1).view(-1, reader.repeat).amax(1))
    return torch.stack(ranges).amax(0)


def folded(graph_module: GraphModule, product: Node) -> Tensor:
    """Return a layer's weight, with the BatchNorm behind it folded in if there is one."""
    norm = norm_behind(product)
    weight = _given(graph_module, product, 1)
    if norm is None:
        return weight
    eps: Any = norm.args[7]
    factors = (_given(graph_module, norm, 4) + eps).rsqrt()
    if norm.args[1] is not None:
        factors = factors * _given(graph_module, norm, 1)
    return weight * factors.view(-1, *[1] * (weight.dim() - 1))


def norm_behind(product: Node) -> Node | None:
    """Return the BatchNorm, with running statistics, that alone takes what a convolution gives."""
    users = list(product.users)
    alone = product.target in CONVOLUTIONS and len(users) == 1 and users[0].target is _BATCH_NORM
    return users[0] if alone and users[0].args[4] is not None else None


def readers_of(source: Node, channel: int) -> tuple[Reader, ...] | None:
    """Follow channels through what lets factors pass, to the weights that read them.

    Args:
        source: Gives a tensor.
        channel: The tensor's dimension that counts channels.

    Returns:
        All readers; none when anything else uses the channels too.
    """
    found: list[Reader] = []
    waiting = [(user, source, channel, 1) for user in source.users]
    while waiting:
        node, before, channel, repeat = waiting.pop()
        if node.args[0] is not before or node.all_input_nodes.count(before) > 1:
            return None
        last = before.meta["val"].dim() - 1
        if node.target in CONVOLUTIONS and channel == 1 and repeat == 1 and _is_parameter(node.args[1]):
            found.append(Reader(node))
        elif node.target is LINEAR and channel == last and _is_parameter(node.args[1]):
            found.append(Reader(node, repeat))
        else:
            passed = _pass(node, before, channel)
            if passed is None:
                return None
            waiting += [(user, node, passed[0], repeat * passed[1]) for user in node.users]
    return tuple(found) or None


def used_once(graph_module: GraphModule, names: Sequence[str]) -> bool:
    """Return whether these are parameters, each of which serves at one place of the graph, under whatever names."""
    uses = Counter(
        parameter(graph_module, str(node.target)).data_ptr()
        for node in graph_module.graph.nodes
        if node.op == "get_attr" and isinstance(_attribute(graph_module, str(node.target)), Tensor)
        for _ in node.users
    )
    tensors = [parameter(graph_module, name) for name in names]
    return all(isinstance(tensor, nn.Parameter) and uses[tensor.data_ptr()] == 1 for tensor in tensors)


def parameter(graph_module: GraphModule, name: str) -> Tensor:
    """Return a parameter or buffer by its dotted name."""
    tensor = _attribute(graph_module, name)
    assert isinstance(tensor, Tensor)
    return tensor


def _given(graph_module: GraphModule, node: Node, position: int) -> Tensor:
    """Return the parameter that a node takes at a position."""
    source: Any = node.args[position]
    return parameter(graph_module, str(source.target)).detach()


def _attribute(graph_module: GraphModule, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(graph_module.get_submodule(owner), leaf)


def _is_parameter(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def _argument(node: Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


def _by_input(weight: Tensor, groups: int) -> Tensor:
    """View a weight as (groups, outputs of one, inputs of one, ...)."""
    return weight.unflatten(0, (groups, -1))


def _pass(node: Node, before: Node, channel: int) -> tuple[int, int] | None:
    """Return the channels' dimension behind a node and how many values of one stand in a row there, if they pass."""
    shape: Any = before.meta["val"].shape
    if node.target in _HOMOGENEOUS:
        return channel, 1
    if node.target in _POOLS and channel == 1 and len(shape) > 2:
        return channel, 1
    if node.target is torch.ops.aten.mean.dim:
        dims: Any = node.args[1]
        gone: set[int] = {dim % len(shape) for dim in dims}
        if channel in gone:
            return None
        return channel - (0 if _argument(node, 2, False) else sum(dim < channel for dim in gone)), 1
    if node.target in _FLATTEN and channel == 1:
        after, features = node.meta["val"].shape, shape[1:]
        if len(after) == 2 and all(isinstance(size, int) for size in features) and after[1] == math.prod(features):
            return 1, math.prod(features[1:])
    return None
