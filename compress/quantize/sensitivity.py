"""What a network loses with the weights of one layer at few bits, all else untouched.

Weights are rounded where they stand, the network is judged, and the weights get their values back, bit for bit. In a
graph they stand where they are multiplied by, whatever code has computed them and from which parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn.utils.parametrize import is_parametrized

from compress.measure.modes import kept_modes
from compress.quantize.graph.annotate import FEWEST_UNITS, layer_of, products, weights_of
from compress.quantize.graph.normalize import constant_of, normalize, parameters_alone
from compress.surgery import Captured, capture
from compress.surgery.lengths import Length

__all__ = ["BITS", "capture_layers", "measure_bits", "num_weights", "round_weight", "rounded"]

BITS = (8, 4, 2)

Value = TypeVar("Value")

_NUM_ITERATIONS = 30
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OF_SEVERAL = (nn.MultiheadAttention, nn.LSTM, nn.GRU)
"""Layers with several weights, which have one name where schemes are given to layers."""


def capture_layers(network: nn.Module, inputs: Sequence[Tensor], *, lengths: Sequence[Length] = ()) -> Captured:
    """Return a network as a graph in which all layers are found that schemes are given to, however they are written.

    Args:
        network: Its parameters are shared, not copied.
        inputs: Example inputs, at least two samples each.
        lengths: Sizes beyond the batch that vary.

    Raises:
        CaptureError: when the network cannot be captured.
    """
    captured = capture(network, inputs, lengths=lengths)
    normalize(captured.graph_module)
    return captured


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
        network: As it is or from ``capture_layers``; its weights are changed in place for each point and restored.
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

    These are convolutions, linear layers, ``nn.MultiheadAttention``, LSTMs, and GRUs from 256 units on. A graph has
    them by the names that schemes are given by, and with them all other products with parameters.

    Example:
        >>> num_weights(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        {'0': 6}
    """
    if isinstance(network, Captured):
        layers = _products(network.graph_module).items()
        # A layer that is called twice computes a weight twice, and has it once.
        nodes = {layer: {_formula(weight): weight for _, weight in factors} for layer, factors in layers}
        return {layer: sum(node.meta["val"].numel() for node in own.values()) for layer, own in nodes.items()}
    return {layer: sum(_value(*weight).numel() for weight in own) for layer, own in _weights(network).items()}


@contextmanager
def rounded(network: nn.Module, layer: str, bits: int) -> Iterator[nn.Module]:
    """Give the network with all weights of a layer rounded, within the context.

    Args:
        network: Holds the layer.
        layer: Its name.
        bits: At least 2.
    """
    with torch.no_grad(), ExitStack() as stack:
        if isinstance(network, Captured):
            stack.enter_context(_rounded_factors(network.graph_module, layer, bits))
        else:
            for owner, name in _weights(network)[layer]:
                stack.enter_context(_rounded_weight(owner, name, bits))
        yield network


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


def _products(graph_module: GraphModule) -> dict[str, list[tuple[Node, Node]]]:
    """Return each layer's products, with what they multiply by that follows from parameters alone."""
    fixed = parameters_alone(graph_module)
    found: dict[str, list[tuple[Node, Node]]] = {}
    for node in products(graph_module):
        factors = [(node, weight) for weight in weights_of(node) if weight in fixed]
        if factors:
            found.setdefault(layer_of(node), []).extend(factors)
    return found


def _formula(node: Node) -> str:
    """Return how a weight is computed, in words that are the same wherever it is computed."""
    if node.op == "get_attr":
        return str(node.target)
    return f"{node.target}{map_arg((node.args, node.kwargs), _formula)}"


@contextmanager
def _rounded_factors(graph_module: GraphModule, layer: str, bits: int) -> Iterator[None]:
    """Let a layer's products multiply by rounded weights; another layer's products with the same weights do not."""
    stand_ins: list[tuple[Node, Node, Node]] = []
    for number, (node, weight) in enumerate(_products(graph_module)[layer]):
        values = round_weight(constant_of(graph_module, weight), bits)
        graph_module.register_buffer(f"rounded_{number}", values)
        with graph_module.graph.inserting_before(node):
            stand_in = graph_module.graph.get_attr(f"rounded_{number}")
        node.replace_input_with(weight, stand_in)
        stand_ins.append((node, weight, stand_in))
    graph_module.recompile()
    try:
        yield
    finally:
        for node, weight, stand_in in stand_ins:
            node.replace_input_with(stand_in, weight)
            graph_module.graph.erase_node(stand_in)
            delattr(graph_module, str(stand_in.target))
        graph_module.recompile()


def _weights(network: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return each layer's weights: the module that has it, and its name there."""
    modules = dict(network.named_modules())
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    for layer, module in modules.items():
        if isinstance(module, _OF_SEVERAL) and not (isinstance(module, nn.GRU) and module.hidden_size < FEWEST_UNITS):
            parts = [module, module.out_proj] if isinstance(module, nn.MultiheadAttention) else [module]
            own = [(part, name) for part in parts for name in _names(part) if "weight" in name]
        elif isinstance(module, _LAYERS) and not isinstance(modules[layer.rpartition(".")[0]], nn.MultiheadAttention):
            own = [(module, name) for name in _names(module) if name == "weight"]
        else:
            continue
        if own:  # not where a hook computes the weight before each call
            found[layer] = own
    return found


def _names(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters, and of what parametrizations compute."""
    parametrized: Any = getattr(module, "parametrizations", {})
    return [*dict(module.named_parameters(recurse=False)), *parametrized]


def _value(owner: nn.Module, name: str) -> Tensor:
    """Return a weight as it is in evaluation: in training, spectral norms change when they are asked."""
    with kept_modes(owner, training=False), torch.no_grad():
        weight: Tensor = getattr(owner, name)
        return weight


@contextmanager
def _rounded_weight(owner: nn.Module, name: str, bits: int) -> Iterator[None]:
    """Let a module have a rounded weight; what parametrizations have computed is rounded behind the last of them."""
    weight = _value(owner, name)
    values = weight.clone()
    if is_parametrized(owner, name):
        parametrizations: Any = owner.parametrizations
        chain = parametrizations[name]
        chain.append(_Given(round_weight(values, bits)))
        try:
            yield
        finally:
            del chain[-1]
        return
    weight.copy_(round_weight(values, bits))
    try:
        yield
    finally:
        weight.copy_(values)


class _Given(nn.Module):
    """A parametrization whose result is known."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, _: Tensor) -> Tensor:
        return self.values
