"""How much a network loses with the least important units of each layer silent, one layer at a time.

Nothing is planned or rebuilt for a point of a curve: the units' slices are set to zero where they stand, the network
is judged, and the slices get their values back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.measure.modes import kept_modes
from compress.prune.anatomy import Anatomy
from compress.prune.planner import least
from compress.prune.removal import DIRECTIONS

__all__ = ["RATIOS", "divergence", "judging", "measure_sensitivity", "num_silent", "silenced"]

RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9)

Value = TypeVar("Value")


def measure_sensitivity(
    anatomy: Anatomy,
    scores: Mapping[str, Tensor],
    loss: Callable[[nn.Module], Value],
    *,
    ratios: Sequence[float] = RATIOS,
    done: Mapping[str, Sequence[Sequence[Any]]] | None = None,
    on_point: Callable[[str, float, Value], None] | None = None,
) -> dict[str, list[list[Any]]]:
    """Return the curve of each group: what ``loss`` says with its least important units silent, all else untouched.

    Args:
        anatomy: The network; its weights are changed in place for each point and restored.
        scores: Shape (units,) for each group to measure; the lowest are silenced first.
        loss: Judges the network, lower is better. It must neither change the network nor depend on anything but its
            weights, as what ``divergence`` returns.
        ratios: Fractions of each group's units to silence.
        done: Points of an earlier call, which are not measured again.
        on_point: Called with the group, the ratio and the value of each point just measured; the first call, for
            ratio 0, is the network as it is, under the name of the first group.

    Returns:
        ``{group: [[ratio, value], ...]}``, ratios ascending from 0, the value of the network as it is. Units are
        whole: a ratio is that which is reached, so that 0.25 of 3 units is 1/3, and ratios that mean the same units
        are one point.

    Example:
        >>> from compress.prune.anatomy import study
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> net.load_state_dict({"0.weight": torch.tensor([[1.0], [2.0]]), "1.weight": torch.ones(1, 2)})
        <All keys matched successfully>
        >>> away = lambda net: 3 - net(torch.ones(1, 1)).item()
        >>> measure_sensitivity(study(net, [torch.ones(2, 1)]), {"0": torch.tensor([1.0, 2.0])}, away, ratios=[0.5])
        {'0': [[0.0, 0.0], [0.5, 1.0]]}
    """
    known = {
        name: {round(ratio * len(scores[name])): value for ratio, value in curve}
        for name, curve in (done or {}).items()
        if name in scores
    }
    baseline = next((values[0] for values in known.values() if 0 in values), None)
    if baseline is None and scores:
        baseline = _value(anatomy.network, loss)
        if on_point is not None:
            on_point(next(iter(scores)), 0.0, baseline)
    curves: dict[str, list[list[Any]]] = {}
    for name, score in scores.items():
        width = len(score)
        curves[name] = [[0.0, baseline]]
        for num in sorted({num_silent(width, ratio) for ratio in ratios} - {0}):
            if num in known.get(name, {}):
                value = known[name][num]
            else:
                with silenced(anatomy, least({name: score}, {name: width - num})):
                    value = _value(anatomy.network, loss)
                if on_point is not None:
                    on_point(name, num / width, value)
            curves[name].append([num / width, value])
    return curves


def num_silent(width: int, ratio: float) -> int:
    """Return how many of a group's units a ratio means: the nearest number that leaves one.

    Example:
        >>> num_silent(8, 0.25), num_silent(3, 0.9), num_silent(3, 0.1)
        (2, 2, 0)
    """
    return min(width - 1, round(width * ratio))


@contextmanager
def silenced(anatomy: Anatomy, gone: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Give the network with some units at zero: what computes them, their biases and norms, and what reads them.

    That is the network without them, except where an operator runs over the units themselves: a ``LayerNorm`` over a
    transformer's channels still counts the silent ones.

    Args:
        anatomy: The network; its slices are zero within the context and what they were after it.
        gone: ``{group name: indices of units}``.
    """
    network = anatomy.network
    tensors = dict([*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)])
    kept: list[tuple[Tensor, int, Tensor, Tensor]] = []
    with torch.no_grad():
        try:
            for name, units in gone.items():
                for (tensor_name, dim), indices in anatomy.groups[name].slots.items():
                    tensor = tensors.get(tensor_name)
                    if tensor is None or not tensor.is_floating_point():
                        continue
                    if dim == 0 and tensor_name.endswith(DIRECTIONS):
                        continue
                    slices = indices[units].flatten().unique().to(tensor.device)
                    kept.append((tensor, dim, slices, tensor.index_select(dim, slices)))
                    tensor.index_fill_(dim, slices, 0.0)
            yield network
        finally:
            for tensor, dim, slices, values in reversed(kept):  # a tensor that has two names is kept twice
                tensor.index_copy_(dim, slices, values)


def divergence(network: nn.Module, batches: Sequence[Sequence[Tensor]]) -> Callable[[nn.Module], float]:
    r"""Return a loss that needs no labels: how far a changed network's outputs are from what they are now.

    .. math:: \operatorname{mean}_i KL(p_i \| q_i) \quad\text{or}\quad \sum (x - y)^2 / \sum x^2

    The first for outputs of shape (N, classes), taken for logits; the second for any other. A network with several
    outputs gets their sum. Both networks run in eval mode, so that BatchNorm's statistics stay, and random states are
    put back.

    Args:
        network: Its outputs, as it is now, are what is compared with.
        batches: Inputs by position, one sequence of tensors for each batch.

    Returns:
        A function from a network to a number, 0 for the same outputs.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> away = divergence(net, [[torch.ones(4, 2)]])
        >>> away(net)
        0.0
        >>> _ = nn.init.zeros_(net.weight)
        >>> away(net) > 0
        True
    """
    expected = _outputs(network, batches)

    def loss(changed: nn.Module) -> float:
        return sum(_distance(x, y) for x, y in zip(zip(*expected), zip(*_outputs(changed, batches))))

    return loss


@contextmanager
def judging(network: nn.Module) -> Iterator[None]:
    """Hold a network in eval mode, without gradients; its modes and buffers and the random states stay as they are."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]  # a captured graph counts batches in eval, too
    devices = {tensor.device.index or 0 for tensor in network.parameters() if tensor.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)), kept_modes(network, training=False):
        try:
            yield
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)


def _value(network: nn.Module, loss: Callable[[nn.Module], Value]) -> Value:
    with torch.no_grad():
        return loss(network)


def _outputs(network: nn.Module, batches: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    with judging(network):
        return [_tensors(network(*inputs)) for inputs in batches]


def _distance(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Return how far one output is from what it was, over all batches."""
    if expected[0].dim() == 2 and expected[0].shape[1] > 1:
        p, q = (torch.cat([*tensors]).double().log_softmax(1) for tensors in (expected, got))
        return float(F.kl_div(q, p, reduction="batchmean", log_target=True))
    x, y = (torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (expected, got))
    return float((x - y).square().sum() / x.square().sum().clamp(min=torch.finfo(torch.float32).tiny))


def _tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors of an output that hold numbers, on the CPU: not every accelerator has float64."""
    if isinstance(outputs, Tensor):
        return [outputs.cpu()] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return [tensor for value in outputs for tensor in _tensors(value)] if isinstance(outputs, list | tuple) else []
