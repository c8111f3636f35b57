"""The report of a run: stages × (metric, size, cost, latency), as JSON, as a table and as a page."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

__all__ = ["LatencyRow", "Report", "Stage", "read_report", "report_table", "write_report"]


@dataclass(frozen=True)
class LatencyRow:
    """Latency of a stage.

    Args:
        batch: Batch size.
        engine: What ran it.
        threads: Threads of a call.
        p50_ms: Median in milliseconds.
        p95_ms: 95th percentile in milliseconds.
    """

    batch: int
    engine: str
    threads: int
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Stage:
    """What was measured of one stage.

    Args:
        name: What people call it.
        metrics: On the test split, by lower-case name.
        num_params: Parameters.
        macs: Multiply-accumulates of one sample.
        bytes: Size on disk of what is loaded.
        peak_memory: Bytes by which a process grows that loads it and runs one sample.
        latency: Rows; the first of a batch size is the engine that serves.
        artifact_bytes: Size of the whole artefact, for the last stage.
    """

    name: str
    metrics: Mapping[str, float]
    num_params: int | None
    macs: int | None
    bytes: int
    peak_memory: int | None
    latency: list[LatencyRow]
    artifact_bytes: int | None = None

    def at(self, batch: int) -> LatencyRow | None:
        """Return the row of the serving engine at a batch size."""
        return next((row for row in self.latency if row.batch == batch), None)


@dataclass(frozen=True)
class Report:
    """A run in figures.

    Args:
        recipe: Its name.
        command: What was typed.
        seed: Of all random numbers.
        task_metric: The metric that leads, e.g. ``"accuracy"``.
        stages: The first one is what the last one, the artefact, is compared with.
        curves: ``{"phase: metric": [[epoch, value], ...]}``.
        widths: ``{"layer", "before", "after"}`` for each layer.
        machine: What it was measured on.
        notes: What a reader must know to read the figures right.
    """

    recipe: str
    command: str
    seed: int
    task_metric: str
    stages: list[Stage]
    curves: Mapping[str, list[list[float]]] = field(default_factory=dict)
    widths: list[dict[str, Any]] = field(default_factory=list)
    machine: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def gains(self) -> dict[str, float]:
        """Compare the last stage with the first: how many times smaller and faster, and points of metric gained."""
        first, last = self.stages[0], self.stages[-1]
        gains = {"smaller": first.bytes / last.bytes}
        slow, fast = first.at(1), last.at(1)
        if slow and fast:
            gains["faster"] = slow.p50_ms / fast.p50_ms
        if self.task_metric in first.metrics and self.task_metric in last.metrics:
            gains["points"] = 100 * (last.metrics[self.task_metric] - first.metrics[self.task_metric])
        return gains


def write_report(report: Report, directory: str | Path) -> Path:
    """Write ``report.json`` and ``report.html``, each under a temporary name first.

    Returns:
        The path of the page.
    """
    from compress.measure.html import render

    content = asdict(report) | {"gains": report.gains()}
    for name, text in {"report.json": json.dumps(content, indent=1), "report.html": render(report)}.items():
        temporary = Path(directory) / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, Path(directory) / name)
    return Path(directory) / "report.html"


def read_report(path: str | Path) -> Report:
    """Read a ``report.json``."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    content.pop("gains", None)
    content["stages"] = [
        Stage(**{**stage, "latency": [LatencyRow(**row) for row in stage["latency"]]}) for stage in content["stages"]
    ]
    return Report(**content)


COLUMNS = ["stage", "metric", "parameters", "MACs", "on disk", "peak memory", "batch 1 ms", "batch 32 ms", "engine"]


def rows(report: Report) -> list[list[str]]:
    """Return the cells of the table of stages, as text."""
    return [
        [
            stage.name,
            f"{100 * stage.metrics[report.task_metric]:.2f} %" if report.task_metric in stage.metrics else "–",
            _count(stage.num_params),
            _count(stage.macs),
            size(stage.bytes),
            size(stage.peak_memory),
            _latency(stage.at(1)),
            _latency(stage.at(32)),
            ", ".join(sorted({f"{row.engine} ({row.threads} threads)" for row in stage.latency[:1]})) or "–",
        ]
        for stage in report.stages
    ]


def report_table(report: Report) -> Table:
    """Return the table of stages for the terminal."""
    table = Table(title=f"{report.recipe}: p50 / p95 latency, test {report.task_metric}")
    for column in COLUMNS:
        name = report.task_metric if column == "metric" else column
        table.add_column(name, justify="left" if column in ("stage", "engine") else "right", overflow="fold")
    for cells in rows(report):
        table.add_row(*cells, style="bold" if cells[0] == report.stages[-1].name else None)
    table.caption = summary(report)
    return table


def summary(report: Report) -> str:
    """Return the gains in one line."""
    gains = report.gains()
    first, last = report.stages[0].name, report.stages[-1].name
    parts = [f"{gains['smaller']:.1f}× smaller"]
    if "faster" in gains:
        parts.append(f"{gains['faster']:.1f}× faster at batch 1")
    if "points" in gains:
        parts.append(f"{gains['points']:+.2f} points of {report.task_metric}")
    return f"{last} against {first}: {', '.join(parts)}"


def size(num_bytes: int | None) -> str:
    """Return a size for people.

    Example:
        >>> size(11_200_000), size(640), size(None)
        ('11.2 MB', '640 B', '–')
    """
    if num_bytes is None:
        return "–"
    for factor, unit in [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")]:
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"


def _count(number: int | None) -> str:
    if number is None:
        return "–"
    for factor, unit in [(1e9, "G"), (1e6, "M"), (1e3, "k")]:
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return str(number)


def _latency(row: LatencyRow | None) -> str:
    return f"{row.p50_ms:.2f} / {row.p95_ms:.2f}" if row else "–"
