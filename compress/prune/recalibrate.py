"""BatchNorm statistics of a network whose weights have changed under them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from compress.measure.modes import kept_modes
from compress.surgery import Captured

__all__ = ["recalibrate"]

_NORM = torch.ops.aten.batch_norm.default
_TRAINING, _MOMENTUM = 5, 6  # arguments of the operator


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Sequence[Sequence[Tensor]]) -> nn.Module:
    """Replace BatchNorm's running statistics by their means over some batches, everything else in evaluation mode.

    Pruned channels leave others' statistics behind (as in Li et al. 2020, arXiv:2007.02491, adaptive BatchNorm). No
    random number is drawn and no mode is changed for good.

    Args:
        network: A module or a captured graph; changed in place.
        batches: Inputs; without any, nothing happens.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> recalibrate(norm, [(torch.tensor([[1.0], [3.0]]),), (torch.tensor([[5.0], [7.0]]),)]).running_mean
        tensor([4.])
    """
    with kept_modes(network):
        run, set_momentum, restore = _captured(network) if isinstance(network, Captured) else _module(network)
        try:
            for number, inputs in enumerate(batches, start=1):
                set_momentum(1 / number)  # a mean over batches: the first replaces what was there
                run(*inputs)
        finally:
            restore()
    return network


Parts = tuple[Callable[..., object], Callable[[float], None], Callable[[], None]]


def _module(network: nn.Module) -> Parts:
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if network.training:
        norms = [norm for norm in norms if norm.training]  # the others are frozen by the user
    before = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.training = True

    def set_momentum(value: float) -> None:
        for norm in norms:
            norm.momentum = value

    def restore() -> None:
        for norm, momentum in zip(norms, before):
            norm.momentum = momentum

    return network, set_momentum, restore


def _captured(network: Captured) -> Parts:
    graph = network.graph_module
    network.train(False)
    network.sync_mode()
    nodes = [node for node in graph.graph.nodes if node.target is _NORM and node.args[3] is not None]
    nodes = [node for node in nodes if not network.rests(node)]
    before = [node.args for node in nodes]

    def set_momentum(value: float) -> None:
        for node in nodes:
            node.update_arg(_TRAINING, True)
            node.update_arg(_MOMENTUM, value)
        graph.recompile()

    def restore() -> None:
        for node, given in zip(nodes, before):
            node.args = given
        graph.recompile()

    return graph, set_momentum, restore
