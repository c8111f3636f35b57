from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data.splits import stratified_split
from compress.errors import DataError


@settings(max_examples=100, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=80),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_disjoint_complete_of_the_size_asked_for_and_stratified(labels: list[int], fraction: float, seed: int) -> None:
    array = np.array(labels)
    num = round(fraction * len(array))
    rest, chosen = stratified_split(array, num, seed=seed)
    assert len(chosen) == num
    assert sorted([*rest, *chosen]) == list(range(len(array)))
    for value in set(labels):
        share = (array == value).sum() * num / len(array)
        assert abs((array[chosen] == value).sum() - share) < 1 + 1e-9


def test_the_seed_decides_and_nothing_else() -> None:
    labels = np.arange(100) % 4
    np.random.seed(1)
    first = stratified_split(labels, 30, seed=7)[1]
    np.random.seed(2)
    assert (first == stratified_split(labels, 30, seed=7)[1]).all()
    assert (first != stratified_split(labels, 30, seed=8)[1]).any()


@pytest.mark.parametrize("num", [-1, 5])
def test_refuses_more_than_there_is(num: int) -> None:
    with pytest.raises(DataError, match=f"between 0 and 4 samples, got {num}"):
        stratified_split(np.zeros(4, dtype=int), num, seed=0)
