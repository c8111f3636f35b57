"""The table of stages: once as strings, for the page and the terminal alike, and once for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.measure.reporting.results import LatencyRow, Report, Sensitivity
from compress.measure.reporting.units import ABSENT, as_bytes, as_count, as_metric, as_ms

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Row", "report_table", "sensitivity_table", "table_rows"]


@dataclass(frozen=True)
class Row:
    """One line of the table, ready to print.

    Args:
        stage: Stage name; empty on the lines of a stage's further engines.
        metric: Test metric.
        num_params: Parameters.
        macs: Multiply-accumulates of a sample.
        bytes: Size on disk.
        peak_memory: Peak memory.
        engine: Engine name; names, in the order of the batch sizes, where not one serves all.
        threads: Its threads.
        latency: ``(p50, p95)`` for each of the report's batch sizes, in milliseconds.
    """

    stage: str
    metric: str
    num_params: str
    macs: str
    bytes: str
    peak_memory: str
    engine: str
    threads: str
    latency: list[tuple[str, str]]


def table_rows(report: Report) -> list[Row]:
    """Return a line for each stage as it is served, and one for each engine that does not serve all batch sizes."""
    rows = []
    for stage in report.stages:
        served = [stage.latency_at(batch) for batch in report.batches]
        rows.append(
            Row(
                stage.name,
                as_metric(report.metric(stage)),
                as_count(stage.num_params),
                as_count(stage.macs),
                as_bytes(stage.bytes),
                as_bytes(stage.peak_memory),
                *_engine_cells(served),
            )
        )
        for name in stage.engines:
            alone = [stage.latency_at(batch, engine=name) for batch in report.batches]
            if alone != served:
                rows.append(Row("", "", "", "", "", "", *_engine_cells(alone)))
    return rows


def report_table(report: Report) -> Table:
    """Return the table for the terminal.

    Example:
        >>> from compress.measure.reporting.results import Stage
        >>> stage = Stage("teacher", {"accuracy": 0.97}, 10, 20, 30, None, [LatencyRow(1, "eager", 2, 0.5, 0.6)])
        >>> report_table(Report("digits", "compress run", 0, "accuracy", [stage])).row_count
        1
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Narrow: it fits 80 columns.
    table = Table(box=box.SIMPLE_HEAD, title=Text(f"{report.recipe}: test split"), pad_edge=False, padding=0)
    table.add_column("stage", style="bold", min_width=8)
    for header in (report.task_metric, "params", "MACs", "on disk"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("engine\n\N{MULTIPLICATION SIGN}threads", no_wrap=True)
    for batch in report.batches:
        table.add_column(f"batch {batch}\np50/p95 ms", justify="right", no_wrap=True)
    for index, row in enumerate(table_rows(report)):
        if index and row.stage == report.stages[-1].name:
            table.add_section()
        engine = ABSENT if row.engine == ABSENT else f"{row.engine} \N{MULTIPLICATION SIGN}{row.threads}"
        cells = [row.stage, row.metric, row.num_params, row.macs, row.bytes, engine]
        cells += [f"{p50}/{p95}" if p50 != ABSENT else ABSENT for p50, p95 in row.latency]
        table.add_row(*map(Text, cells), style=None if row.stage else "dim")
    return table


def sensitivity_table(sensitivity: Sensitivity, *, num_rows: int = 5) -> Table:
    """Return a table of the most and of the least sensitive layers, with about half of their units silent.

    Args:
        sensitivity: What was measured.
        num_rows: Layers of each kind; all layers where there are no more than both.

    Example:
        >>> curves = {"fc": [[0.0, {"loss": 1.0, "f1": 0.9}], [0.5, {"loss": 2.0, "f1": 0.4}]]}
        >>> sensitivity_table(Sensitivity("baseline", "l2", "f1", {"fc": 10}, 2, curves)).row_count
        1
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=Text("most sensitive layers first: validation split"), pad_edge=False)
    table.add_column("layer", style="bold")
    for header in ("units", "silent", "loss", sensitivity.metric):
        table.add_column(header, justify="right", no_wrap=True)
    layers = sensitivity.ranked()
    left_out = len(layers) - 2 * num_rows
    for index, layer in enumerate(layers):
        if left_out > 0 and num_rows <= index < len(layers) - num_rows:
            if index == num_rows:
                table.add_row(f"… {left_out} more", style="dim", end_section=True)
            continue
        ratio, values = sensitivity.at_half(layer)
        cells = [layer, str(sensitivity.widths[layer]), f"{100 * ratio:.0f} %", f"{values['loss']:.3f}"]
        table.add_row(*map(Text, [*cells, as_metric(values[sensitivity.metric])]))
    return table


def _engine_cells(rows: list[LatencyRow | None]) -> tuple[str, str, list[tuple[str, str]]]:
    engines = list(dict.fromkeys(row.engine for row in rows if row))
    threads = sorted({row.threads for row in rows if row})
    latency = [(as_ms(row.p50_ms), as_ms(row.p95_ms)) if row else (ABSENT, ABSENT) for row in rows]
    return ", ".join(engines) or ABSENT, ", ".join(map(str, threads)) or ABSENT, latency
