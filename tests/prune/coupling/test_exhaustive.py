"""Random small networks: our units are those that zeroing everything in turn finds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.prune.coupling import find_coupling


class Random(nn.Module):
    """Steps of a recipe, each on the features so far; additive ones only, so that zeroing tells who reads whom."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList()
        width = 4
        self.stem = nn.Conv2d(2, width, 1)
        for kind, size in steps:
            self.layers.append(self._layer(kind, width, size))
            width = self._width(kind, width, size)
        self.head = nn.Linear(width, 2)

    @staticmethod
    def _layer(kind: str, width: int, size: int) -> nn.Module:
        if kind in ("conv", "wide"):
            return nn.Conv2d(width, size, 3, padding=1)
        if kind == "residual":
            return nn.Sequential(nn.Conv2d(width, size, 1), nn.ReLU(), nn.Conv2d(size, width, 1))
        if kind == "depthwise":
            return nn.Conv2d(width, width, 3, padding=1, groups=width)
        if kind == "grouped" and width % 2 == 0:
            return nn.Conv2d(width, width, 1, groups=2)
        if kind == "split":
            return nn.Conv2d(width - width // 2, width - width // 2, 1)
        if kind == "norm":
            return nn.BatchNorm2d(width)
        return nn.Identity()

    @staticmethod
    def _width(kind: str, width: int, size: int) -> int:
        return size if kind in ("conv", "wide") else 2 * width if kind == "dense" else width

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for (kind, _), layer in zip(self.steps, self.layers):
            if kind == "residual":
                x = x + layer(x)
            elif kind == "split":
                first, second = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
                x = torch.cat([first, layer(second)], 1)
            elif kind == "dense":
                x = torch.cat([x, x.flip(3)], 1)
            elif kind == "shuffle" and x.shape[1] % 2 == 0:
                num, channels, height, width = x.shape
                x = x.reshape(num, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)
            else:
                x = layer(x)
        return self.head(x.mean((2, 3)))


KINDS = ["conv", "wide", "residual", "depthwise", "grouped", "split", "norm", "dense", "shuffle"]


@given(
    steps=st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([2, 4, 6])), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
@example(steps=[("conv", 2), ("split", 2), ("grouped", 2)], seed=0)
@example(steps=[("conv", 2), ("conv", 2), ("conv", 2), ("conv", 4), ("depthwise", 2)], seed=0)
@example(steps=[("conv", 2), ("split", 2), ("residual", 2)], seed=0)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_units_are_what_exhaustive_zeroing_finds(steps: list[tuple[str, int]], seed: int) -> None:
    torch.manual_seed(seed)
    network = Random(steps).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():  # no unit is silent, none cancels another
            parameter.copy_(torch.rand_like(parameter) * 0.9 + 0.1)
    x = torch.rand(2, 2, 4, 4, dtype=torch.float64) + 0.1
    coupling = find_coupling(network, (x,))
    for group in coupling.groups:
        for unit in range(group.width):
            slices = {slot: indices[unit] for slot, indices in group.slots.items()}
            makers = {slot: indices for slot, indices in slices.items() if _makes(network, *slot)}
            readers = {slot: indices for slot, indices in slices.items() if slot not in makers and slot[1] == 1}
            assert makers, f"{group.name}: a unit without a layer that makes it"
            assert readers, f"{group.name}: a unit that nobody reads"
            # With all that make it at zero, what reads it does not count.
            assert not _counts(network, x, makers, readers), f"{group.name}: read although it is zero"
            # With one of its layers left, it does: nothing is in the unit without need. Layers that only pass on what
            # they are given are left with it.
            passing = {slot: i for slot, i in makers.items() if _passes_on(network, slot[0])}
            for layer in {slot[0].rpartition(".")[0] for slot in makers}:
                others = {slot: i for slot, i in makers.items() if slot[0].rpartition(".")[0] != layer}
                fewer = {slot: i for slot, i in others.items() if slot not in passing}
                assert _counts(network, x, fewer, {**readers, **passing}), f"{group.name}: {layer} need not be in it"
    # Nothing that could go is left out: what makes features is in a unit, or it is the output.
    pruned = {(name, dim) for group in coupling.groups for name, dim in group.slots}
    kept = {(name, dim): group.reason for group in coupling.protected for name, dim in group.slots}
    whole = [slot for slot, reason in kept.items() if "it is all that" in str(reason)]  # of a part of a tensor
    for name, parameter in network.named_parameters():
        if parameter.dim() == 4 and len(parameter) > 1 and (name, 0) not in pruned and (name, 0) not in whole:
            # What passes on a part that must stay has to stay with it, and so does what is added to one.
            assert _passes_on(network, name) or "no counterpart" in str(kept[name, 0]), name
            assert any(slot[1] == 0 for slot in whole), name


def _makes(network: nn.Module, name: str, dim: int) -> bool:
    """Say whether a slice makes features: the outputs of a layer, the scale and shift of a norm."""
    return dim == 0 and not name.endswith(("running_mean", "running_var"))


def _passes_on(network: nn.Module, name: str) -> bool:
    layer = network.get_submodule(name.rpartition(".")[0])
    return isinstance(layer, nn.BatchNorm2d) or (isinstance(layer, nn.Conv2d) and layer.groups > 1)


def _zero(network: nn.Module, slices: dict[tuple[str, int], Tensor]) -> nn.Module:
    twin = copy.deepcopy(network)
    tensors = dict(twin.named_parameters())
    with torch.no_grad():
        for (name, dim), indices in slices.items():
            tensors[name].index_fill_(dim, indices, 0.0)
    return twin


def _counts(network: nn.Module, x: Tensor, zeroed: dict[Any, Tensor], readers: dict[Any, Tensor]) -> bool:
    """Say whether the output depends on what the readers read."""
    with torch.no_grad():
        without, with_readers = (_zero(network, slices)(x) for slices in (zeroed, {**zeroed, **readers}))
        return not torch.allclose(without, with_readers, rtol=1e-13, atol=1e-12)  # a bias is little beside deep sums
