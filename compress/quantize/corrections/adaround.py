"""AdaRound: whether a weight is rounded up or down is learned from what its layer gives, not from the weight alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.fx import Node

from compress.quantize.corrections.channels import used_once
from compress.quantize.corrections.lockstep import Layer, Side, evaluation, float_twin, lockstep, quantized_layers
from compress.surgery import Captured

__all__ = ["adaround", "learn_rounding"]

_STRETCH = (-0.1, 1.1)  # the sigmoid's limits before clipping: it reaches 0 and 1
_WARM = 0.2  # the part of the steps in which nothing pushes towards 0 and 1 yet
_BETA = (20.0, 2.0)
_BATCH = 64
_RELU = {torch.ops.aten.relu.default, torch.ops.aten.relu_.default}

# What leaves a weight's values where they are in memory: what is written to the result is written to the parameter.
_VIEWS = {
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.t.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
}

Layerwise = Callable[[Tensor, Tensor], Tensor]
Pair = tuple[Tensor, Tensor]


def adaround(
    prepared: Captured,
    batches: Sequence[Sequence[Tensor]],
    *,
    reference: Captured | None = None,
    num_steps: int = 400,
    seed: int = 0,
    progress: bool = False,
) -> int:
    """Learn the rounding of each quantised weight, layer after layer, and write the weights back onto their grids.

    Each layer sees the inputs that the quantised layers before it give, and is to give, behind its BatchNorm and ReLU,
    what the float network gives (``learn_rounding``). Scales stay, so conversion finds the integers that were learned.
    A layer whose learned rounding is no better than the nearest keeps that. Layers that share their weight stay.

    Args:
        prepared: A calibrated network; its weights change in place, each by less than one step of its grid.
        batches: Inputs of the network, a tuple of tensors each. All that is still needed of their activations is held.
        reference: The float network, in the same graph; else the prepared one without rounding.
        num_steps: Of Adam, for each layer.
        seed: Of the order in which a layer sees the data.
        progress: Whether to show a progress bar.

    Returns:
        How many layers are rounded otherwise than to the nearest.

    Raises:
        DataError: when there is no data.
    """
    reference = reference or float_twin(prepared)
    layers = {layer.product: layer for layer in quantized_layers(prepared.graph_module)}
    num = 0
    with evaluation(prepared, reference):
        quantized, exact = Side(prepared.graph_module, batches), Side(reference.graph_module, batches)
        places = ((node, twin) for node, twin in lockstep(quantized, exact) if node in layers)
        for node, twin in track(places, "learning to round", len(layers), transient=True, disable=not progress):
            weight = _find_weight(quantized, layers[node])
            if weight is None:
                continue
            compute = _layerwise(quantized, layers[node])
            targets = _outputs(exact, twin, len(_tail(layers[node])))
            integers = learn_rounding(
                weight.values / weight.scale,
                weight.limits,
                weight.scale,
                _joined(quantized.all(_source(node)), targets),
                compute,
                num_steps=num_steps,
                seed=seed,
            )
            num += weight.write(integers)
            quantized.run(node)
    return num


def learn_rounding(
    ratios: Tensor,
    limits: tuple[int, int],
    scale: Tensor,
    data: Sequence[Pair],
    compute: Layerwise,
    *,
    num_steps: int = 400,
    seed: int = 0,
) -> Tensor:
    r"""Choose for each weight the integer below or above it, so that a layer gives what it should.

    .. math:: \min_V E\|y - f(s (\lfloor w / s \rfloor + h(V)), x)\|^2 / E_0 + \lambda \sum (1 - |2 h(V) - 1|^\beta) / n

    with :math:`h` a sigmoid stretched over [-0.1, 1.1] and clipped, :math:`\beta` falling from 20 to 2, and
    :math:`E_0` the error of rounding to the nearest (Nagel et al. 2020, arXiv:2004.10568, equations 21 to 25).

    Args:
        ratios: Weights as multiples of their scale.
        limits: The least and the largest integer.
        scale: Broadcasts with the weights.
        data: Inputs of the layer, shape (N, ...), and what it should give, shape (N, ...): a pair for each length.
        compute: Gives outputs for inputs and a weight.
        num_steps: Of Adam, with 64 of the inputs of one length each.
        seed: Of their order.

    Returns:
        Integers, as floats; those of the nearest rounding where nothing better was found.

    Example:
        >>> x, w = torch.ones(1, 2), torch.tensor([[0.45, 0.4]])  # together 0.85, to the nearest 0
        >>> layer = torch.nn.functional.linear
        >>> learn_rounding(w, (-8, 7), torch.ones(1), [(x, layer(x, w))], layer).tolist()
        [[1.0, 0.0]]
    """
    nearest = ratios.round().clamp(*limits)
    initial = _error(nearest * scale, data, compute)
    if initial == 0:
        return nearest
    low, high = _STRETCH
    floor = ratios.floor()
    rest = (ratios - floor).clamp(1e-3, 1 - 1e-3)
    logits = torch.logit((rest - low) / (high - low)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=2e-2)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for step in range(num_steps):
            up = (torch.sigmoid(logits) * (high - low) + low).clamp(0, 1)
            inputs, targets = _draw(data, generator)
            outputs = compute(inputs, (floor + up).clamp(*limits) * scale)
            loss = (outputs - targets).square().mean() / initial
            done = (step / num_steps - _WARM) / (1 - _WARM)
            if done > 0:
                beta = _BETA[0] + (_BETA[1] - _BETA[0]) * done
                loss = loss + (1 - (2 * up - 1).abs() ** beta).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    learned = (floor + (logits.detach() > 0)).clamp(*limits)
    return learned if _error(learned * scale, data, compute) < initial else nearest


def _joined(inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Pair]:
    """Return batches of one form in one tensor each, that they may be drawn from together."""
    forms: dict[torch.Size, list[Pair]] = {}
    for given, wanted in zip(inputs, targets):
        forms.setdefault(given.shape[1:], []).append((given, wanted))
    return [(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])) for pairs in forms.values()]


def _draw(data: Sequence[Pair], generator: torch.Generator) -> Pair:
    """Return some of the data, each value as likely as any other."""
    number = 0
    if len(data) > 1:
        sizes = torch.tensor([float(targets.numel()) for _, targets in data])
        number = int(torch.multinomial(sizes, 1, generator=generator))
    inputs, targets = data[number]
    chosen = torch.randint(len(inputs), (min(_BATCH, len(inputs)),), generator=generator).to(inputs.device)
    return inputs[chosen], targets[chosen]


def _error(weight: Tensor, data: Sequence[Pair], compute: Layerwise) -> float:
    with torch.no_grad():
        parts = [
            float((compute(some, weight) - wanted).square().sum(dtype=torch.float64))
            for inputs, targets in data
            for some, wanted in zip(inputs.split(_BATCH), targets.split(_BATCH))
        ]
    return sum(parts) / sum(targets.numel() for _, targets in data)


@dataclass(frozen=True)
class _Weight:
    """A weight as its fake quantizer sees it, and the way back to the parameter."""

    parameter: Tensor  # turned or widened as the layer reads it
    factor: Tensor | None  # by which a BatchNorm scales the parameter
    values: Tensor
    scale: Tensor
    limits: tuple[int, int]

    def write(self, integers: Tensor) -> bool:
        """Put the parameter onto the grid, and return whether an integer is not the nearest."""
        moved = integers != (self.values / self.scale).round().clamp(*self.limits)
        values = integers * self.scale
        if self.factor is not None:
            values = torch.where(self.factor == 0, self.parameter, values / self.factor)
        self.parameter.copy_(values)
        return bool(moved.any())


def _find_weight(side: Side, layer: Layer) -> _Weight | None:
    """Return a layer's weight; none where it is shared, or its grid is not one of equal steps a channel."""
    graph_module = side.graph_module
    values = layer.weight.args[0]
    assert isinstance(values, Node)
    is_scaled = values.target is torch.ops.aten.mul.Tensor
    source: Any = values.args[0] if is_scaled else values
    read = source
    while source.target in _VIEWS and len(source.users) == 1:
        source = source.args[0]
    if len(layer.weight.users) > 1 or source.op != "get_attr" or not used_once(graph_module, [str(source.target)]):
        return None
    written, weight = side.constant(read), side.constant(values)
    factor = _factor(side, values.args[1]) if is_scaled else None
    if written.shape != weight.shape:  # the factor of a weight that is none itself
        return None
    module: Any = graph_module.get_submodule(str(layer.weight.target))
    shape = [1] * weight.dim()
    if module.scale.numel() > 1:
        shape[module.ch_axis] = -1
        if module.scale.numel() != weight.shape[module.ch_axis]:
            return None
    if bool((module.zero_point != 0).any()) or hasattr(module, "convert"):  # what has its own grid, as float8
        return None
    limits = (int(module.activation_post_process.quant_min), int(module.activation_post_process.quant_max))
    return _Weight(written, factor, weight, module.scale.view(shape), limits)


def _factor(side: Side, given: Any) -> Tensor:
    return side.constant(given) if isinstance(given, Node) else torch.tensor(float(given))


def _tail(layer: Layer) -> tuple[Node, ...]:
    """Return what follows a product up to its ReLU, if that alone takes its outputs."""
    users = list(layer.last.users)
    return (*layer.behind, users[0]) if len(users) == 1 and users[0].target in _RELU else layer.behind


def _source(product: Node) -> Node:
    source = product.args[0]
    assert isinstance(source, Node)
    return source


def _layerwise(side: Side, layer: Layer) -> Layerwise:
    """Return what computes a layer, with all that belongs to it, from its input and its weight."""
    nodes = (layer.product, *_tail(layer))
    given = {_source(layer.product), layer.weight, *nodes}
    constants = {
        source: side.constant(source) for node in nodes for source in node.all_input_nodes if source not in given
    }

    def compute(inputs: Tensor, weight: Tensor) -> Tensor:
        values = {**constants, _source(layer.product): inputs, layer.weight: weight}
        for node in nodes:
            values[node] = side.compute(node, values.__getitem__)
        return values[nodes[-1]]

    return compute


def _outputs(side: Side, product: Node, num_behind: int) -> list[Tensor]:
    """Return what the float layer gives for each batch, behind so many operators that follow its product."""
    values, node = [value.clone() for value in side.all(product)], product
    for _ in range(num_behind):
        before, node = node, next(iter(node.users))
        constants = {source: side.constant(source) for source in node.all_input_nodes if source is not before}
        values = [side.compute(node, {**constants, before: value}.__getitem__) for value in values]
    return values
