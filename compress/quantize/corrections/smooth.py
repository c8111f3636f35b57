"""SmoothQuant: what makes activations hard to quantise moves into the weights that read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from compress.errors import DataError
from compress.quantize.corrections.channels import LINEAR, Coupling, move, parameter, read_ranges, readers_of, used_once
from compress.surgery import Captured

__all__ = ["smooth", "smoothable"]

# Where each norm keeps its scale and, if it has one, its shift.
_AFFINE = {
    torch.ops.aten.layer_norm.default: (2, 3),
    torch.ops.aten.rms_norm.default: (2,),
}


def smooth(captured: Captured, batches: Iterable[Sequence[Tensor]], *, alpha: float = 0.5) -> int:
    r"""Shrink the channels of a norm's output that are large, and enlarge the weights of the linears that read them.

    .. math:: X_j \leftarrow X_j / s_j, W_j \leftarrow s_j W_j,
        s_j = \max|X_j|^\alpha / \max|W_j|^{1-\alpha}          Xiao et al. 2022, arXiv:2211.10438, equation 4

    The norm's own scale and shift take the division: LayerNorm, RMSNorm, or a product with a parameter as models of
    language write it. All that reads the norm must be linears: where a residual sum reads it too, as in BERT, nothing
    moves.

    Args:
        captured: A float network; its parameters change in place, its function does not.
        batches: Inputs of the network, a tuple of tensors each.
        alpha: How much moves: 0 equalises the weights, 1 the activations.

    Returns:
        How many norms have been smoothed; 0 when none can be.

    Raises:
        DataError: when there is no data, or an activation is not finite; nothing has then changed.
    """
    graph_module = captured.graph_module
    couplings = smoothable(graph_module)
    if not couplings:
        return 0
    largest = _largest(captured, batches, [coupling.source for coupling in couplings])
    for coupling in couplings:
        seen, read = largest[coupling.source], read_ranges(graph_module, coupling)
        factors = seen.to(read) ** alpha / read ** (1 - alpha)
        move(graph_module, coupling, torch.where((seen.to(read) > 0) & (read > 0), factors, 1.0))
    return len(couplings)


def smoothable(graph_module: GraphModule) -> list[Coupling]:
    """Return the norms whose outputs linears alone read."""
    found = []
    for node in graph_module.graph.nodes:
        names = _affine(graph_module, node)
        if not names:
            continue
        readers = readers_of(node, node.meta["val"].dim() - 1)
        if readers is None or any(reader.product.target is not LINEAR for reader in readers):
            continue
        if used_once(graph_module, (*names, *(reader.weight for reader in readers))):
            found.append(Coupling(node, names, readers))
    return found


def _affine(graph_module: GraphModule, node: Node) -> tuple[str, ...]:
    """Return the names of the parameters that scale and shift a node's last dimension."""
    given: list[Any] = []
    if node.target in _AFFINE:
        given = [node.args[i] for i in _AFFINE[node.target] if len(node.args) > i and node.args[i] is not None]
        shape: Any = node.args[1]
        if len(shape) != 1 or (len(node.args) > 2 and node.args[2] is None):
            return ()
    elif node.target is torch.ops.aten.mul.Tensor:
        given = [argument for argument in node.args if isinstance(argument, Node) and argument.op == "get_attr"]
        if len(given) != 1 or tuple(parameter(graph_module, str(given[0].target)).shape) != node.meta["val"].shape[-1:]:
            return ()
    if any(not isinstance(argument, Node) or argument.op != "get_attr" for argument in given):
        return ()
    return tuple(str(argument.target) for argument in given)


def _largest(captured: Captured, batches: Iterable[Sequence[Tensor]], nodes: Sequence[Node]) -> dict[Node, Tensor]:
    """Return the largest magnitude of each channel, the last dimension, over all data in evaluation."""
    watch = _Watch(captured.graph_module, nodes)
    training = captured.training
    try:
        captured.eval().sync_mode()
        with torch.no_grad():
            for inputs in batches:
                watch.run(*inputs)
    finally:
        captured.training = training  # not by train(): parts keep their modes
        captured.sync_mode()
    if not watch.largest:
        raise DataError("smooth: expected at least one batch, got none. Give the training data's loader.")
    for node, seen in watch.largest.items():
        if not seen.isfinite().all():
            raise DataError(
                f"smooth: expected finite activations, got others at {node.name!r}. Look for NaN in the data and in "
                "the network's outputs."
            )
    return watch.largest


class _Watch(Interpreter):
    def __init__(self, graph_module: GraphModule, nodes: Sequence[Node]) -> None:
        super().__init__(graph_module)
        self.nodes = set(nodes)
        self.largest: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if n in self.nodes:
            seen = value.abs().flatten(0, -2).amax(0)
            self.largest[n] = torch.maximum(seen, self.largest.get(n, seen))
        return value
