"""What the units of each group say to a few batches.

Measured on the graph, node by node: hooks on modules do not fire once a network goes on as its captured graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from compress.errors import CaptureError, DataError
from compress.measure.modes import kept_modes
from compress.prune.anatomy import Anatomy
from compress.prune.coupling import static_graph
from compress.prune.criteria.places import Place, find_places
from compress.surgery import Captured

__all__ = ["WIDEST", "Activation", "measure_activations"]

WIDEST = 2048
"""Groups with more units have no correlations: their matrix would take more than 32 MiB."""

_MANY = 8  # pieces, from which on it pays to export a second graph


@dataclass(frozen=True)
class Activation:
    """Sums over everything that the units of a group have said.

    Sums, so that those of several ranks can be averaged; float64, so that they are exact enough to subtract.

    Args:
        count: Elements of each unit that were seen: samples times positions times indices. A scalar.
        magnitudes: Sum of absolute values, shape (units,).
        zeros: Number of zeros, shape (units,).
        totals: Sum of values, shape (units,).
        products: Sum of the products of any two units, shape (units, units); none for groups wider than ``WIDEST``.

    Example:
        >>> said = Activation.of(torch.tensor([[1.0, 0.0], [3.0, -1.0]]))  # two elements of two units
        >>> said.magnitude, said.zero_fraction, said.correlation
        (tensor([2.0000, 0.5000]), tensor([0.0000, 0.5000]), tensor([[ 1., -1.], [-1.,  1.]]))
    """

    count: Tensor
    magnitudes: Tensor
    zeros: Tensor
    totals: Tensor
    products: Tensor | None

    @classmethod
    def of(cls, values: Tensor) -> Activation:
        """Return the sums over values, shape (elements, units)."""
        num, width = values.shape
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        # Around a point close to the mean, so that single precision is enough for what is summed over elements.
        point = values.mean(0)
        apart = values - point
        rest, point = apart.sum(0).double(), point.double()
        products = None
        if width <= WIDEST:
            cross = torch.outer(rest, point)
            products = (apart.T @ apart).double() + cross + cross.T + num * torch.outer(point, point)
        return cls(
            torch.tensor(float(num), dtype=torch.float64, device=values.device),
            values.abs().sum(0).double(),
            (values == 0).sum(0).double(),
            num * point + rest,
            products,
        )

    def __add__(self, other: Activation) -> Activation:
        return Activation(
            self.count + other.count,
            self.magnitudes + other.magnitudes,
            self.zeros + other.zeros,
            self.totals + other.totals,
            None if self.products is None or other.products is None else self.products + other.products,
        )

    def all_reduce(self, reduce: Callable[[Tensor], Tensor]) -> Activation:
        """Return the means of the sums over all ranks.

        Args:
            reduce: Returns the mean over ranks of a tensor of shape (n,).
        """
        sums = [self.count, self.magnitudes, self.zeros, self.totals]
        sums += [] if self.products is None else [self.products]
        joined = reduce(torch.cat([each.flatten() for each in sums]))
        parts = joined.split([each.numel() for each in sums])
        count, magnitudes, zeros, totals, *products = (part.view_as(each) for part, each in zip(parts, sums))
        return Activation(count, magnitudes, zeros, totals, products[0] if products else None)

    @property
    def magnitude(self) -> Tensor:
        """The mean absolute value of each unit, shape (units,)."""
        return (self.magnitudes / self.count).float()

    @property
    def zero_fraction(self) -> Tensor:
        """The fraction of each unit's elements that are zero, shape (units,)."""
        return (self.zeros / self.count).float()

    @property
    def correlation(self) -> Tensor | None:
        """Pearson's correlation of any two units, shape (units, units); 1 with units that never change."""
        if self.products is None:
            return None
        mean = self.totals / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        variance = covariance.diagonal()
        # A unit that never changes can be stood in for by a bias, so by any other unit.
        still = variance <= 1e-12 * (self.products.diagonal() / self.count)
        deviation = variance.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        result = (covariance / torch.outer(deviation, deviation)).clamp(-1, 1)
        result[still] = 1.0
        result[:, still] = 1.0
        return result.fill_diagonal_(1.0).float()


def measure_activations(anatomy: Anatomy, batches: Sequence[tuple[Tensor, ...]]) -> dict[str, Activation]:
    """Run a network on batches, in evaluation and without gradients, and sum up what its units say.

    Looked at is the value that the first layer to read a group's units reads, as it is before pooling, views and
    concatenation: after the activation function in a convolutional network, what a head gives to the projection, all
    steps of a recurrent layer. Elements are samples, positions and the indices that a unit has several of.

    Args:
        anatomy: The network; its weights, buffers and mode are the same afterwards.
        batches: Inputs, as many as the network takes, best all of one size. The size of the example inputs may be
            written into the graph; where that of the first batch is much larger, a second graph is exported for it.
            What is left of a batch runs in pieces of the example's size, the last one filled up from the front of the
            batch, so that these few samples count twice.

    Returns:
        Activations by group. A group whose units are no dimension of any value is left out.

    Raises:
        DataError: when there are no batches, or inputs do not fit the example inputs.

    Example:
        >>> from torch import nn
        >>> from compress.prune import study
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> measure_activations(study(net, [x]), [(x,)])["0"].magnitude
        tensor([1.5000, 0.0000])
    """
    if not batches:
        raise DataError("prune.criterion: expected batches to measure activations on, got none. Give it at least one.")
    if isinstance(anatomy.network, Captured):
        # The anatomy's graph is its own, but still in the mode of the network that it was copied from.
        Captured(anatomy.graph).eval().sync_mode()
    device = next(anatomy.network.parameters()).device
    places, sums = find_places(anatomy), dict[str, Activation]()
    runs = [(len(anatomy.inputs[0]), _Recorder(anatomy.graph, places, sums))]
    if (wide := _wide(anatomy, batches)) is not None:
        graph, twins = wide
        runs.insert(0, (len(batches[0][0]), _Recorder(graph, {twins[n]: each for n, each in places.items()}, sums)))
    buffers = {name: buffer.clone() for name, buffer in anatomy.graph.named_buffers()}
    try:
        with torch.no_grad():
            for batch in batches:
                _check(batch, anatomy.inputs)
                _run([tensor.to(device) for tensor in batch], runs)
    finally:
        with torch.no_grad():
            for name, buffer in anatomy.graph.named_buffers():
                if not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])
    return sums


def _check(batch: Sequence[Tensor], example: Sequence[Tensor]) -> None:
    got = [list(tensor.shape[1:]) for tensor in batch]
    wanted = [list(tensor.shape[1:]) for tensor in example]
    if got != wanted or not all(len(tensor) for tensor in batch):
        raise DataError(
            f"prune.criterion: expected batches of inputs of shape (samples, ...) with {wanted}, got {got}. "
            "Give it the network's inputs alone, without targets."
        )


def _run(batch: Sequence[Tensor], runs: Sequence[tuple[int, _Recorder]]) -> None:
    """Run a batch in pieces of given numbers of samples, the largest first."""
    start, num = 0, len(batch[0])
    for size, recorder in runs:
        while num - start >= size:
            recorder.run(*(tensor[start : start + size] for tensor in batch))
            start += size
    if start < num:
        take = torch.arange(start, start + size, device=batch[0].device) % num
        recorder.run(*(tensor[take] for tensor in batch))


def _wide(anatomy: Anatomy, batches: Sequence[Sequence[Tensor]]) -> tuple[GraphModule, dict[Node, Node]] | None:
    """Return a graph that takes whole batches, and its node for each of the anatomy's; none where that is no gain."""
    network, first = anatomy.network, batches[0]
    _check(first, anatomy.inputs)
    if len(first[0]) == len(anatomy.inputs[0]) or sum(len(x[0]) for x in batches) < _MANY * len(anatomy.inputs[0]):
        return None
    if isinstance(network, Captured):  # its batch is dynamic
        return anatomy.graph, {node: node for node in _nodes(anatomy.graph)}
    try:
        with kept_modes(network, training=False):
            graph = static_graph(network, [tensor.to(anatomy.inputs[0].device) for tensor in first])
    except CaptureError:
        return None  # of this size it cannot be; pieces can
    old, new = list(_nodes(anatomy.graph)), list(_nodes(graph))
    same = [(a.name, a.op, str(a.target)) for a in old] == [(b.name, b.op, str(b.target)) for b in new]
    return (graph, dict(zip(old, new))) if same else None


def _nodes(graph_module: GraphModule) -> Iterator[Node]:
    for module in graph_module.modules():
        if isinstance(module, GraphModule):
            yield from module.graph.nodes


class _Recorder(Interpreter):
    """Runs a graph and adds up what is said at places."""

    def __init__(
        self, graph_module: GraphModule, places: Mapping[Node, Sequence[Place]], sums: dict[str, Activation]
    ) -> None:
        super().__init__(graph_module)
        self.places = places
        self.sums = sums

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        for place in self.places.get(n, ()):
            said = Activation.of(place.values(result))
            known = self.sums.get(place.group)
            self.sums[place.group] = said if known is None else known + said
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not operator.getitem:  # a region under no_grad or autocast is run node by node, too
            args = tuple(self._inner(arg) if isinstance(arg, GraphModule) else arg for arg in args)
        return super().call_function(target, args, kwargs)

    def _inner(self, region: GraphModule) -> Callable[..., Any]:
        return lambda *args: _Recorder(region, self.places, self.sums).run(*args)
