"""What a network costs: parameters, multiply-accumulates, bytes, widths."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["macs", "num_bytes", "num_params", "widths"]


def num_params(network: nn.Module) -> int:
    """Count the parameters, shared ones once.

    Example:
        >>> num_params(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in network.parameters())


def macs(network: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Count the multiply-accumulates of one forward pass, in eval mode.

    Convolutions, matrix products and attention count; element-wise operations do not.

    Args:
        network: Left in the mode it was in.
        inputs: Inputs of that pass; give a batch of one to get the cost of a sample.

    Example:
        >>> macs(nn.Linear(3, 2), [torch.ones(1, 3)])
        6
    """
    training = network.training
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            network.eval()(*inputs)
    finally:
        network.train(training)
    return counter.get_total_flops() // 2


def num_bytes(network: nn.Module) -> int:
    """Return the size of the network's weights as ``torch.save`` writes them.

    Example:
        >>> num_bytes(nn.Linear(100, 100)) > 100 * 100 * 4
        True
    """
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.getbuffer().nbytes


def widths(network: nn.Module) -> dict[str, int]:
    """Return the number of outputs of each layer that has a weight matrix, by the layer's name.

    Works on captured graphs too, whose layers are bare parameter holders.

    Example:
        >>> widths(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        {'0': 2}
    """
    found = {}
    for name, parameter in network.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and parameter.dim() > 1:
            module = network.get_submodule(layer)
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            found[layer] = parameter.shape[1] * module.groups if transposed else parameter.shape[0]
    return found
