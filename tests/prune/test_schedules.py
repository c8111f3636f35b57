from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.prune import SCHEDULES, num_kept

fractions = st.floats(0, 1)


@pytest.mark.parametrize("name", SCHEDULES)
@given(one=fractions, other=fractions)
def test_schedules_rise_from_nothing_to_all(name: str, one: float, other: float) -> None:
    schedule = SCHEDULES[name]
    assert schedule(0.0) == 0
    assert schedule(1.0) == 1
    low, high = sorted([one, other])
    assert 0 <= schedule(low) <= schedule(high) <= 1


@given(width=st.integers(1, 4096), ratio=st.floats(0, 0.999), round_to=st.integers(1, 64))
def test_widths_are_multiples_in_range(width: int, ratio: float, round_to: int) -> None:
    kept = num_kept(width, ratio=ratio, round_to=round_to)
    assert 1 <= kept <= width
    assert kept == width or kept % round_to == 0
    assert abs(kept - width * (1 - ratio)) <= max(round_to, width - width // round_to * round_to)
