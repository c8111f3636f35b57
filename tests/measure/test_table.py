from __future__ import annotations

import io

import pytest
from rich.console import Console

from compress.measure.table import report_table, table_rows
from tests.measure.samples import sample_report


def printed(width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(report_table(sample_report()))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_row_for_each_stage_and_each_further_engine() -> None:
    rows = table_rows(sample_report())
    assert [(row.stage, row.engine) for row in rows] == [
        ("teacher", "eager"),
        ("pruned", "eager"),
        ("int8 artefact", "aoti"),
        ("", "onnxruntime"),
    ]
    assert rows[0].latency == [("8.00", "9.60"), ("90.0", "99.0")]
    assert (rows[2].metric, rows[2].bytes, rows[2].peak_memory, rows[2].threads) == (
        "97.25 %",
        "100 kB",
        "\N{EN DASH}",
        "2",
    )


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_off(width: int) -> None:
    text = printed(width)
    assert "…" not in text
    for figure in [
        "teacher",
        "98.00 %",
        "1.00 M",
        "40.0 M",
        "4.00 MB",
        "onnxruntime \N{MULTIPLICATION SIGN}2",
        "8.00/9.60",
        "6.00/6.60",
    ]:
        assert figure in text


def test_names_are_not_markup() -> None:
    report = sample_report()
    report.stages[0].name = "[red]teacher[/]"
    console = Console(width=150, file=io.StringIO())
    console.print(report_table(report))
    assert "[red]teacher[/]" in console.file.getvalue()  # type: ignore[attr-defined]
