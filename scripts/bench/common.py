"""What the benchmarks share: options, a training step, a table, and rows as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from compress.distill import soft_target
from compress.files import write_json
from compress.measure.latency import Latency, measure_latency
from compress.measure.machine import describe_machine

__all__ = ["Row", "finish", "options", "ratios", "training_step"]


@dataclass(frozen=True)
class Row:
    """One figure; where there is none, the note says why."""

    name: str
    metric: str
    value: float | None
    unit: str
    note: str = ""


def options(description: str, more: Callable[[argparse.ArgumentParser], None] | None = None) -> argparse.Namespace:
    """Read ``--quick`` and ``--json FILE``, and what ``more`` adds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small case")
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


def training_step(
    network: nn.Module, x: Tensor, y: Tensor, *, teacher: nn.Module | None = None, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], object]:
    """Return a call that trains a network for a step, in float32 or under autocast."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    network.train()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = network(x)
            loss = nn.functional.cross_entropy(outputs.float(), y)
            if teacher is not None:
                with torch.no_grad():
                    taught = teacher(x)
                loss = loss + soft_target(outputs, taught)
        loss.backward()
        optimizer.step()

    return step


def finish(arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Print the rows, and write them where ``--json`` says."""
    machine = describe_machine()
    table = Table(title=f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}")
    columns = ["name", "metric", "value", "unit", *(["note"] if any(row.note for row in rows) else [])]
    for column in columns:
        table.add_column(column, justify="right" if column == "value" else "left")
    for row in rows:
        cells = [row.name, row.metric, "" if row.value is None else f"{row.value:.4g}", row.unit, row.note]
        table.add_row(*map(Text, cells[: len(columns)]))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file or a pipe has no edge to wrap at
    console.print(table)
    if arguments.json:
        write_json(arguments.json, [asdict(row) for row in rows])
