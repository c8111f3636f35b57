"""Write and read reports: ``report.json`` for programs, ``report.html`` for people, both from the same data."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from compress.errors import RunError
from compress.files import write_text
from compress.measure.reporting.results import Bits, Gains, LatencyRow, Mixed, Report, Sensitivity, Stage, Target
from compress.measure.reporting.table import report_table

__all__ = [
    "Gains",
    "LatencyRow",
    "Report",
    "Sensitivity",
    "Stage",
    "Target",
    "read_report",
    "report_table",
    "write_report",
]


def write_report(report: Report, directory: str | os.PathLike[str]) -> Path:
    """Write ``report.json`` and ``report.html``; each appears whole or not at all.

    Values that are not finite are written as ``null``, which JSON has.

    Args:
        report: With at least one stage.
        directory: Made where it is missing.

    Returns:
        Path of ``report.html``.
    """
    from compress.measure.reporting.html import render_html  # late: it needs Matplotlib

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = _without_nan(asdict(report) | {"gains": asdict(report.gains)})
    texts = {
        "report.json": json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": render_html(report),
    }
    for name, text in texts.items():
        write_text(directory / name, text)
    return directory / "report.html"


def read_report(path: str | os.PathLike[str]) -> Report:
    """Read a ``report.json``.

    Args:
        path: The file, or the directory that holds it.

    Raises:
        RunError: when there is no such file or it is not a report.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        stages = [Stage(**stage | _stage_parts(stage)) for stage in data["stages"]]
        curves = {name: [[_nan(x), _nan(y)] for x, y in points] for name, points in data["curves"].items()}
        known = {field.name: data[field.name] for field in fields(Report)}
        parts = {
            "sensitivity": data["sensitivity"] and Sensitivity(**_with_curves(data["sensitivity"])),
            "bits": data["bits"] and Bits(**_with_curves(data["bits"])),
            "mixed": data["mixed"] and Mixed(**data["mixed"]),
            "target": data["target"] and Target(**data["target"]),
        }
        return Report(**known | {"stages": stages, "curves": curves} | parts)
    except OSError as error:
        raise RunError(
            f"{path}: expected a report.json, got {error.strerror}. Make one with: compress report."
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(
            f"{path}: expected a report.json of this version, got {type(error).__name__}: {error}. "
            "Make it anew with: compress report."
        ) from None


def _stage_parts(stage: dict[str, Any]) -> dict[str, Any]:
    return {
        "metrics": {name: _nan(value) for name, value in stage["metrics"].items()},
        "latency": [LatencyRow(**row) for row in stage["latency"]],
    }


def _with_curves(data: dict[str, Any]) -> dict[str, Any]:
    curves = {
        layer: [[place, {name: _nan(value) for name, value in values.items()}] for place, values in points]
        for layer, points in data["curves"].items()
    }
    return data | {"curves": curves}


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
