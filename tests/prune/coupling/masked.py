"""The reference for removal: the whole network with the removed slices at zero.

Where a normalisation, softmax or mean runs over something that is removed, the reference runs it over what is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from compress.prune.coupling import read_coupling, resize, static_graph
from compress.prune.coupling.resize import _Left
from compress.surgery import apply_slices

__all__ = ["masked_and_shrunk"]

_OVER_KEPT = (
    "layer_norm",
    "rms_norm",
    "group_norm",
    "mean",
    "softmax",
    "log_softmax",
    "linalg_vector_norm",
    "norm",
    "var",
)


class _OverKept(Interpreter):
    """Runs a graph, and operators that reduce over removed elements on what is kept."""

    def __init__(self, whole: GraphModule, small: GraphModule, labels: Any, left: _Left) -> None:
        super().__init__(whole)
        self.small = {node.name: node for node in small.graph.nodes}
        self.labels = labels
        self.left = left

    def run_node(self, n: Node) -> Any:
        name = str(n.target).removeprefix("aten.").partition(".")[0]
        if n.op != "call_function" or name not in _OVER_KEPT:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        narrow = self.small[n.name]
        given = []
        for arg, node in zip(args, n.args):
            given.append(self._kept(arg, node) if isinstance(node, Node) else arg)
        plain = [value if isinstance(node, Node) else node for value, node in zip(given, narrow.args)]
        result = n.target(*plain, **narrow.kwargs)  # type: ignore[operator]
        return self._scattered(result, n)

    def _kept(self, value: Any, node: Node) -> Any:
        for dim, keep in enumerate(self.left.kept(self.labels.values[node])):
            if keep is not None:
                value = value.index_select(dim, keep.nonzero()[:, 0])
        return value

    def _scattered(self, value: Tensor, node: Node) -> Tensor:
        for dim, keep in enumerate(self.left.kept(self.labels.values[node])):
            if keep is not None:
                shape = [*value.shape]
                shape[dim] = len(keep)
                value = value.new_zeros(shape).index_copy(dim, keep.nonzero()[:, 0], value)
        return value


def masked_and_shrunk(
    network: nn.Module, inputs: Sequence[Tensor], choose: Any, *, heads: str = "whole"
) -> list[tuple[str, Tensor, Tensor]]:
    """Return for each choice of units its name and the outputs of the masked and of the shrunk network.

    Args:
        network: In any precision.
        inputs: Of that precision.
        choose: Gives from the groups a list of ``(name, {group: unit indices})``.
        heads: Whether heads of attention go whole or lose width.
    """
    graph: Any = static_graph(network.eval(), inputs)
    coupling = read_coupling(graph, heads=heads)
    results = []
    for name, choice in choose(coupling.groups):
        removed = []
        gone: dict[tuple[str, int], set[int]] = {}
        for group, units in choice:
            for (tensor, dim), indices in group.slots.items():
                gone.setdefault((tensor, dim), set()).update(indices[units].flatten().tolist())
            (tensor, dim), indices = next(iter(group.slots.items()))
            removed.append(coupling.labels.tensors[tensor][dim][indices[units][:, 0]])
        slices: dict[str, dict[str, list[int]]] = {}
        for (tensor, dim), indices in gone.items():
            size = len(coupling.labels.tensors[tensor][dim])
            slices.setdefault(tensor, {})[str(dim)] = [i for i in range(size) if i not in indices]
        small = copy.deepcopy(graph)
        fresh = read_coupling(small, heads=heads)
        again = [
            fresh.labels.tensors[tensor][int(dim)][
                [i for i in range(len(fresh.labels.tensors[tensor][int(dim)])) if i not in kept]
            ]
            for tensor, dims in slices.items()
            for dim, kept in dims.items()
        ]
        resize(small, fresh.labels, torch.cat(again))
        apply_slices(small, slices, {})
        masked = copy.deepcopy(graph)
        tensors = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
        with torch.no_grad():
            for (tensor, dim), indices in gone.items():
                tensors[tensor].index_fill_(dim, torch.tensor(sorted(indices)), 0.0)
            left = _Left(coupling.labels.units, torch.cat(removed))
            names = {node.name: node for node in graph.graph.nodes}
            labels = copy.copy(coupling.labels)
            labels.values = {
                node: coupling.labels.values[names[node.name]]
                for node in masked.graph.nodes
                if names[node.name] in coupling.labels.values
            }
            reference = _OverKept(masked, small, labels, left).run(*inputs)
            results.append((name, _first(reference), _first(small(*inputs))))
    return results


def _first(outputs: Any) -> Tensor:
    return (
        outputs
        if isinstance(outputs, Tensor)
        else next(iter(outputs.values() if isinstance(outputs, dict) else outputs))
    )
