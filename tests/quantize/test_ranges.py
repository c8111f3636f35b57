from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import RecipeError
from compress.quantize.ranges import RANGES, Grid, Seen, choose_range

AFFINE, SYMMETRIC = Grid(0, 255), Grid(0, 254, symmetric=True)


def seen(*batches: Tensor) -> Seen:
    found = Seen()
    for batch in batches:
        found.add(batch)
    return found


@given(
    low=st.floats(-10, 0), high=st.floats(0.01, 10), values=st.lists(st.floats(-20, 20), min_size=1), both=st.booleans()
)
def test_rounding_is_that_of_torch(low: float, high: float, values: list[float], both: bool) -> None:
    x, grid = torch.tensor(values), SYMMETRIC if both else AFFINE
    scale = 2 * max(-low, high) / 254 if both else (high - low) / 255
    zero = 127 if both else round(-low / scale)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero, grid.quant_min, grid.quant_max)
    got = grid.round(x.double(), torch.tensor(low).double(), torch.tensor(high).double())
    assert ((got - expected).abs() <= scale * 1.001).all()  # a tie may go either way in float32
    assert float(((got - expected).abs() > 1e-3 * scale).float().mean()) <= 0.5


def test_extremes_and_their_average() -> None:
    found = seen(torch.tensor([-1.0, 3.0]), torch.tensor([-3.0, 1.0]))
    assert choose_range("minmax", found, AFFINE) == (-3.0, 3.0)
    assert choose_range("average", found, AFFINE) == (-2.0, 2.0)


@pytest.mark.parametrize("method", RANGES)
def test_zero_is_always_inside(method: str) -> None:
    low, high = choose_range(method, seen(torch.tensor([2.0, 3.0, 2.5])), AFFINE)
    assert low == 0
    assert 2 < high <= 3
    low, high = choose_range(method, seen(torch.tensor([-2.0, -3.0])), AFFINE)
    assert high == 0


def test_a_percentile_leaves_out_the_tails() -> None:
    x = torch.cat([torch.linspace(-1, 1, 998), torch.tensor([-50.0, 70.0])])
    low, high = choose_range("percentile", seen(x), AFFINE, percentile=99.5)
    assert (low, high) == pytest.approx((-1, 1), abs=120 / 2048 + 0.01)  # within a bin


def test_least_squares_beats_every_other_narrowing() -> None:
    torch.manual_seed(0)
    x, grid = torch.randn(20_000).double(), Grid(0, 15)
    low, high = float(x.min()), float(x.max())

    def error(low: float, high: float) -> float:
        return float(((grid.round(x, torch.tensor(low), torch.tensor(high)) - x) ** 2).mean())

    best = error(*choose_range("mse", seen(x), grid))
    assert best <= 1.02 * min(error(low * f, high * f) for f in torch.linspace(0.05, 1, 60).tolist())
    assert best < 0.8 * error(low, high)


@pytest.mark.parametrize("grid", [AFFINE, SYMMETRIC])
def test_entropy_clips_what_is_rare(grid: Grid) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(400_000), torch.tensor([60.0])])
    low, high = choose_range("entropy", seen(x), grid)
    assert 2.5 < high < 20
    assert -20 < low < -2.5
    flat = torch.rand(400_000)  # nothing rare: nothing is clipped
    assert choose_range("entropy", seen(flat), grid)[1] == pytest.approx(1, abs=0.02)


def test_wider_bins_keep_every_count() -> None:
    found = seen(torch.rand(1000), 10 * torch.rand(500), torch.tensor([-100.0]), torch.tensor([]))
    assert float(found.counts.sum()) == 1501
    assert float((found.counts * (found.centres < -50)).sum()) == 1
    assert float((found.counts * (found.centres > -1)).sum()) == 1500


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        seen(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("method", RANGES)
def test_zeros_alone_have_a_range(method: str) -> None:
    low, high = choose_range(method, seen(torch.zeros(10)), AFFINE)
    assert low == 0
    assert 0 <= high < 1e-3


def test_what_does_not_exist_is_named() -> None:
    with pytest.raises(RecipeError, match=r"quantize\.ranges: expected one of minmax.*got 'magic'"):
        choose_range("magic", seen(torch.ones(1)), AFFINE)
    with pytest.raises(RecipeError, match="expected values to learn ranges from, got none"):
        choose_range("mse", Seen(), AFFINE)
