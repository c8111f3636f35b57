from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import RecipeError
from compress.prune.schedules import SCHEDULES, timetable

fractions = st.floats(0, 1)


@pytest.mark.parametrize("name", SCHEDULES)
@given(one=fractions, other=fractions)
def test_schedules_rise_from_nothing_to_all(name: str, one: float, other: float) -> None:
    schedule = SCHEDULES[name]
    assert schedule(0.0) == 0
    assert schedule(1.0) == 1
    low, high = sorted([one, other])
    assert 0 <= schedule(low) <= schedule(high) <= 1


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    start=st.floats(0, 0.9),
    length=st.floats(0, 0.09),
    number=st.integers(1, 50),
)
def test_a_timetable_rises_within_its_bounds(name: str, start: float, length: float, number: int) -> None:
    table = timetable(name, start=start, end=start + length, num_edits=number)
    assert len(table) == (1 if name == "one_shot" else number)
    assert table[0][0] == start
    assert table[-1][1] == pytest.approx(1)
    for (when, much), (later, more) in itertools.pairwise(table):
        assert start <= when <= later <= start + length + 1e-9
        assert 0 < much <= more + 1e-12


def test_edits_come_every_so_many_steps_or_epochs() -> None:
    every = timetable("linear", start=0.1, end=0.5, num_edits="20 steps", steps=100)
    assert [round(when, 9) for when, _ in every] == [0.1, 0.3, 0.5]
    assert len(timetable("linear", start=0.0, end=0.5, num_edits="1 epoch", epochs=10)) == 6
    assert len(timetable("linear", start=0.2, end=0.3, num_edits="50 epochs", epochs=10)) == 1


@pytest.mark.parametrize(
    ("schedule", "num_edits", "message"),
    [
        (
            "quadratic",
            1,
            r"prune\.schedule: expected one of cubic, linear, cosine, one_shot, or points, got",
        ),
        ([[0.2, 0.5], [0.1, 1.0]], 1, r"prune\.schedule: expected rising points"),
        ([[0.2, 0.5]], 1, r"that end with fraction 1"),
        ([[0.2, 0.5], [1.0, 1.0]], 1, r"prune\.schedule: expected rising points"),
        ([], 1, r"prune\.schedule: expected rising points"),
        ([[0.2]], 1, r"prune\.schedule: expected rising points"),
        ("cubic", "often", r"prune\.num_edits: expected a number, or '200 steps', or '2 epochs', got 'often'"),
        ("cubic", "0 steps", r"prune\.num_edits"),
        ("cubic", 0, r"prune\.num_edits: expected at least 1"),
    ],
)
def test_bad_schedules_are_named(schedule: object, num_edits: int | str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        timetable(schedule, start=0.1, end=0.5, num_edits=num_edits)  # type: ignore[arg-type]
