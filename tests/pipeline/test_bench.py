from __future__ import annotations

from compress.measure.reporting.report import LatencyRow, Stage
from compress.pipeline.bench import _serving_first


def test_a_report_names_what_serves_each_batch_size() -> None:
    rows = [
        {"batch": batch, "engine": engine, "threads": 1, "p50_ms": 1.0, "p95_ms": 1.0}
        for batch in (1, 32)
        for engine in ("a", "b", "c")
    ]
    found = [LatencyRow(**row) for row in _serving_first(rows, {1: "b", 32: "c"}.__getitem__)]  # type: ignore[arg-type]
    stage = Stage("artefact", {}, None, None, 1, None, found)
    assert [stage.latency_at(batch).engine for batch in (1, 32)] == ["b", "c"]  # type: ignore[union-attr]
    assert stage.engines == ["b", "c", "a"]
