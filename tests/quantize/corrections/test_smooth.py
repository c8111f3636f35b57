from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import DataError
from compress.quantize import calibrate, convert, prepare
from compress.quantize.corrections.smooth import smooth
from compress.surgery import capture


class Scaled(nn.Module):
    """RMSNorm as models of language write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """A transformer's block, norms first; one channel of each norm is an outlier."""

    def __init__(self, second: Any, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), second
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 32), nn.Linear(32, width)
        with torch.no_grad():
            self.first.weight[3], self.first.bias[3] = 60.0, 5.0
            self.second.weight[5] = 60.0
            for layer in (self.query, self.key, self.value):
                layer.weight[:, 3] /= 60
            self.up.weight[:, 5] /= 60

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = (layer(h).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.output(attended)
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


@pytest.mark.parametrize("second", [nn.LayerNorm(16), nn.RMSNorm(16), Scaled(16)])
def test_the_function_stays_and_int8_gets_better(second: nn.Module) -> None:
    torch.manual_seed(0)
    network, x = Block(second).eval(), torch.randn(32, 6, 16)
    smoothed = copy.deepcopy(network)
    assert smooth(capture(smoothed, [x[:2]]), [(x[:20],), (x[20:],)]) == 2
    with torch.no_grad():
        expected = network(x)
        assert float((smoothed(x) - expected).abs().max()) < 1e-5 * float(expected.abs().max())

    def error(network: nn.Module) -> float:
        prepared = prepare(network, [x[:2]], "int8")
        calibrate(prepared, [(x,)], ranges="minmax")
        with torch.no_grad():
            return float((convert(prepared)(x) - expected).norm() / expected.norm())

    assert error(smoothed) < 0.5 * error(network)


def test_by_hand() -> None:
    network: Any = nn.Sequential(nn.RMSNorm(2), nn.Linear(2, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([8.0, 1.0]))
        network[1].weight.copy_(torch.tensor([[2.0, -4.0]]))
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])  # normalised already: activations reach 8 and 1
    assert smooth(capture(network, [x]), [(x[:1],), (x[1:],)]) == 1
    # Factors: sqrt(8 / 2) = 2 and sqrt(1 / 4) = 1/2.
    assert torch.allclose(network[0].weight, torch.tensor([4.0, 2.0]))
    assert torch.allclose(network[1].weight, torch.tensor([[4.0, -2.0]]))


class Post(nn.Module):
    """Norms last, as in BERT: a residual sum reads the norm, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.linear(x)


@pytest.mark.parametrize(
    "network", [Post(), nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 4)), nn.Linear(4, 4)]
)
def test_what_cannot_be_smoothed_is_left_alone(network: nn.Module) -> None:
    before = copy.deepcopy(network.state_dict())
    assert smooth(capture(network, [torch.randn(2, 4)]), [(torch.randn(2, 4),)]) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "smooth: expected at least one batch, got none"),
        ([(torch.tensor([[1.0, math.nan]]),)], "smooth: expected finite activations"),
    ],
)
def test_bad_data_is_refused_and_changes_nothing(batches: list[tuple[Tensor, ...]], message: str) -> None:
    network: Any = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(DataError, match=message):
        smooth(capture(network, [torch.randn(2, 2)]), batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_channel_without_activations_or_weights_keeps_its_scale() -> None:
    network: Any = nn.Sequential(nn.RMSNorm(3), nn.Linear(3, 2))
    with torch.no_grad():
        network[0].weight[0] = 0
        network[1].weight[:, 1] = 0
    before, x = copy.deepcopy(network), torch.randn(8, 3)
    smooth(capture(network, [x]), [(x,)])
    assert torch.equal(network[1].weight[:, :2], before[1].weight[:, :2])
    assert torch.allclose(network(x), before(x), atol=1e-6)
