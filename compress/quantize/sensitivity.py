"""What a network loses with the weights of one layer at few bits, all else untouched.

Weights are rounded where they stand, the network is judged, and the weights get their values back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from compress.quantize.annotate import FEWEST_UNITS

__all__ = ["BITS", "measure_bits", "num_weights", "round_weight", "rounded"]

BITS = (8, 4, 2)

Value = TypeVar("Value")

_NUM_ITERATIONS = 30
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OF_SEVERAL = (nn.MultiheadAttention, nn.LSTM, nn.GRU)
"""Layers with several weights, which have one name where schemes are given to layers."""


def measure_bits(
    network: nn.Module,
    loss: Callable[[nn.Module], Value],
    *,
    bits: Sequence[int] = BITS,
    done: Mapping[str, Mapping[int, Value]] | None = None,
    on_point: Callable[[str, int, Value], None] | None = None,
) -> dict[str, dict[int, Value]]:
    """Return what ``loss`` says of a network with one layer after the other rounded.

    Args:
        network: Its weights are changed in place for each point and restored.
        loss: Judges the network; it must neither change it nor depend on anything but its weights.
        bits: Bits to try.
        done: Points of an earlier call, which are not measured again.
        on_point: Called with the layer, the bits and the value of each point just measured.

    Returns:
        ``{layer: {bits: value}}`` for all layers that ``num_weights`` counts.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> net.load_state_dict({"0.weight": torch.tensor([[1.0, 0.25]])})
        <All keys matched successfully>
        >>> measure_bits(net, lambda net: net[0].weight[0, 1].item(), bits=[2])
        {'0': {2: 0.0}}
    """
    found: dict[str, dict[int, Value]] = {}
    for layer in num_weights(network):
        found[layer] = {}
        for num in sorted(set(bits), reverse=True):
            known = (done or {}).get(layer, {})
            if num in known:
                found[layer][num] = known[num]
                continue
            with rounded(network, layer, num), torch.no_grad():
                found[layer][num] = loss(network)
            if on_point is not None:
                on_point(layer, num, found[layer][num])
    return found


def num_weights(network: nn.Module) -> dict[str, int]:
    """Return how many weights each layer has that schemes quantise, without biases, which stay as they are.

    These are convolutions, linear layers, ``nn.MultiheadAttention``, LSTMs, and GRUs from 256 units on.

    Example:
        >>> num_weights(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        {'0': 6}
    """
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters(remove_duplicate=False)}
    return {layer: sum(sizes[name] for name in names) for layer, names in _weights(network).items()}


@contextmanager
def rounded(network: nn.Module, layer: str, bits: int) -> Iterator[nn.Module]:
    """Give the network with all weights of a layer rounded, within the context.

    Args:
        network: Holds the layer.
        layer: Its name.
        bits: At least 2.
    """
    weights = [network.get_parameter(name) for name in _weights(network)[layer]]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, values in zip(weights, kept):
            weight.copy_(round_weight(values, bits))
        try:
            yield network
        finally:
            for weight, values in zip(weights, kept):
                weight.copy_(values)


def round_weight(weight: Tensor, bits: int) -> Tensor:
    """Return a weight as it comes back from signed integers, a scale for each output channel.

    A BatchNorm that is folded in later scales whole channels, and so changes nothing in that.

    Args:
        weight: Shape (O, ...).
        bits: At least 2; the scale is found by least squares (Zhang et al. 2018, arXiv:1807.10029).

    Example:
        >>> round_weight(torch.tensor([[-2.0, 1.0, 0.4]]), 2)
        tensor([[-2.,  1.,  0.]])
    """
    half = 2 ** (bits - 1)
    rows = weight.detach().float().flatten(1)
    scale = torch.maximum(rows.amin(1) / -half, rows.amax(1) / (half - 1)).clamp(min=torch.finfo(torch.float32).eps)
    scale = scale[:, None]
    for _ in range(_NUM_ITERATIONS):
        # The best scale for the integers there are, which are the best for the scale before: it never gets worse.
        integers = (rows / scale).round().clamp(-half, half - 1)
        squares = (integers * integers).sum(1, keepdim=True)
        scale = torch.where(squares > 0, (rows * integers).sum(1, keepdim=True) / squares.clamp(min=1), scale)
    return ((rows / scale).round().clamp(-half, half - 1) * scale).to(weight.dtype).view_as(weight)


def _weights(network: nn.Module) -> dict[str, list[str]]:
    """Return the names of each layer's weights."""
    modules = dict(network.named_modules())
    found: dict[str, list[str]] = {}
    for layer, module in modules.items():
        if isinstance(module, _OF_SEVERAL) and not (isinstance(module, nn.GRU) and module.hidden_size < FEWEST_UNITS):
            names = [name for name, _ in module.named_parameters() if "weight" in name]
        elif isinstance(module, _LAYERS) and not isinstance(modules[layer.rpartition(".")[0]], nn.MultiheadAttention):
            names = ["weight"]
        else:
            continue
        found[layer] = [f"{layer}.{name}" if layer else name for name in names]
    return found
