from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.quantize.corrections.equalize import equalize
from compress.surgery import capture
from tests.networks import Residual, images


def spread(network: nn.Module, *, seed: int = 0) -> None:
    """Give channels ranges that differ by factors of a hundred, and BatchNorms unusual statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                factors = 10 ** (2 * torch.rand(len(module.weight), generator=generator) - 1)
                module.weight.mul_(factors.view(-1, *[1] * (module.weight.dim() - 1)))
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.1, 3, generator=generator).mul_(
                    torch.tensor([1.0, -1.0]).repeat(99)[: module.num_features]
                )
                module.bias.uniform_(-1, 1, generator=generator)
                module.running_mean, module.running_var = torch.rand(2, module.num_features, generator=generator) + 0.3


def folded(layer: Any, norm: Any) -> Tensor:
    """Return the magnitudes of a convolution's weight as its BatchNorm scales them."""
    factors = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (layer.weight * factors.view(-1, 1, 1, 1)).abs()


def equalized(network: Any, x: Tensor) -> tuple[Any, int]:
    """Equalise a copy and see that its function is the same."""
    spread(network.eval())
    twin = copy.deepcopy(network)
    num = equalize(capture(twin, [x[:2]]))
    with torch.no_grad():
        expected, got = network(x), twin(x)
    assert float((expected - got).abs().max()) < 1e-5 * float(expected.abs().max())
    return twin, num


def test_two_linear_layers_by_hand() -> None:
    network: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[16.0, -2.0], [1.0, 0.5]]))
        network[0].bias.copy_(torch.tensor([8.0, 1.0]))
        network[2].weight.copy_(torch.tensor([[-1.0, 4.0]]))
    assert equalize(capture(network, [torch.ones(2, 2)])) == 1
    # r = (16, 1) and (1, 4): factors 4 and 1/2, after which both layers have ranges 4 and 2.
    assert torch.allclose(network[0].weight, torch.tensor([[4.0, -0.5], [2.0, 1.0]]))
    assert torch.allclose(network[0].bias, torch.tensor([2.0, 2.0]))
    assert torch.allclose(network[2].weight, torch.tensor([[-4.0, 2.0]]))


class Mobile(nn.Sequential):
    """A chain over a depthwise and a grouped convolution, a BatchNorm, pooling and flattening."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8, eps=1e-3),
            nn.LeakyReLU(0.1),
            nn.Conv2d(8, 6, 1, groups=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(6 * 16, 5),
            nn.ReLU(),
            nn.Linear(5, 3),
        )


def test_a_chain_keeps_its_function_and_has_its_channels_equal() -> None:
    torch.manual_seed(0)
    network, num = equalized(Mobile(), images(16)[0])
    assert num == 4
    first, grouped = network[0].weight.abs(), network[5].weight.abs()
    depthwise = folded(network[2], network[3])
    made = [first.amax((1, 2, 3)), depthwise.amax((1, 2, 3)), grouped.amax((1, 2, 3)), network[10].weight.abs().amax(1)]
    read = [
        depthwise.amax((1, 2, 3)),
        grouped.view(2, 3, 4).amax(1).flatten(),
        network[10].weight.abs().view(5, 6, 16).amax((0, 2)),
        network[12].weight.abs().amax(0),
    ]
    for number, (one, other) in enumerate(zip(made, read)):
        assert torch.allclose(one, other, rtol=5e-3), number


def test_a_residual_sum_is_no_place_and_a_branch_inside_is() -> None:
    torch.manual_seed(0)
    network, num = equalized(Residual(), images(16)[0])
    assert num == 1
    made = folded(network.conv1, network.norm1).amax((1, 2, 3))
    assert torch.allclose(made, folded(network.conv2, network.norm2).amax((0, 2, 3)), rtol=2e-3)


class Branches(nn.Module):
    """One layer whose channels two others read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        return torch.cat([self.two(x), self.three(x)], 1)


def test_all_readers_get_the_factor() -> None:
    torch.manual_seed(0)
    network, num = equalized(Branches(), torch.randn(16, 4))
    assert num == 1
    read = torch.cat([network.two.weight, network.three.weight]).abs().amax(0)
    assert torch.allclose(network.one.weight.abs().amax(1), read, rtol=2e-3)


class Twice(nn.Module):
    """A layer that is its own reader."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.one(x).relu())


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(4, 4), nn.ReLU6(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)),
        Twice(),
    ],
)
def test_what_passes_no_factor_is_left_alone(network: nn.Module) -> None:
    before = copy.deepcopy(network.state_dict())
    assert equalize(capture(network, [torch.randn(2, 4)])) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_channels_that_are_nothing_stay_finite_and_as_they_are() -> None:
    network: Any = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        network[0].weight[0] = 0
        network[2].weight[:, 1] = 0
    before = copy.deepcopy(network)
    equalize(capture(network, [torch.randn(2, 3)]))
    assert torch.equal(network[0].bias[:2], before[0].bias[:2])
    assert torch.equal(network[2].weight[:, :2], before[2].weight[:, :2])
    assert not torch.equal(network[0].weight[2], before[0].weight[2])
    x = torch.randn(8, 3)
    assert torch.allclose(network(x), before(x), atol=1e-6)
