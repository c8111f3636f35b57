"""What the benchmarks share: options, a table, and rows as JSON."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from compress.measure.latency import Latency, measure_latency
from compress.measure.machine import describe_machine

__all__ = ["Row", "finish", "options", "ratios"]


@dataclass(frozen=True)
class Row:
    """One figure."""

    name: str
    metric: str
    value: float
    unit: str


def options(description: str, more: Callable[[argparse.ArgumentParser], None] | None = None) -> argparse.Namespace:
    """Read ``--quick`` and ``--json FILE``, and what ``more`` adds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small case, in less than a minute")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows there")
    if more is not None:
        more(parser)
    return parser.parse_args()


def ratios(case: str, calls: Mapping[str, Callable[[], object]], *, seconds: float, min_runs: int = 20) -> list[Row]:
    """Time calls in one interleaved run; the first one is what the others are compared with."""
    measured: dict[str, Latency] = measure_latency(
        calls, seconds=seconds, warmup=min(5, min_runs // 4), min_runs=min_runs, progress=True
    )
    first = next(iter(calls))
    rows = []
    for name, latency in measured.items():
        rows.append(Row(f"{case}: {name}", "p50", latency.p50_ms, "ms"))
        if name != first:
            rows.append(Row(f"{case}: {name}", f"time / {first}", latency.p50_ms / measured[first].p50_ms, "ratio"))
    return rows


def finish(arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Print the rows, and write them where ``--json`` says."""
    machine = describe_machine()
    table = Table(title=f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}")
    for column in ("name", "metric", "value", "unit"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for row in rows:
        table.add_row(row.name, row.metric, f"{row.value:.4g}", row.unit)
    Console().print(table)
    if arguments.json:
        temporary = arguments.json.with_name(arguments.json.name + ".tmp")
        temporary.write_text(json.dumps([asdict(row) for row in rows], indent=1))
        os.replace(temporary, arguments.json)
