"""A picture of what each layer costs and gains in floats where the others compute in integers."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compress.measure.reporting.drawing import LIGHT, PAGE, Palette, new_figure, page_svg, save_figure, shorten, style
from compress.measure.reporting.results import Mixed

__all__ = ["mixed_svg", "save_mixed"]

_MOST_LAYERS = 24


def mixed_svg(mixed: Mixed) -> str:
    """Draw the layers that stay in floats, then those whose time differs most, at most 24.

    Returns:
        An ``<svg>`` element in the page's colours; empty where nothing is measured.
    """
    with mpl.rc_context(style(PAGE)):
        return page_svg(_draw(mixed, PAGE), "time and loss with one layer in floats") if mixed.layers else ""


def save_mixed(mixed: Mixed, directory: str | os.PathLike[str]) -> list[Path]:
    """Write the picture as ``mixed.png`` and ``mixed.svg``; each appears whole or not at all.

    Returns:
        The files; none where nothing is measured.
    """
    if not mixed.layers:
        return []
    with mpl.rc_context(style(LIGHT)):
        return save_figure(_draw(mixed, LIGHT), directory, "mixed")


def _draw(mixed: Mixed, palette: Palette) -> Figure:
    times, gains = mixed.times(), mixed.gains()
    shown = set(sorted(times, key=lambda layer: (layer not in mixed.chosen, -abs(times[layer])))[:_MOST_LAYERS])
    layers = [layer for layer in times if layer in shown]
    figure = new_figure(9.2, 1.3 + 0.22 * len(layers))
    panels = {"milliseconds more in floats": times, "validation loss less in floats": gains}
    axes = figure.subplots(1, len(panels), sharey=True)
    for panel, (title, values) in zip(axes, panels.items()):
        for in_floats, color in enumerate((palette.series[5], palette.series[0])):
            own = [place for place, layer in enumerate(layers) if (layer in mixed.chosen) == bool(in_floats)]
            name = "stays in floats" if in_floats else "in integers"
            panel.barh(own, [values[layers[place]] for place in own], color=color, height=0.7, label=name)
        panel.axvline(0, color=palette.muted, linewidth=0.8)
        panel.set_title(title)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(layers)), [shorten(layer) for layer in layers])
    axes[0].invert_yaxis()
    if mixed.chosen:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    return figure
