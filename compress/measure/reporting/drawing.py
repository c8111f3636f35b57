"""What all pictures share: their style, and colours that are the page's own, light or dark, or those of a file."""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from compress.files import replacing

__all__ = [
    "LIGHT",
    "NUM_SERIES",
    "PAGE",
    "Palette",
    "name_layers",
    "new_figure",
    "page_svg",
    "save_figure",
    "shorten",
    "style",
]

NUM_SERIES = 6


@dataclass(frozen=True)
class Palette:
    """The colours of a picture.

    Args:
        foreground: Of titles.
        muted: Of labels.
        line: Of axes and grids.
        background: Of what lies behind.
        series: Of data, ``NUM_SERIES`` of them.
    """

    foreground: str
    muted: str
    line: str
    background: str
    series: tuple[str, ...]


PAGE = Palette("#010a01", "#010a02", "#010a03", "#010a04", tuple(f"#010b{index:02x}" for index in range(NUM_SERIES)))
"""Colours that stand for the page's own until ``page_svg`` writes them."""

LIGHT = Palette(
    "#1c2430",
    "#5d6876",
    "#d9dee5",
    "#ffffff",
    ("#2563c9", "#c2700f", "#1f8a5b", "#9a4bb8", "#c33d4b", "#66707c"),
)
"""The page's colours by day, for pictures in files of their own."""

_VARIABLES = {PAGE.foreground: "fg", PAGE.muted: "muted", PAGE.line: "line", PAGE.background: "bg"} | {
    color: f"series-{index}" for index, color in enumerate(PAGE.series)
}


def style(palette: Palette) -> Any:
    """Return Matplotlib's settings for a palette."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "compress",
        "text.parse_math": False,  # a dollar in a name is a dollar
        "font.size": 9.5,
        "text.color": palette.foreground,
        "axes.labelcolor": palette.muted,
        "axes.edgecolor": palette.line,
        "axes.facecolor": "none",
        "figure.facecolor": "none" if palette is PAGE else palette.background,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titlecolor": palette.foreground,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": palette.line,
        "grid.linewidth": 0.7,
        "xtick.color": palette.line,
        "ytick.color": palette.line,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.muted,
    }


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, its size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # its renderer measures the labels
    return figure


def page_svg(figure: Figure, description: str) -> str:
    """Return a figure drawn in ``PAGE`` as an ``<svg>`` element in the page's own colours.

    Args:
        figure: The picture.
        description: What a screen reader says.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)


def save_figure(figure: Figure, directory: str | os.PathLike[str], name: str) -> list[Path]:
    """Write a figure as ``NAME.png`` and ``NAME.svg``; each appears whole or not at all.

    Returns:
        The files.
    """
    paths = [Path(directory) / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=160, metadata=metadata)
    return paths


def shorten(name: str) -> str:
    """Return the end of a name that is long.

    Example:
        >>> shorten("encoder." * 6 + "weight")
        '….encoder.encoder.encoder.encoder.weight'
    """
    return name if len(name) <= 40 else f"…{name[-39:]}"


def name_layers(figure: Figure, handles: Sequence[Any], layers: Sequence[str], palette: Palette) -> None:
    """Say beside the panels which line is which layer.

    Args:
        figure: Its panels draw a line for each layer.
        handles: One of each layer's lines.
        layers: Their names, the most sensitive first.
        palette: Colours.
    """
    figure.legend(
        handles,
        [shorten(layer) for layer in layers],
        loc="outside right upper",
        frameon=False,
        labelcolor=palette.foreground,
        title="most sensitive first",
        alignment="left",
        handlelength=1.8,
        fontsize=8.5,
        title_fontsize=8.5,
    )
