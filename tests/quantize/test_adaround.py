from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import DataError
from compress.quantize import calibrate, convert, prepare
from compress.quantize.adaround import adaround, learn_rounding
from compress.quantize.lockstep import float_twin
from compress.surgery import Captured
from tests.networks import Residual, images


def calibrated(network: nn.Module, x: Tensor, *, limit: int = 127) -> Captured:
    """Return a calibrated network, its weights on a coarser grid if asked: that of fewer bits."""
    prepared = prepare(network.eval(), [x[:2]], "int8")
    calibrate(prepared, [(x,)], ranges="minmax")
    for module in weights(prepared):
        observer = module.activation_post_process
        observer.min_val.mul_(127 / limit)
        observer.max_val.mul_(127 / limit)
    with torch.no_grad():
        prepared.eval()(x[:2])  # makes scales of the ranges
    return prepared


def weights(prepared: Captured) -> list[Any]:
    return [module for module in prepared.graph_module.modules() if getattr(module, "is_per_channel", False)]


def test_never_worse_than_the_nearest_and_among_the_best_of_all_roundings() -> None:
    layer, gains = nn.functional.linear, []
    for seed in range(4):
        torch.manual_seed(seed)
        w, x = 3 * torch.rand(1, 6) - 1.5, torch.randn(40, 6) @ torch.randn(6, 6)

        def error(integers: Tensor, w: Tensor = w, x: Tensor = x) -> float:
            return float((layer(x, integers) - layer(x, w)).square().mean())

        got = learn_rounding(w, (-8, 7), torch.ones(1), x, layer(x, w), layer, num_steps=200)
        every = [error(w.floor() + torch.tensor([[n >> i & 1 for i in range(6)]])) for n in range(64)]
        assert sorted(every).index(error(got)) < 8
        gains.append(error(got) / error(w.round()))
    assert max(gains) <= 1
    assert min(gains) < 0.5


def test_grids_whose_steps_differ_are_left_alone() -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(64, 8)
    prepared = prepare(network.eval(), [x[:2]], "fp8")
    calibrate(prepared, [(x,)])
    before = copy.deepcopy(prepared.state_dict())
    assert adaround(prepared, [(x,)]) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.state_dict().items())


def test_limits_hold_and_what_is_exact_stays() -> None:
    x, layer = torch.randn(40, 3), nn.functional.linear
    w = torch.tensor([[7.9, -9.5, 2.0]])
    got = learn_rounding(w, (-8, 7), torch.ones(1), x, layer(x, w), layer)
    assert got.tolist() == [[7.0, -8.0, 2.0]]
    on_grid = torch.tensor([[3.0, -2.0, 0.0]])
    assert torch.equal(learn_rounding(on_grid, (-8, 7), torch.ones(1), x, layer(x, on_grid), layer), on_grid)


Rounded = tuple[Captured, Captured, Captured, list[Tensor], int]


@pytest.fixture(scope="module")
def rounded() -> Rounded:
    """The network to the nearest, rounded as learned, and in float; the learned integers, in how many layers."""
    torch.manual_seed(0)
    network, (x, y) = Residual(), images(128)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    prepared = calibrated(network, x, limit=7)
    nearest, reference = copy.deepcopy(prepared), float_twin(prepared)
    num = adaround(prepared, [(x[:100],), (x[100:],)], num_steps=100)
    learned: list[Tensor] = []
    hooks = [
        module.register_forward_hook(
            lambda module, _, output: learned.append(output / module.scale.view(-1, *[1] * (output.dim() - 1)))
        )
        for module in weights(prepared)
    ]
    with torch.no_grad():
        prepared.eval()(x[:2])
    for hook in hooks:
        hook.remove()
    return nearest, prepared, reference, learned, num


def test_the_network_gets_better(rounded: Rounded) -> None:
    nearest, prepared, reference, *_ = rounded
    x, _ = images(128, seed=7)
    with torch.no_grad():
        expected = reference(x)
        before, after = (float((one.eval()(x) - expected).norm()) for one in (nearest, prepared))
    assert after < 0.8 * before


def test_the_integers_that_were_learned_survive_conversion(rounded: Rounded) -> None:
    nearest, prepared, _, learned, num = rounded

    def integers(network: Captured) -> dict[tuple[int, ...], Tensor]:
        return {tuple(t.shape): t for t in convert(network).state_dict().values() if t.dtype == torch.int8}

    got, plain = integers(prepared), integers(nearest)
    assert len(got) == len(learned) == 4
    moved = 0
    for tensor in learned:
        shape = tuple(tensor.shape)
        assert torch.equal(got[shape], tensor.round().to(torch.int8))
        assert int((got[shape].int() - plain[shape].int()).abs().max()) <= 1
        moved += not torch.equal(got[shape], plain[shape])
    assert moved == num >= 3


def test_a_shared_weight_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.one(x).relu())

    torch.manual_seed(0)
    x = torch.randn(16, 4)
    prepared = calibrated(Twice(), x)
    before = copy.deepcopy(prepared.state_dict())
    assert adaround(prepared, [(x,)], num_steps=2) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.state_dict().items())


def test_no_data() -> None:
    with pytest.raises(DataError, match="expected at least one batch, got none"):
        adaround(calibrated(nn.Sequential(nn.Linear(2, 2)), torch.randn(4, 2)), [])
