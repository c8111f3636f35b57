from __future__ import annotations

import io

import pytest
from rich.console import Console

from compress.measure.reporting.table import report_table, table_rows
from tests.measure.samples import rows, sample_report


def printed(width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(report_table(sample_report()))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_row_for_each_stage_and_each_further_engine() -> None:
    lines = table_rows(sample_report())
    assert [(row.stage, row.engine) for row in lines] == [
        ("teacher", "eager"),
        ("pruned", "eager"),
        ("int8 artefact", "aoti"),
        ("", "onnxruntime"),
    ]
    assert lines[0].latency == [("8.00", "9.60"), ("90.0", "99.0")]
    assert (lines[2].metric, lines[2].bytes, lines[2].peak_memory, lines[2].threads) == (
        "97.25 %",
        "100 kB",
        "\N{EN DASH}",
        "2",
    )


def test_engines_that_share_the_batch_sizes_are_named_as_they_serve() -> None:
    report = sample_report()
    aoti, ort = rows("aoti", 0.5, 9.0), rows("onnxruntime", 0.7, 6.0)
    report.stages[-1].latency = [aoti[0], ort[1], aoti[1], ort[0]]
    served, *alone = table_rows(report)[2:]
    assert (served.stage, served.engine, served.threads) == ("int8 artefact", "aoti, onnxruntime", "2")
    assert served.latency == [("0.500", "0.600"), ("6.00", "6.60")]
    assert [(row.engine, row.latency) for row in alone] == [
        ("aoti", [("0.500", "0.600"), ("9.00", "9.90")]),
        ("onnxruntime", [("0.700", "0.840"), ("6.00", "6.60")]),
    ]


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
