from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from compress.errors import RunError
from compress.measure.reporting.report import read_report, write_report
from tests.measure.samples import sample_report


def test_read_gives_what_was_written(tmp_path: Path) -> None:
    report = sample_report()
    html = write_report(report, tmp_path / "new" / "run")
    assert html.name == "report.html"
    assert read_report(html.parent) == read_report(html.parent / "report.json") == report


def test_json_has_the_documented_form(tmp_path: Path) -> None:
    write_report(sample_report(), tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    stage = data["stages"][-1]
    assert {"name", "metrics", "num_params", "macs", "bytes", "peak_memory", "latency"} <= set(stage)
    assert stage["latency"][0] == {"batch": 1, "engine": "aoti", "threads": 2, "p50_ms": 0.5, "p95_ms": 0.6}
    assert (stage["bytes"], stage["artifact_bytes"], data["gains"]["size"]) == (100_000, 900_000, 40.0)


def test_what_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    report = sample_report()
    report.curves["student: train/loss"][0][1] = math.inf
    report.stages[0].metrics["f1"] = math.nan
    write_report(report, tmp_path)
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    again = read_report(tmp_path)
    assert math.isnan(again.curves["student: train/loss"][0][1])
    assert math.isnan(again.stages[0].metrics["f1"])


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(sample_report(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = sample_report()
    changed.seed = 9

    def full(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_report(changed, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stages": [{"name": "a"}]}', '{"stages": 3}', "\x00"])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(RunError, match=r"report\.json: expected a report\.json of this version"):
        read_report(tmp_path)


def test_a_missing_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No such file"):
        read_report(tmp_path / "report.json")
