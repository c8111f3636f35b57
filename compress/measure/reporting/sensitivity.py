"""A picture of what a network loses with part of each layer silent: curves of few layers, a map of many."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from compress.measure.reporting.drawing import (
    LIGHT,
    NUM_SERIES,
    PAGE,
    Palette,
    name_layers,
    new_figure,
    page_svg,
    save_figure,
    shorten,
    style,
)
from compress.measure.reporting.results import Sensitivity

__all__ = ["save_sensitivity", "sensitivity_svg"]

_MOST_CURVES = 12
_MOST_FIGURES = 8  # cells of a row that have room for what is written in them


def sensitivity_svg(sensitivity: Sensitivity) -> str:
    """Draw each layer's curve, or a row of a map for each layer where there are more than twelve.

    Returns:
        An ``<svg>`` element in the page's colours; empty where nothing is measured.
    """
    with mpl.rc_context(style(PAGE)):
        figure = _draw(sensitivity, PAGE)
        return page_svg(figure, f"{sensitivity.metric} with part of each layer silent") if figure else ""


def save_sensitivity(sensitivity: Sensitivity, directory: str | os.PathLike[str]) -> list[Path]:
    """Write the picture as ``sensitivity.png`` and ``sensitivity.svg``; each appears whole or not at all.

    Returns:
        The files; none where nothing is measured.
    """
    with mpl.rc_context(style(LIGHT)):
        figure = _draw(sensitivity, LIGHT)
        return [] if figure is None else save_figure(figure, directory, "sensitivity")


def _draw(sensitivity: Sensitivity, palette: Palette) -> Figure | None:
    layers = sensitivity.ranked()
    if not layers:
        return None
    return _curves(sensitivity, palette) if len(layers) <= _MOST_CURVES else _map(sensitivity, palette)


def _curves(sensitivity: Sensitivity, palette: Palette) -> Figure:
    figure = new_figure(9.2, 3.7)
    panels = {
        sensitivity.metric: (100.0, f"validation {sensitivity.metric}, %"),
        "loss": (1.0, "validation loss"),
    }
    layers = sensitivity.ranked()
    handles = []
    for position, (name, (factor, title)) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), position + 1)
        drawn = []
        for number, layer in enumerate(layers):
            x, y = np.array([[ratio, factor * values[name]] for ratio, values in sensitivity.curves[layer]]).T
            color = palette.series[number % NUM_SERIES]
            dash = "-" if number < NUM_SERIES else (0, (3, 2))
            (handle,) = axes.plot(
                100 * x,
                y,
                color=color,
                linestyle=dash,
                linewidth=1.5,
                marker="o",
                ms=3,
                zorder=2 + len(layers) - number,
            )
            drawn.append(y)
            handles += [handle] if position == 0 else []
        axes.axhline(drawn[0][0], color=palette.muted, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        axes.set_title(title)
        axes.set_xlabel("least important units of one layer silent, %")
        axes.set_xlim(-2, 102)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if name == "loss":
            _log_where_wide(axes, np.concatenate(drawn))
    name_layers(figure, handles, layers, palette)
    return figure


def _map(sensitivity: Sensitivity, palette: Palette) -> Figure:
    """Draw a row for each layer, in the order of the network, its cells as wide as the ratios that they stand for."""
    layers = [layer for layer, points in sensitivity.curves.items() if len(points) > 1]
    most = set(sensitivity.ranked()[: max(3, len(layers) // 10)])
    with mpl.rc_context({"axes.grid": False}):
        figure = new_figure(9.2, 0.215 * len(layers) + 1.1)
        axes = figure.add_subplot()
    damage = _damage(sensitivity)
    worst = max((value for values in damage.values() for value in values if math.isfinite(value)), default=0.0)
    for row, layer in enumerate(layers):
        points = sensitivity.curves[layer][1:]
        edges = _edges([ratio for ratio, _ in points])
        for left, right, (_, values), lost in zip(edges, edges[1:], points, damage[layer]):
            share = min(1.0, lost / worst) if worst and math.isfinite(lost) else float(not math.isfinite(lost))
            place = (100 * left + 0.15, row - 0.46), 100 * (right - left) - 0.3, 0.92
            axes.add_patch(Rectangle(*place, facecolor=palette.line, alpha=0.45, linewidth=0))
            axes.add_patch(Rectangle(*place, facecolor=palette.series[4], alpha=share, linewidth=0))
            if len(points) <= _MOST_FIGURES:
                color = palette.background if share > 0.65 else palette.foreground
                text = f"{100 * values[sensitivity.metric]:.1f}"
                axes.text(50 * (left + right), row, text, ha="center", va="center", fontsize=7.5, color=color)
    axes.set_yticks(range(len(layers)), [shorten(layer) for layer in layers], fontsize=8.5)
    for label, layer in zip(axes.get_yticklabels(), layers):
        if layer in most:
            label.set(color=palette.foreground, fontweight="bold")
    axes.set_xlim(0, 100)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.tick_params(length=0)
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.set_xlabel("least important units of one layer silent, %")
    whole = sensitivity.curves[layers[0]][0][1] if sensitivity.curves[layers[0]][0][0] == 0 else {}
    baseline = f"; {100 * whole[sensitivity.metric]:.1f} with all units" if whole else ""
    axes.set_title(f"validation {sensitivity.metric}, %{baseline}; the most sensitive layers in bold")
    return figure


def _damage(sensitivity: Sensitivity) -> dict[str, list[float]]:
    """Return how much of the metric each point loses, at least 0, whichever way the metric goes."""
    points = [values for curve in sensitivity.curves.values() for _, values in curve]
    whole = next(values for curve in sensitivity.curves.values() for ratio, values in curve if ratio == 0)
    last = max(points, key=lambda values: values["loss"] if math.isfinite(values["loss"]) else -math.inf)
    sign = -1.0 if last[sensitivity.metric] < whole[sensitivity.metric] else 1.0
    return {
        layer: [max(0.0, sign * (values[sensitivity.metric] - whole[sensitivity.metric])) for _, values in curve[1:]]
        for layer, curve in sensitivity.curves.items()
    }


def _edges(ratios: list[float]) -> list[float]:
    """Return where cells around ratios begin and end.

    Example:
        >>> _edges([0.25, 0.5])
        [0.125, 0.375, 0.625]
    """
    if len(ratios) == 1:
        half = min(ratios[0], 1 - ratios[0]) / 2
        return [ratios[0] - half, ratios[0] + half]
    middles = [(a + b) / 2 for a, b in pairwise(ratios)]
    first, last = ratios[0] - (middles[0] - ratios[0]), ratios[-1] + (ratios[-1] - middles[-1])
    return [max(0.0, first), *middles, min(1.0, last)]


def _log_where_wide(axes: Axes, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
