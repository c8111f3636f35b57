from __future__ import annotations

import pytest

from compress.measure.reporting.results import Gains, Report, Stage
from tests.measure.samples import rows, sample_report


def test_gains_compare_the_served_engine_with_the_first_stage() -> None:
    gains = sample_report().gains
    assert (gains.size, gains.latency, gains.macs) == (40.0, 16.0, 10.0)
    assert gains.metric_points == pytest.approx(-0.75)


def test_gains_lack_what_was_not_measured() -> None:
    stage = Stage("a", {}, None, None, 100, None, [])
    assert Report("r", "c", 0, "accuracy", [stage, stage]).gains == Gains(1.0, None, None, None)


def test_latency_is_found_by_batch_and_engine() -> None:
    stage = Stage("a", {}, None, None, 1, None, rows("aoti", 1.0, 2.0) + rows("eager", 3.0, 4.0))
    found = stage.latency_at(1), stage.latency_at(32, engine="eager"), stage.latency_at(8)
    assert [row and row.p50_ms for row in found] == [1.0, 4.0, None]
    assert stage.engines == ["aoti", "eager"]
    assert sample_report().batches == [1, 32]
