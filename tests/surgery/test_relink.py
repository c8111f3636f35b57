from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compress.surgery.relink import relink_optimizer
from compress.surgery.slicing import apply_slices


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)])
def test_moments_are_sliced_and_weights_move(make: object) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(network.parameters(), lr=0.1)  # type: ignore[operator]
    network(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    before = dict(network.named_parameters())
    moments = {name: dict(optimizer.state[parameter]) for name, parameter in before.items()}
    slices = {"0.weight": {"0": [0, 2]}, "0.bias": {"0": [0, 2]}, "1.weight": {"1": [0, 2]}}
    apply_slices(network, slices, {"0": {"out_features": 2}, "1": {"in_features": 2}})
    after = dict(network.named_parameters())
    group = optimizer.param_groups[0]
    relink_optimizer(optimizer, before, after, slices)
    assert optimizer.param_groups[0] is group
    assert [id(p) for p in group["params"]] == [id(p) for p in after.values()]
    assert set(optimizer.state) == set(after.values())
    for key, value in moments["1.weight"].items():
        new = optimizer.state[after["1.weight"]][key]
        assert torch.equal(new, value[:, [0, 2]] if value.dim() == 2 else value)
    old = {name: parameter.detach().clone() for name, parameter in after.items()}
    optimizer.zero_grad()
    network(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(old[name], parameter) for name, parameter in after.items())


def test_groups_keep_their_members() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    first, second = network[0], network[1]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    groups: list[dict[str, Any]] = [
        {"params": [first.weight, second.weight], "weight_decay": 0.1},
        {"params": [first.bias, second.bias]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    before = dict(network.named_parameters())
    apply_slices(network, {"0.bias": {"0": [0, 1, 2, 3]}, "1.weight": {"0": [1]}, "1.bias": {"0": [1]}}, {})
    relink_optimizer(optimizer, before, dict(network.named_parameters()), {})  # type: ignore[arg-type]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(network[0].weight), id(network[1].weight)]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(network[0].bias), id(network[1].bias)]
