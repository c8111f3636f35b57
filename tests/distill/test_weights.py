from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.distill import Decay, SoftTarget, Warmup, WeightSchedule, Window
from compress.errors import RecipeError

SCHEDULES = [Warmup(0.3), Decay(0.2, 0.8, final=0.1), Window(0.25, 0.75)]


@given(st.floats(0, 1), st.sampled_from(SCHEDULES))
def test_bounded(progress: float, schedule: WeightSchedule) -> None:
    assert 0 <= schedule.factor(progress) <= 1


@given(st.floats(0, 1), st.floats(0, 1))
def test_warmup_rises_and_decay_falls(first: float, second: float) -> None:
    early, late = sorted((first, second))
    assert Warmup(0.3).factor(early) <= Warmup(0.3).factor(late)
    assert Decay(0.2, 0.8, 0.1).factor(early) >= Decay(0.2, 0.8, 0.1).factor(late) - 1e-12


def test_a_loss_follows_its_schedule() -> None:
    loss = SoftTarget(weight=0.8, schedule=Decay())
    assert loss.weight_at(0.0) == 0.8
    assert loss.weight_at(1.0) == pytest.approx(0)


@pytest.mark.parametrize(
    "make",
    [lambda: Warmup(0.0), lambda: Warmup(1.5), lambda: Decay(0.5, 0.5), lambda: Decay(final=2), lambda: Window(-1)],
)
def test_mistakes_are_named(make: object) -> None:
    with pytest.raises(RecipeError, match=r"schedule\.\w+: expected a value in"):
        make()  # type: ignore[operator]
