"""Bits by measured losses, against all choices counted out."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import RecipeError
from compress.quantize.allocation import allocate_bits, allocate_floats

LOSSES = {"a": {8: 0.0, 4: 0.1, 2: 0.9}, "b": {8: 0.0, 4: 0.2, 2: 0.3}, "c": {8: 0.0, 4: 0.01, 2: 0.5}}
SIZES = {"a": 10, "b": 10, "c": 20}


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        (8, {"a": 8, "b": 8, "c": 8}),
        (6, {"a": 8, "b": 8, "c": 4}),  # c is the largest and loses least: 0.01
        (5, {"a": 4, "b": 8, "c": 4}),  # then a at 4 bits, 0.11, not b, 0.21
        (4.4, {"a": 4, "b": 4, "c": 4}),
        (3.5, {"a": 4, "b": 2, "c": 4}),  # 0.41; the other way round 1.11
        (2, {"a": 2, "b": 2, "c": 2}),
    ],
)
def test_by_hand(average: float, expected: dict[str, int]) -> None:
    assert allocate_bits(LOSSES, SIZES, average_bits=average) == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.lists(st.floats(0, 5), min_size=3, max_size=3)), min_size=1, max_size=5),
    st.floats(2, 9),
)
def test_no_other_choice_within_the_size_loses_less(layers: list[tuple[int, list[float]]], average: float) -> None:
    sizes = {str(number): size for number, (size, _) in enumerate(layers)}
    losses = {str(number): dict(zip((2, 4, 8), values)) for number, (_, values) in enumerate(layers)}
    chosen = allocate_bits(losses, sizes, average_bits=average)
    budget = average * sum(sizes.values()) + 1e-6

    def loss(choice: dict[str, int]) -> float:
        return sum(losses[layer][bits] for layer, bits in choice.items())

    def spent(choice: dict[str, int]) -> int:
        return sum(sizes[layer] * bits for layer, bits in choice.items())

    assert spent(chosen) <= budget
    every = (dict(zip(sizes, bits)) for bits in itertools.product((2, 4, 8), repeat=len(sizes)))
    assert math.isclose(loss(chosen), min(loss(choice) for choice in every if spent(choice) <= budget), abs_tol=1e-9)


def test_large_layers_of_odd_sizes_stay_within_the_target() -> None:
    sizes = {f"layer{number}": 100_003 + 7919 * number for number in range(30)}
    losses = {name: {8: 0.0, 4: 1.0 + number % 7, 2: 5.0 + number % 3} for number, name in enumerate(sizes)}
    chosen = allocate_bits(losses, sizes, average_bits=5)
    average = sum(sizes[name] * bits for name, bits in chosen.items()) / sum(sizes.values())
    assert 4.9 < average <= 5


def test_too_small_a_target() -> None:
    with pytest.raises(RecipeError, match=r"average_bits: expected at least 2, .* got 1\.5"):
        allocate_bits(LOSSES, SIZES, average_bits=1.5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-2, 2), st.integers(-20, 60)), min_size=1, max_size=6),
    st.integers(0, 150),
)
def test_floats_gain_most_within_the_time(layers: list[tuple[float, int]], budget: int) -> None:
    gains = {str(number): gain for number, (gain, _) in enumerate(layers)}
    times = {str(number): time / 8 for number, (_, time) in enumerate(layers)}
    room = budget / 8 - sum(min(0, time) for time in times.values())
    chosen = allocate_floats(gains, times, budget=budget / 8)
    every = [names for num in range(len(layers) + 1) for names in itertools.combinations(gains, num)]
    within = [names for names in every if sum(times[name] for name in names) <= budget / 8]
    assert sum(times[name] for name in chosen) <= budget / 8 + len(layers) * room / 16384
    assert sum(gains[name] for name in chosen) >= max(sum(gains[name] for name in names) for names in within) - 1e-9


def test_layers_that_floats_make_faster_stay_in_floats_where_there_is_no_room() -> None:
    gains, times = {"a": -0.5, "b": 0.1, "c": 0.2}, {"a": -2.0, "b": 1.0, "c": -1.0}
    assert allocate_floats(gains, times, budget=-3.0) == ["a", "c"]
    assert allocate_floats(gains, times, budget=0.0) == ["b", "c"]
    with pytest.raises(RecipeError, match="expected at least -3 more"):
        allocate_floats(gains, times, budget=-3.5)
    assert allocate_floats({}, {}, budget=0.0) == []
