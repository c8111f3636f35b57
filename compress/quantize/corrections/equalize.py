"""Cross-layer equalisation: layers in a row get weights of like range, channel by channel."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from compress.quantize.corrections.channels import (
    CONVOLUTIONS,
    LINEAR,
    Coupling,
    folded,
    move,
    norm_behind,
    read_ranges,
    readers_of,
    used_once,
)
from compress.surgery import Captured

__all__ = ["equalize"]

_NUM_SWEEPS = 50
_SMALL = 1e-4


def equalize(captured: Captured) -> int:
    r"""Give each channel between two layers the same range of weights where it is made as where it is read.

    .. math:: W_1 \leftarrow S^{-1} W_1, b_1 \leftarrow S^{-1} b_1, W_2 \leftarrow W_2 S,
        s_i = \sqrt{r_i(W_1) / r_i(W_2)}          Nagel et al. 2019, arXiv:1906.04721, section 4.1

    with :math:`r_i` the largest magnitude. Between the layers may stand what passes positive factors on: ReLU, leaky
    ReLU, dropout, pooling, means, flattening; not ReLU6, GELU, or a sum. A BatchNorm behind a convolution counts as
    folded into it, and its own scale and shift take the factor. Channels that are nearly nothing (a ten-thousandth of
    the largest range) keep theirs. It helps most where a whole tensor shares one scale.

    Args:
        captured: A float network; its parameters change in place, its function does not.

    Returns:
        How many places have been equalised; 0 when layers in a row are nowhere found.

    Example:
        >>> from compress.surgery import capture
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 1))
        >>> for layer, value in ((net[0], 8.0), (net[2], 2.0)):
        ...     _ = torch.nn.init.constant_(layer.weight, value)
        >>> equalize(capture(net, [torch.ones(2, 1)])), net[0].weight.item(), net[2].weight.item()
        (1, 4.0, 4.0)
    """
    graph_module = captured.graph_module
    couplings = _couplings(graph_module)
    for _ in range(_NUM_SWEEPS):  # one place's factors change what its neighbours have to balance
        moved = [_balance(graph_module, *coupling) for coupling in couplings]
        if max(moved, default=0.0) < 1e-3:
            break
    return len(couplings)


def _couplings(graph_module: GraphModule) -> list[tuple[Coupling, Node]]:
    """Return what can be balanced, each with its layer."""
    found = []
    for node in graph_module.graph.nodes:
        if node.target not in CONVOLUTIONS and node.target is not LINEAR:
            continue
        source, names = _made_by(node)
        channel = 1 if node.target in CONVOLUTIONS else node.meta["val"].dim() - 1
        readers = readers_of(source, channel)
        if readers is None or not names:
            continue
        if used_once(graph_module, (*names, *(reader.weight for reader in readers))):
            found.append((Coupling(source, names, readers), node))
    return found


def _made_by(product: Node) -> tuple[Node, tuple[str, ...]]:
    """Return the node that gives a layer's outputs, and the parameters in which they are linear: a norm's, if any."""
    norm = norm_behind(product)
    if norm is not None:
        return norm, _names(norm.args[1:3])
    bias = product.args[2] if len(product.args) > 2 else None
    return product, _names([product.args[1], *([] if bias is None else [bias])])


def _names(nodes: Any) -> tuple[str, ...]:
    """Return the parameters' names; none when one of them is missing, or is computed."""
    if any(not isinstance(node, Node) or node.op != "get_attr" for node in nodes):
        return ()
    return tuple(str(node.target) for node in nodes)


def _balance(graph_module: GraphModule, coupling: Coupling, product: Node) -> float:
    """Equalise one place once, and return the logarithm of the factor furthest from one."""
    made = folded(graph_module, product).abs().flatten(1).amax(1)
    read = read_ranges(graph_module, coupling)
    alive = (made > _SMALL * made.max()) & (read > _SMALL * read.max())
    factors = torch.where(alive, made / read, 1.0).sqrt()
    move(graph_module, coupling, factors)
    return float(factors.log().abs().max())
