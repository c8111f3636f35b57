"""A quantised graph and its float twin, run operator by operator over all data: what layer-wise corrections compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from compress.errors import DataError
from compress.quantize.corrections.channels import CONVOLUTIONS, LINEAR
from compress.quantize.graph.embeddings import look_up_floats
from compress.quantize.graph.normalize import parameters_alone
from compress.surgery import Captured

__all__ = ["Layer", "Side", "evaluation", "float_twin", "lockstep", "quantized_layers"]

_BATCH_NORM = torch.ops.aten.batch_norm.default
# What PT2E puts between a convolution and the BatchNorm whose scale its weight already has.
_UNDO = {torch.ops.aten.div.Tensor, torch.ops.aten.add.Tensor}


@dataclass(frozen=True)
class Layer:
    """A convolution or linear whose weight is quantised.

    Args:
        product: Its operator.
        weight: The fake quantizer's node.
        behind: What follows with constants alone, up to the BatchNorm that belongs to it; empty without one.
    """

    product: Node
    weight: Node
    behind: tuple[Node, ...]

    @property
    def last(self) -> Node:
        """The node that gives the layer's outputs, before any nonlinearity."""
        return self.behind[-1] if self.behind else self.product

    @property
    def channel(self) -> int:
        """The dimension of the outputs that counts channels; those of a BatchNorm, where one belongs to the layer."""
        return 1 if self.behind or self.product.target in CONVOLUTIONS else -1


def quantized_layers(graph_module: GraphModule) -> list[Layer]:
    """Return the layers of a prepared graph in the order in which data meets them."""
    fixed = parameters_alone(graph_module)
    return [
        Layer(node, node.args[1], _behind(node, fixed))
        for node in graph_module.graph.nodes
        if (node.target in CONVOLUTIONS or node.target is LINEAR) and _is_fake_quantizer(graph_module, node.args[1])
    ]


def float_twin(prepared: Captured) -> Captured:
    """Return a copy that computes in floating point, in evaluation."""
    twin = copy.deepcopy(prepared).eval()
    for module in twin.graph_module.modules():
        for name in ("fake_quant_enabled", "observer_enabled"):
            switch: Any = getattr(module, name, None)
            if switch is not None:
                switch[0] = 0
    look_up_floats(twin.graph_module)
    return twin


@contextmanager
def evaluation(*networks: Captured) -> Iterator[None]:
    """Write evaluation into graphs, and no gradients, within the context."""
    before = [network.training for network in networks]
    try:
        for network in networks:
            network.eval().sync_mode()
        with torch.no_grad():
            yield
    finally:
        for network, training in zip(networks, before):
            network.training = training  # not by train(): parts keep their modes
            network.sync_mode()


class Side:
    """One graph and the values of its nodes, for each batch; what nothing needs any more is forgotten.

    Args:
        graph_module: In evaluation.
        batches: Its inputs, a tuple of tensors each.

    Raises:
        DataError: when there is no data.
    """

    def __init__(self, graph_module: GraphModule, batches: Sequence[Sequence[Tensor]]) -> None:
        if not batches:
            raise DataError("quantize.improve: expected at least one batch, got none. Give the training data's loader.")
        self.graph_module = graph_module
        self.nodes = list(graph_module.graph.nodes)
        self.values: list[dict[Node, Any]] = [{} for _ in batches]
        self._inputs = [iter(graph_module.graph.process_inputs(*inputs)) for inputs in batches]
        self._fed: set[Node] = set()
        self._last_use = {source: node for node in self.nodes for source in node.all_input_nodes}

    def run(self, node: Node) -> None:
        """Compute a node that data reaches, for each batch."""
        if node.op == "placeholder":
            self._fed.add(node)
            for values, inputs in zip(self.values, self._inputs):
                values[node] = next(inputs)
        elif node.op != "output" and any(source in self._fed for source in node.all_input_nodes):
            self._fed.add(node)
            constants = {source: self.constant(source) for source in node.all_input_nodes if source not in self._fed}
            for values in self.values:
                values[node] = self.compute(node, (constants | values).__getitem__)

    def constant(self, node: Node) -> Any:
        """Compute a node that data does not reach from the parameters as they are now."""
        return self.compute(node, self.constant)

    def compute(self, node: Node, lookup: Callable[[Node], Any]) -> Any:
        """Compute one node from its sources' values."""
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            return getattr(self.graph_module.get_submodule(owner), leaf)
        args, kwargs = map_arg(node.args, lookup), map_arg(node.kwargs, lookup)
        target: Any = node.target
        return (self.graph_module.get_submodule(target) if node.op == "call_module" else target)(*args, **kwargs)

    def all(self, node: Node) -> list[Tensor]:
        """Return a node's values, batch by batch: they may differ in length."""
        return [values[node] for values in self.values]

    def forget(self, node: Node) -> None:
        """Drop the values that this node was the last to use."""
        for source in node.all_input_nodes:
            if self._last_use[source] is node:
                for values in self.values:
                    values.pop(source, None)


def lockstep(quantized: Side, reference: Side) -> Iterator[tuple[Node, Node]]:
    """Run both graphs node by node; after each the caller may look at values, and change parameters and run it again.

    Yields:
        The node of the quantised graph and that of the reference.
    """
    for node, twin in zip(quantized.nodes, reference.nodes):
        quantized.run(node)
        reference.run(twin)
        yield node, twin
        quantized.forget(node)
        reference.forget(twin)


def _is_fake_quantizer(graph_module: GraphModule, node: Any) -> bool:
    if not (isinstance(node, Node) and node.op == "call_module"):
        return False
    return hasattr(graph_module.get_submodule(str(node.target)), "fake_quant_enabled")


def _behind(product: Node, fixed: set[Node]) -> tuple[Node, ...]:
    found: list[Node] = []
    node = product
    while len(node.users) == 1:
        before, node = node, next(iter(node.users))
        if node.args[0] is not before or node.target not in (*_UNDO, _BATCH_NORM):
            break
        if any(isinstance(given, Node) and given not in fixed for given in node.args[1:]):
            break  # a residual sum
        found.append(node)
        if node.target is _BATCH_NORM:
            return tuple(found) if node.args[4] is not None else ()
    return ()
