from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchao.quantization.pt2e import FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver

from compress.quantize.fakes.moving import MovingFakeQuantize
from compress.quantize.fakes.rounding import round_to_steps

GRIDS = [(0, 255, 131), (0, 255, 0), (0, 254, 127), (-8, 7, 0), (-(2**15) + 1, 2**15 - 1, 0)]


@pytest.mark.parametrize(("low", "high", "zero"), GRIDS)
@given(scale=st.floats(1e-6, 10), values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1), seed=st.integers(0, 99))
def test_numbers_and_gradients_are_those_of_the_kernel(
    low: int, high: int, zero: int, scale: float, values: list[float], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(50, generator=generator) * scale * (high - low)
    halves = (torch.arange(-5, 6) + 0.5) * scale
    first = torch.cat([torch.tensor(values), spread, halves]).requires_grad_()
    second = first.detach().clone().requires_grad_()
    step, at = torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32)
    expected = torch.fake_quantize_per_tensor_affine(first, step, at, low, high)
    got = round_to_steps(second, step, at, low, high)
    assert torch.equal(got, expected)
    weights = torch.randn(len(first), generator=generator)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    ends = torch.tensor([low - zero - 0.5, high - zero + 0.5]) * step
    inner = ((first.detach()[:, None] - ends).abs() > 1e-4 * ends.abs()).all(1)  # a tie may go either way
    assert torch.equal(first.grad[inner], second.grad[inner])


def test_what_is_not_a_number_stays_so() -> None:
    got = round_to_steps(torch.tensor([float("nan"), float("inf")]), torch.ones(1), torch.zeros(1).int(), 0, 255)
    assert got.isnan().tolist() == [True, False]
    assert float(got[1]) == 255


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_range_moves_as_the_kernel_moves_it(symmetric: bool) -> None:
    options = {
        "observer": MovingAverageMinMaxObserver,
        "quant_min": 0,
        "quant_max": 254 if symmetric else 255,
        "dtype": torch.uint8,
        "qscheme": torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
    }
    kernel, ours = FusedMovingAvgObsFakeQuantize(**options), MovingFakeQuantize(**options)
    torch.manual_seed(0)
    for step in range(6):
        if step == 4:
            for module in (kernel, ours):
                module.observer_enabled[0] = 0
        x = (torch.randn(3, 4, 5) * (1 + step)).float()
        assert torch.equal(ours(x), kernel(copy.deepcopy(x)))
        for name, expected in kernel.state_dict().items():
            assert torch.equal(ours.state_dict()[name], expected), name
