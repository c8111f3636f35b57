"""The report's pictures, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.measure.report import Report, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curves_plot", "tradeoff_plot", "widths_plot"]

# Okabe and Ito's palette: told apart by colour-blind readers, legible on light and dark.
_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]
_GREY = "#808080"


def tradeoff_plot(report: Report) -> str | None:
    """Draw the metric against latency at batch 1, the area of a point being its size on disk."""
    points = [
        (stage.name, row.p50_ms, 100 * stage.metrics[report.task_metric], stage.bytes)
        for stage in report.stages
        if (row := stage.at(1)) and report.task_metric in stage.metrics
    ]
    if not points:
        return None
    figure, axes = _figure(7.2, 4.0)
    largest = max(num_bytes for *_, num_bytes in points)
    axes.set_xscale("log")
    for index, (_, latency, metric, num_bytes) in enumerate(points):
        area = 40 + 900 * num_bytes / largest
        axes.scatter(latency, metric, s=area, color=_COLOURS[index % 6], alpha=0.75, edgecolor="none")
    low, high = min(p[2] for p in points), max(p[2] for p in points)
    margin = max(0.2, 0.35 * (high - low))
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(min(p[1] for p in points) / 2, max(p[1] for p in points) * 2)
    _label(axes, points, low - margin, high + margin)
    axes.set_xlabel("latency at batch 1, ms (p50, log scale)")
    axes.set_ylabel(f"test {report.task_metric}, %")
    _plain_ticks(axes)
    return _svg(figure)


def curves_plot(curves: Mapping[str, list[list[float]]], metric: str) -> str | None:
    """Draw the validation metric of each phase over its epochs."""
    chosen = {name.split(":")[0]: points for name, points in curves.items() if name.endswith(f"val/{metric}") and points}
    if not chosen:
        return None
    figure, axes = _figure(7.2, 3.2)
    for index, (name, points) in enumerate(chosen.items()):
        epochs, values = zip(*points)
        axes.plot(epochs, [100 * value for value in values], color=_COLOURS[index % 6], label=name, marker=".", lw=1.6)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"validation {metric}, %")
    axes.legend(frameon=False, labelcolor=_GREY)
    return _svg(figure)


def widths_plot(widths: list[dict[str, Any]]) -> str | None:
    """Draw the outputs of each layer before and after pruning."""
    if not widths:
        return None
    figure, axes = _figure(7.2, 0.8 + 0.24 * len(widths))
    positions = range(len(widths))
    axes.barh(positions, [row["before"] for row in widths], color=_GREY, alpha=0.35, height=0.72, label="before")
    axes.barh(positions, [row["after"] for row in widths], color=_COLOURS[0], height=0.42, label="after")
    axes.set_yticks(positions, [row["layer"] for row in widths], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("outputs (channels or features)")
    axes.legend(frameon=False, labelcolor=_GREY, loc="best")
    return _svg(figure)


def _label(axes: Axes, points: list[tuple[str, float, float, int]], bottom: float, top: float) -> None:
    # Labels stand beside their points, moved up until none is closer than a line to another one near it.
    line = (top - bottom) / 13
    placed: list[tuple[float, float]] = []
    for name, latency, metric, num_bytes in sorted(points, key=lambda point: point[2]):
        height = metric
        while any(abs(height - y) < line and 0.2 < latency / x < 5 for x, y in placed):
            height += line / 2
        placed.append((latency, height))
        right_half = latency > (axes.get_xlim()[0] * axes.get_xlim()[1]) ** 0.5
        axes.annotate(
            f"{name} ({size(num_bytes)})",
            (latency, metric),
            (latency * (0.8 if right_half else 1.25), height),
            fontsize=8,
            color=_GREY,
            ha="right" if right_half else "left",
            va="center",
        )


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(alpha=0.25, color=_GREY)
    axes.tick_params(colors=_GREY, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GREY)
    axes.xaxis.label.set_color(_GREY)
    axes.yaxis.label.set_color(_GREY)
    return figure, axes


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Text stays text, in the page's font; a fixed salt makes the same report the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "compress"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
