"""What a network would cost at some widths, and what one really costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from compress.measure.cost import macs, num_params
from compress.prune.allocation.latency import LatencyCost
from compress.prune.allocation.sizes import Sizes
from compress.prune.allocation.targets import Target
from compress.prune.allocation.work import list_work, volume
from compress.prune.anatomy import Anatomy

__all__ = ["Cost", "Estimator", "MacsCost", "StorageCost", "make_cost", "num_weight_bytes"]


class Estimator(Protocol):
    """What says of widths alone what they cost."""

    def estimate(self, widths: Mapping[str, int]) -> float:
        """Return what the network would cost at some widths of its groups; those not named stay."""


class Cost(Estimator, Protocol):
    """A currency."""

    def measure(self, network: nn.Module, inputs: Sequence[Tensor]) -> float:
        """Return what a network costs."""


def make_cost(anatomy: Anatomy, target: Target) -> Cost:
    """Return the currency of a target for a network.

    Args:
        anatomy: The network.
        target: Says which currency, and the engine of a latency.
    """
    if target.currency == "macs":
        return MacsCost(anatomy)
    if target.currency in ("params", "bytes"):
        return StorageCost(anatomy, target.currency)
    return LatencyCost(anatomy, target)


class StorageCost:
    """Parameters, or the bytes of the weights in float32; estimates are exact.

    Args:
        anatomy: The network.
        currency: ``"params"`` or ``"bytes"``.
    """

    def __init__(self, anatomy: Anatomy, currency: str) -> None:
        self._count = {"params": num_params, "bytes": num_weight_bytes}[currency]
        self._sizes = Sizes(anatomy)
        graph = anatomy.graph
        stored = dict(graph.named_parameters() if currency == "params" else graph.state_dict(keep_vars=True))
        each = 1 if currency == "params" else 4
        self._extents = {
            name: self._sizes.tensor(name, tuple(stored[name].shape))
            for name in anatomy.coupling.labels.tensors
            if name in stored
        }
        self._each = each
        # What the graph does not read, and what has no dimension to lose, stays.
        nothing = self._sizes.removed({})
        self._rest = self._count(anatomy.network) - each * self._volume(nothing)

    def estimate(self, widths: Mapping[str, int]) -> float:
        """Return the count at some widths."""
        return self._rest + self._each * self._volume(self._sizes.removed(widths))

    def measure(self, network: nn.Module, inputs: Sequence[Tensor]) -> float:
        """Count."""
        return float(self._count(network))

    def _volume(self, removed: Mapping[str, int]) -> float:
        return sum(volume(extents, removed) for extents in self._extents.values())


class MacsCost:
    """Multiply-accumulates of one sample, as ``compress.measure.macs`` counts them.

    Estimates are exact for convolutions, linear and recurrent layers and attention whose units lie in whole slices;
    products in Einstein's notation with three factors or more are left out of them.

    Args:
        anatomy: The network.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._sizes = Sizes(anatomy)
        self._work = list_work(anatomy, self._sizes)
        self._batch = len(anatomy.inputs[0])

    def estimate(self, widths: Mapping[str, int]) -> float:
        """Return the count at some widths."""
        removed = self._sizes.removed(widths)
        return sum(work.macs(removed) for work in self._work) / self._batch

    def measure(self, network: nn.Module, inputs: Sequence[Tensor]) -> float:
        """Count."""
        return macs(network, inputs) / len(inputs[0])


def num_weight_bytes(network: nn.Module) -> int:
    """Return the size of a network's weights in float32, shared ones once; integers, as counters, are not weights.

    Example:
        >>> num_weight_bytes(nn.BatchNorm1d(3))
        48
    """
    tensors = {id(tensor): tensor for tensor in network.state_dict(keep_vars=True).values()}
    return sum(4 * tensor.numel() for tensor in tensors.values() if torch.is_floating_point(tensor))
