"""The report's pictures as SVG that takes its colours and its font from the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from compress.measure.reporting.drawing import NUM_SERIES, PAGE, new_figure, page_svg, shorten, style
from compress.measure.reporting.labels import Box, place_labels
from compress.measure.reporting.results import Report
from compress.measure.reporting.units import as_bytes, as_ms

__all__ = ["NUM_SERIES", "picture_svg", "training_svg", "widths_svg"]

_STYLE = style(PAGE)
_AREA = (60.0, 1800.0)  # square points, of the smallest bubble that can be seen and of the largest stage


def picture_svg(report: Report) -> str:
    """Draw test metric against latency at batch 1, one bubble a stage, its area in proportion to the bytes.

    Returns:
        An ``<svg>`` element; empty where no stage has both figures.
    """
    points = []
    for index, stage in enumerate(report.stages):
        row, metric = stage.latency_at(1), report.metric(stage)
        if row and metric is not None and math.isfinite(metric):
            points.append((index, stage.name, row.p50_ms, 100 * metric, stage.bytes))
    if not points:
        return ""
    with mpl.rc_context(_STYLE):
        figure = new_figure(9.2, 4.6)
        axes = figure.add_subplot()
        x, y, sizes = (np.array(column, dtype=float) for column in list(zip(*points))[2:])
        areas = np.maximum(_AREA[0], _AREA[1] * sizes / sizes.max())
        for (index, *_), left, height, area in zip(points, x, y, areas):
            color = PAGE.series[index % NUM_SERIES]
            axes.scatter(left, height, s=area, color=color, alpha=0.35, linewidths=0)
            axes.scatter(left, height, s=14, color=color, linewidths=0)
        _log_latency_axis(axes, x)
        _metric_limits(axes, y)
        axes.set_xlabel("latency at batch 1, median, ms (log scale)")
        axes.set_ylabel(f"test {report.task_metric}, %")
        texts = [f"{name}\n{as_ms(ms)} ms · {as_bytes(num_bytes)}" for _, name, ms, _, num_bytes in points]
        _write_labels(figure, axes, np.stack([x, y], 1), areas, texts, [PAGE.series[p[0] % NUM_SERIES] for p in points])
        return page_svg(figure, f"{report.task_metric} against latency and size of each stage")


def training_svg(curves: Mapping[str, Sequence[Sequence[float]]], *, first: str = "") -> str:
    """Draw training curves: a panel a metric, a line a phase.

    Args:
        curves: Points ``[epoch, value]`` by ``"phase: metric"``.
        first: Metrics whose name holds this come first.

    Returns:
        An ``<svg>`` element; empty where there are no curves.
    """
    panels: dict[str, dict[str, np.ndarray]] = {}
    for name, points in curves.items():
        phase, _, metric = name.rpartition(": ")
        if len(points):
            panels.setdefault(metric, {})[phase] = np.array(points, dtype=float)
    if not panels:
        return ""
    phases = list(dict.fromkeys(phase for lines in panels.values() for phase in lines))
    order = sorted(
        panels,
        key=lambda name: (
            not (first and first in name),
            not name.startswith("val"),
            not name.startswith("train"),
            name,
        ),
    )
    columns = min(3, len(order))
    rows = math.ceil(len(order) / columns)
    with mpl.rc_context(_STYLE):
        figure = new_figure(9.2, 2.6 * rows + 0.4)
        for position, metric in enumerate(order):
            axes = figure.add_subplot(rows, columns, position + 1)
            for phase, line in panels[metric].items():
                color = PAGE.series[phases.index(phase) % NUM_SERIES]
                marker = "o" if len(line) == 1 else None
                axes.plot(line[:, 0], line[:, 1], color=color, label=phase, linewidth=1.4, marker=marker, ms=4)
            axes.set_title(metric)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            if position >= len(order) - columns:
                axes.set_xlabel("epoch")
            if "loss" in metric and _spans_decades(list(panels[metric].values())):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
        if phases != [""]:
            handles = [mpl.lines.Line2D([], [], color=PAGE.series[i % NUM_SERIES]) for i in range(len(phases))]
            figure.legend(
                handles, phases, loc="outside upper right", ncols=len(phases), frameon=False, labelcolor=PAGE.foreground
            )
        return page_svg(figure, "training curves")


def widths_svg(widths: Sequence[Mapping[str, Any]]) -> str:
    """Draw each layer's width as a bar: the whole is before, the filled part after.

    Args:
        widths: ``{"layer", "before", "after"}``, first layer first.

    Returns:
        An ``<svg>`` element; empty where there are no layers.
    """
    if not widths:
        return ""
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure = new_figure(9.2, 0.21 * len(widths) + 0.4)
        axes = figure.add_subplot()
        y = np.arange(len(widths))
        before, after = ([row[key] for row in widths] for key in ("before", "after"))
        axes.barh(y, before, height=0.66, color=PAGE.line, linewidth=0)
        axes.barh(y, after, height=0.66, color=PAGE.series[0], linewidth=0)
        for position, row in enumerate(widths):
            same = row["before"] == row["after"]
            text = f"{row['before']}" if same else f"{row['before']} → {row['after']}"
            end = max(row["before"], row["after"])
            axes.annotate(
                text,
                (end, position),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=PAGE.muted,
            )
        axes.set_yticks(y, [shorten(str(row["layer"])) for row in widths], fontsize=8.5)
        axes.set_ylim(len(widths) - 0.4, -0.6)
        axes.set_xlim(0, 1.12 * max(*before, *after))
        axes.tick_params(length=0)
        axes.xaxis.set_visible(False)
        axes.spines[["bottom", "left"]].set_visible(False)
        return page_svg(figure, "width of each layer before and after pruning")


def _log_latency_axis(axes: Axes, x: np.ndarray) -> None:
    axes.set_xscale("log")
    low, high = math.log10(x.min()), math.log10(x.max())
    margin = max(0.12, 0.1 * (high - low))
    axes.set_xlim(10 ** (low - margin), 10 ** (high + margin))
    span = high - low
    steps = (1, 2, 3, 4, 5, 6, 8) if span < 0.6 else (1, 2, 5) if span < 2.5 else (1,)
    axes.xaxis.set_major_locator(LogLocator(10, subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _metric_limits(axes: Axes, y: np.ndarray) -> None:
    span = max(float(np.ptp(y)), 0.5)  # half a point at least: less is noise and need not fill the picture
    middle = (y.max() + y.min()) / 2
    axes.set_ylim(middle - 0.72 * span, middle + 0.72 * span)
    axes.yaxis.set_major_locator(MaxNLocator(6))


def _write_labels(
    figure: Figure, axes: Axes, points: np.ndarray, areas: np.ndarray, texts: list[str], colors: list[str]
) -> None:
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    centres = [(float(x), float(y)) for x, y in axes.transData.transform(points)]
    radii = [math.sqrt(area / math.pi) * scale for area in areas]
    drawn = [axes.annotate(text, point, fontsize=9, linespacing=1.25) for text, point in zip(texts, points)]
    extents = [text.get_window_extent() for text in drawn]
    for text in drawn:
        text.remove()
    frame = Box(*axes.bbox.extents)
    boxes = place_labels(centres, radii, [(extent.width, extent.height) for extent in extents], frame)
    for text, point, centre, radius, box, color in zip(texts, points, centres, radii, boxes, colors):
        anchor = ((box.left - centre[0]) / scale, ((box.bottom + box.top) / 2 - centre[1]) / scale)
        axes.annotate(
            text, tuple(point), xytext=anchor, textcoords="offset points", va="center", fontsize=9, linespacing=1.25
        )
        near = (min(max(centre[0], box.left), box.right), min(max(centre[1], box.bottom), box.top))
        if math.dist(near, centre) > radius + 12 * scale:
            ends = axes.transData.inverted().transform([centre, near])
            axes.plot(ends[:, 0], ends[:, 1], color=color, linewidth=0.8, scalex=False, scaley=False)


def _spans_decades(lines: Sequence[np.ndarray]) -> bool:
    values = np.concatenate([line[:, 1] for line in lines])
    values = values[np.isfinite(values)]
    return bool(values.size and values.min() > 0 and values.max() > 20 * values.min())
