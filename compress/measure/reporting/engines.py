"""Latency of an artefact's engines as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich import box
from rich.table import Table
from rich.text import Text

from compress.errors import RunError
from compress.files import replacing
from compress.measure.reporting.drawing import LIGHT, NUM_SERIES, new_figure, style
from compress.measure.reporting.units import as_count, as_ms

__all__ = ["BASELINE", "FLOATS", "check_picture", "engines_failed", "engines_note", "engines_table", "save_engines"]

BASELINE = "eager"
"""The engine that others are compared with: the artefact's program, operator by operator."""

FLOATS = "float32"
"""What they are compared with where the program rounds: the same without that."""

_KINDS = (".png", ".svg", ".pdf")
_ENDS = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def engines_table(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Table:
    """Return the table for the terminal: a section for each batch size and number of threads, the fastest first.

    Args:
        rows: ``batch, engine, threads, p50_ms, p95_ms, samples_per_second``; the values of what did not run are None.
        about: ``name, scheme, engines_by_batch`` of the artefact.
    """
    table = Table(box=box.SIMPLE_HEAD, title=Text(_title(about)), pad_edge=False)
    for name in ("batch", "threads"):
        table.add_column(name, justify="right")
    table.add_column("engine")
    for name in ("p50 ms", "p95 ms", "samples/s", f"\N{MULTIPLICATION SIGN} {_baseline(rows)}"):
        table.add_column(name, justify="right", no_wrap=True)
    for batch, threads in _sections(rows):
        chosen = _chosen(rows, batch, threads)
        for index, row in enumerate(chosen):
            ratio = _against_baseline(row, chosen)
            cells = [str(batch), str(threads)] if index == 0 else ["", ""]
            cells += [str(row["engine"]), as_ms(row["p50_ms"]), as_ms(row["p95_ms"])]
            cells += [as_count(row["samples_per_second"]), as_ms(ratio)]
            table.add_row(*map(Text, cells), style="bold" if index == 0 else None, end_section=row is chosen[-1])
    return table


def engines_note(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """Return what a reader of the table needs to know: what serves, and what the others are compared with."""
    serves: Mapping[int, str] = about["engines_by_batch"]
    names = list(dict.fromkeys(serves.values()))
    near = {name: ", ".join(str(size) for size in sorted(serves) if serves[size] == name) for name in names}
    text = "'auto' serves " + ", ".join(f"{name} (batches near {near[name]})" for name in names)
    if len(names) == 1:
        text = f"'auto' serves {names[0]}"
    if not any(row["engine"] == BASELINE for row in rows):
        return f"{text}; no {BASELINE} to compare with"
    more = ", its integers computed in floats" if about["scheme"] else ""
    text = f"{text}; {BASELINE}: the artefact's program in fp32, operator by operator{more}"
    return f"{text}; {FLOATS}: the same without rounding" if _baseline(rows) == FLOATS else text


def engines_failed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each reason for which an engine has no values."""
    failed = [row for row in rows if row["p50_ms"] is None]
    return list(dict.fromkeys(f"{row['engine']} did not run {' '.join(row['reason'].split())}" for row in failed))


def check_picture(file: str) -> None:
    """Refuse a file name that does not say which kind of picture it is to be.

    Raises:
        RunError: when it ends in none of .png, .svg, .pdf.
    """
    if Path(file).suffix.lower() not in _KINDS:
        raise RunError(f"--plot: expected a file ending in {', '.join(_KINDS)}, got {file}. Say bench.png.")


def save_engines(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], file: str) -> Path:
    """Draw a panel for each batch size: median and 95th percentile of each engine, a colour for a number of threads.

    Args:
        rows: As for ``engines_table``.
        about: ``name, scheme, engines_by_batch, machine``.
        file: Ends in .png, .svg or .pdf; it appears whole or not at all.

    Returns:
        Its path.
    """
    check_picture(file)
    path = Path(file)
    kind = path.suffix[1:].lower()
    with mpl.rc_context(style(LIGHT)), replacing(path) as temporary:
        _draw(rows, about).savefig(temporary, format=kind, dpi=160, metadata=_ENDS[kind])
    return path


def _draw(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Figure:
    batches = sorted({row["batch"] for row in rows})
    threads = sorted({row["threads"] for row in rows})
    engines = sorted({row["engine"] for row in rows}, key=lambda name: _fastest(rows, name))
    columns = min(2, len(batches))
    lines = -(-len(batches) // columns)
    figure = new_figure(9.2, lines * (0.26 * len(engines) * len(threads) + 0.9) + 0.6)
    axes: Axes | None = None
    for place, batch in enumerate(batches, 1):
        axes = figure.add_subplot(lines, columns, place, sharey=axes)
        _panel(axes, [row for row in rows if row["batch"] == batch], engines, threads)
        axes.set_title(f"batch {batch}")
        axes.tick_params(axis="y", length=0, labelleft=place % columns == 1 or columns == 1)
    text = "milliseconds of a call (log scale), p50 as a dot, up to p95 as a line; samples a second by p50"
    figure.supxlabel(text, fontsize=9.5, color=LIGHT.muted)
    figure.suptitle(_title(about), x=0.01, ha="left", fontsize=11, color=LIGHT.foreground)
    handles = [mpl.lines.Line2D([], [], color=_color(num), marker="o", linestyle="none") for num in range(len(threads))]
    names = [f"{num} thread{'s' if num > 1 else ''}" for num in threads]
    figure.legend(
        handles, names, loc="outside upper right", ncols=len(names), frameon=False, labelcolor=LIGHT.foreground
    )
    return figure


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], engines: Sequence[str], threads: Sequence[int]) -> None:
    step = 0.8 / len(threads)
    for row in rows:
        number = threads.index(row["threads"])
        y = engines.index(row["engine"]) + (number - (len(threads) - 1) / 2) * step
        color = _color(number)
        if row["p50_ms"] is None:
            place = axes.get_yaxis_transform()  # from the left edge, whatever is measured beside it
            axes.text(0.01, y, "did not run", transform=place, va="center", fontsize=8, color=LIGHT.muted)
            continue
        axes.plot([row["p50_ms"], row["p95_ms"]], [y, y], color=color, linewidth=1.4, solid_capstyle="butt")
        axes.plot(row["p50_ms"], y, color=color, marker="o", ms=5)
        axes.annotate(
            f"{as_ms(row['p50_ms'])} ms, {as_count(row['samples_per_second'])}/s",
            (row["p95_ms"], y),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=LIGHT.muted,
        )
    measured = [row for row in rows if row["p50_ms"] is not None]
    low = min((row["p50_ms"] for row in measured), default=1.0)
    high = max((row["p95_ms"] for row in measured), default=1.0)
    span = max(high / low, 2.0)
    axes.set_xscale("log")
    axes.set_xlim(low / span**0.08, high * span**0.6)  # what is written beside the last needs its place
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if span < 300 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(engines)), [f"{name} (fp32)" if name == BASELINE else name for name in engines])
    axes.set_ylim(len(engines) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _sections(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    return sorted({(row["batch"], row["threads"]) for row in rows})


def _chosen(rows: Sequence[Mapping[str, Any]], batch: int, threads: int) -> list[Mapping[str, Any]]:
    chosen = [row for row in rows if (row["batch"], row["threads"]) == (batch, threads)]
    return sorted(chosen, key=_ms)


def _against_baseline(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how many times faster a row is than the baseline among others, ``None`` where one of the two is absent."""
    name = _baseline(rows)
    base = next((other["p50_ms"] for other in rows if other["engine"] == name), None)
    return None if base is None or row["p50_ms"] is None else float(base / row["p50_ms"])


def _baseline(rows: Sequence[Mapping[str, Any]]) -> str:
    return FLOATS if any(row["engine"] == FLOATS for row in rows) else BASELINE


def _fastest(rows: Sequence[Mapping[str, Any]], engine: str) -> float:
    return min(_ms(row) / row["batch"] for row in rows if row["engine"] == engine)


def _ms(row: Mapping[str, Any]) -> float:
    return math.inf if row["p50_ms"] is None else float(row["p50_ms"])


def _title(about: Mapping[str, Any]) -> str:
    return f"{about['name']}, {about['scheme'] or 'float'}"


def _color(number: int) -> str:
    return LIGHT.series[number % NUM_SERIES]
