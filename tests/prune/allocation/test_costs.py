"""Estimates are what networks really cost after removal."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn

from compress.measure import macs, num_params
from compress.prune import apply_removal, describe_removal, study
from compress.prune.allocation import Target, make_cost
from compress.prune.allocation.costs import num_weight_bytes
from tests.prune.coupling.networks import NETWORKS

TARGETS = {"params": Target(params=0.5), "bytes": Target(bytes=0.5), "macs": Target(macs=0.5)}


@pytest.mark.parametrize("name", NETWORKS)
def test_estimates_are_exact(name: str) -> None:
    make, x = NETWORKS[name]
    torch.manual_seed(0)
    network: Any = make()  # type: ignore[operator]
    if x.is_floating_point():
        network = network.to(x.dtype)
    anatomy = study(network, [x])
    costs = {currency: make_cost(anatomy, target) for currency, target in TARGETS.items()}
    assert costs["params"].estimate({}) == num_params(network)
    assert costs["bytes"].estimate({}) == num_weight_bytes(network)
    assert costs["macs"].estimate({}) == macs(network, [x]) / len(x)
    draw = random.Random(0)
    for _ in range(2):
        widths = {name: draw.randint(1, width) for name, width in anatomy.widths.items()}
        gone = {name: torch.arange(anatomy.widths[name] - kept) for name, kept in widths.items()}
        data = describe_removal(anatomy, gone)
        pruned: nn.Module = copy.deepcopy(network)
        pruned = pruned if data is None else apply_removal(pruned, data)
        for currency, cost in costs.items():
            assert cost.estimate(widths) == pytest.approx(cost.measure(pruned, [x]), rel=1e-9), currency
