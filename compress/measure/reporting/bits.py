"""A picture of what a network loses with the weights of one layer at few bits, and of the bits that were chosen."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from compress.measure.reporting.drawing import (
    LIGHT,
    NUM_SERIES,
    PAGE,
    Palette,
    name_layers,
    new_figure,
    page_svg,
    save_figure,
    style,
)
from compress.measure.reporting.results import Bits

__all__ = ["bits_svg", "save_bits"]

_MOST_CURVES = 12


def bits_svg(bits: Bits) -> str:
    """Draw the curves of the most sensitive layers, at most twelve.

    Returns:
        An ``<svg>`` element in the page's colours; empty where nothing is measured.
    """
    with mpl.rc_context(style(PAGE)):
        return page_svg(_draw(bits, PAGE), f"{bits.metric} with few bits in one layer") if bits.curves else ""


def save_bits(bits: Bits, directory: str | os.PathLike[str]) -> list[Path]:
    """Write the picture as ``bits.png`` and ``bits.svg``; each appears whole or not at all.

    Returns:
        The files; none where nothing is measured.
    """
    if not bits.curves:
        return []
    with mpl.rc_context(style(LIGHT)):
        return save_figure(_draw(bits, LIGHT), directory, "bits")


def _draw(bits: Bits, palette: Palette) -> Figure:
    figure = new_figure(9.2, 3.7)
    layers = bits.ranked()[:_MOST_CURVES]
    tried = sorted({num for points in bits.curves.values() for num, _ in points}, reverse=True)
    panels = {bits.metric: (100.0, f"validation {bits.metric}, %"), "loss": (1.0, "validation loss")}
    handles = []
    for position, (name, (factor, title)) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), position + 1)
        for number, layer in enumerate(layers):
            points = {num: factor * values[name] for num, values in bits.curves[layer]}
            places = [tried.index(num) for num in points]
            color = palette.series[number % NUM_SERIES]
            dash = "-" if number < NUM_SERIES else (0, (3, 2))
            (handle,) = axes.plot(
                places, list(points.values()), color=color, linestyle=dash, linewidth=1.5, marker="o", ms=3
            )
            if layer in bits.chosen:
                here = bits.chosen[layer]
                axes.plot(tried.index(here), points[here], color=color, marker="o", ms=8, fillstyle="none")
            handles += [handle] if position == 0 else []
        axes.axhline(factor * bits.whole[name], color=palette.muted, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        axes.set_title(title)
        axes.set_xlabel("bits of the weights of one layer")
        axes.set_xticks(range(len(tried)), [str(num) for num in tried])
    name_layers(figure, handles, layers, palette)
    return figure
