from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import DataError
from compress.quantize import calibrate, convert, prepare
from compress.quantize.corrections.adaround import adaround, learn_rounding
from compress.quantize.corrections.lockstep import float_twin, quantized_layers
from compress.surgery import Captured
from compress.surgery.lengths import Length
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

        got = learn_rounding(w, (-8, 7), torch.ones(1), [(x, layer(x, w))], layer, num_steps=200)
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
    got = learn_rounding(w, (-8, 7), torch.ones(1), [(x, layer(x, w))], layer)
    assert got.tolist() == [[7.0, -8.0, 2.0]]
    on_grid = torch.tensor([[3.0, -2.0, 0.0]])
    data = [(x, layer(x, on_grid))]
    assert torch.equal(learn_rounding(on_grid, (-8, 7), torch.ones(1), data, layer), on_grid)


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


class Transposed(nn.Module):
    """A product as GPT-2 has it, the weight (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(8))
        self.weight = nn.Parameter(torch.randn(6, 8) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Scaled(nn.Module):
    """A weight times a number, as equalised learning rates have it, and one times a parameter that comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.rand(8, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.one.weight * 0.3).relu()
        return nn.functional.linear(x, self.gain * self.two.weight)


FOUND: list[tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = [
    (lambda: nn.Sequential(nn.Conv1d(3, 8, 3)), (64, 3, 9), {"0.weight"}),
    (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (64, 3, 9), {"0.weight"}),
    (Transposed, (64, 6), {"weight"}),
    (Scaled, (64, 6), {"one.weight"}),
]


@pytest.mark.parametrize(("kind", "shape", "found"), FOUND, ids=["series", "series with norm", "transposed", "scaled"])
def test_weights_are_found_however_layers_read_them(
    kind: Callable[[], nn.Module], shape: tuple[int, ...], found: set[str]
) -> None:
    torch.manual_seed(0)
    x = torch.rand(shape)  # of one sign, so that the errors of weights add up
    prepared = calibrated(kind(), x, limit=7)
    expected = float_twin(prepared)(x)
    before = float((prepared(x) - expected).norm())
    old = copy.deepcopy(prepared.state_dict())
    assert adaround(prepared, [(x,)], num_steps=300) == len(found)
    assert float((prepared.eval()(x) - expected).norm()) < before
    assert {name for name, tensor in prepared.named_parameters() if not torch.equal(tensor, old[name])} == found


class ResidualSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x) + x)


def test_a_residual_sum_before_a_norm_is_not_of_the_layer() -> None:
    torch.manual_seed(0)
    x = torch.rand(64, 4, 5, 5)
    prepared = calibrated(ResidualSum(), x, limit=7)
    (layer,) = quantized_layers(prepared.graph_module)
    assert layer.behind == ()
    assert adaround(prepared, [(x,)], num_steps=50) == 1


def test_batches_of_several_lengths() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    batches = [(torch.rand(20, num, 6),) for num in (5, 7, 5)]
    prepared = prepare(network, batches[0], "w4a8", first_last="w4a8", lengths=[Length(1, 2, 16)])
    calibrate(prepared, batches)
    reference = float_twin(prepared)

    def error() -> float:
        with torch.no_grad():
            return sum(float((prepared.eval()(x) - reference(x)).square().sum()) for (x,) in batches)

    before = error()
    assert adaround(prepared, batches, num_steps=100) == 2
    assert error() < 0.8 * before
