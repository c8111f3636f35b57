"""The report as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from compress.measure.reporting.bits import bits_svg
from compress.measure.reporting.mixed import mixed_svg
from compress.measure.reporting.page import PAGE
from compress.measure.reporting.plots import NUM_SERIES, picture_svg, training_svg, widths_svg
from compress.measure.reporting.results import Report
from compress.measure.reporting.sensitivity import sensitivity_svg
from compress.measure.reporting.table import table_rows
from compress.measure.reporting.units import ABSENT, as_bytes, as_count, as_metric, as_ms, as_points, as_ratio

__all__ = ["render_html"]

_TARGETS: dict[str, tuple[str, Callable[[float], str]]] = {
    "latency_ms": ("latency", lambda value: f"{as_ms(value)} ms"),
    "latency": ("latency", lambda value: f"{as_ms(value)} ms"),
    "macs": ("MACs", as_count),
    "params": ("parameters", as_count),
    "bytes": ("bytes of weights", as_bytes),
}


def render_html(report: Report) -> str:
    """Return the page.

    Args:
        report: With at least one stage; its text is escaped.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pictures = {
        "picture": picture_svg(report),
        "training": training_svg(report.curves, first=report.task_metric),
        "widths": widths_svg(report.widths),
        "sensitivity": sensitivity_svg(report.sensitivity) if report.sensitivity else "",
        "bits": bits_svg(report.bits) if report.bits else "",
        "mixed": mixed_svg(report.mixed) if report.mixed else "",
    }
    return environment.from_string(PAGE).render(
        report=report,
        gains=_gains(report),
        rows=table_rows(report),
        colors=_colors(report),
        target=_target(report),
        missing_points=_missing_points(report),
        mixed_ms=_mixed_ms(report),
        artifact_bytes=as_bytes(report.stages[-1].artifact_bytes) if report.stages[-1].artifact_bytes else "",
        **{name: Markup(svg) for name, svg in pictures.items()},
    )


def _gains(report: Report) -> list[dict[str, str]]:
    """Return the large figures: figure, what it says, and the two values behind it."""
    first, last, gains = report.stages[0], report.stages[-1], report.gains
    before, after = first.latency_at(1), last.latency_at(1)
    size, smaller = as_ratio(gains.size, better="smaller on disk", worse="larger on disk")
    speed, faster = as_ratio(gains.latency, better="faster at batch 1", worse="slower at batch 1")
    return [
        {"figure": size, "words": smaller, "detail": f"{as_bytes(first.bytes)} → {as_bytes(last.bytes)}"},
        {
            "figure": speed,
            "words": faster,
            "detail": f"{as_ms(before.p50_ms)} → {as_ms(after.p50_ms)} ms" if before and after else "not measured",
        },
        {
            "figure": as_points(gains.metric_points),
            "words": f"points of {report.task_metric}",
            "detail": f"{as_metric(report.metric(first))} → {as_metric(report.metric(last))}",
        },
    ]


def _target(report: Report) -> dict[str, str] | None:
    target = report.target
    if target is None:
        return None
    name, write = _TARGETS[target.metric]
    return {
        "name": name,
        "original": ABSENT if target.original is None else write(target.original),
        "wanted": write(target.wanted),
        "reached": write(target.reached),
        "engine": target.engine or ABSENT,
    }


def _missing_points(report: Report) -> str:
    measured = report.sensitivity
    if measured is None:
        return ""
    num_done = 1 + sum(ratio > 0 for points in measured.curves.values() for ratio, _ in points)
    return f"; {num_done} of {measured.num_points} points so far" if num_done < measured.num_points else ""


def _mixed_ms(report: Report) -> dict[str, str]:
    mixed = report.mixed
    if mixed is None or mixed.reached is None or mixed.wanted_ms is None:
        return {}
    values = {"reached": mixed.reached["ms"], "wanted": mixed.wanted_ms}
    values |= {"integers": mixed.integers["ms"], "floats": mixed.floats["ms"]}
    return {name: as_ms(value) for name, value in values.items()}


def _colors(report: Report) -> dict[str, Any]:
    return {stage.name: index % NUM_SERIES for index, stage in enumerate(report.stages)}
