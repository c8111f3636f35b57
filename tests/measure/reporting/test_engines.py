"""The table and the picture of engines say what was measured."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compress.errors import RunError
from compress.measure.reporting.engines import engines_failed, engines_note, engines_table, save_engines

ABOUT: dict[str, Any] = {"name": "small", "scheme": "int8", "engines_by_batch": {1: "fast", 4: "fast", 16: "wide"}}


def row(batch: int, engine: str, threads: int, p50: float) -> dict[str, Any]:
    return {
        "batch": batch,
        "engine": engine,
        "threads": threads,
        "p50_ms": p50,
        "p95_ms": 2 * p50,
        "samples_per_second": 1e3 * batch / p50,
    }


ROWS = [
    *(row(1, "eager", 1, 4.0), row(1, "fast", 1, 0.5), row(1, "wide", 1, 1.0)),
    *(row(32, "eager", 2, 40.0), row(32, "fast", 2, 8.0), row(32, "wide", 2, 5.0)),
]


def printed(rows: list[dict[str, Any]]) -> list[list[str]]:
    console = Console(width=100, file=io.StringIO())
    console.print(engines_table(rows, ABOUT))
    return [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_the_fastest_comes_first_and_all_are_compared_with_eager() -> None:
    lines = printed(ROWS)
    assert ["1", "1", "fast", "0.500", "1.00", "2.00", "k", "8.00"] in lines
    assert ["32", "2", "wide", "5.00", "10.0", "6.40", "k", "8.00"] in lines
    assert ["eager", "4.00", "8.00", "250", "1.00"] in lines
    alone = printed([entry for entry in ROWS if entry["engine"] != "eager"])
    assert ["1", "1", "fast", "0.500", "1.00", "2.00", "k", "–"] in alone


def test_where_the_program_rounds_all_are_compared_with_what_does_not() -> None:
    rows = [*ROWS[:3], row(1, "float32", 1, 2.0)]
    lines = printed(rows)
    assert ["1", "1", "fast", "0.500", "1.00", "2.00", "k", "4.00"] in lines
    assert ["eager", "4.00", "8.00", "250", "0.500"] in lines
    assert "float32: the same without rounding" in engines_note(rows, ABOUT)


def test_the_note_says_what_serves_and_what_eager_is() -> None:
    note = engines_note(ROWS, ABOUT)
    assert "fast (batches near 1, 4), wide (batches near 16)" in note
    assert "eager: the artefact's program in fp32" in note
    assert "integers" in note
    assert "integers" not in engines_note(ROWS, ABOUT | {"scheme": None})
    assert "no eager to compare with" in engines_note(ROWS[1:3], ABOUT | {"engines_by_batch": {1: "fast"}})


def test_what_did_not_run_comes_last_without_values_and_with_its_reason(tmp_path: Path) -> None:
    absent = {"p50_ms": None, "p95_ms": None, "samples_per_second": None}
    rows = [*ROWS[:-1], {**ROWS[-1], **absent, "reason": "a batch of 32: Error: no\nroom"}]
    lines = printed(rows)
    assert [line[-5:] for line in lines if line[-5:-4] in (["fast"], ["wide"])][-1] == ["wide", *"––––"]
    assert engines_failed(rows) == ["wide did not run a batch of 32: Error: no room"]
    assert engines_failed(rows[:-1]) == []
    text = save_engines(rows, ABOUT, str(tmp_path / "a.svg")).read_text()
    assert text.count("did not run") == 1
    assert text.count(" ms, ") == save_engines(ROWS, ABOUT, str(tmp_path / "b.svg")).read_text().count(" ms, ") - 1
    nothing = [{**entry, **absent, "reason": "a batch of 1: Error"} for entry in ROWS[:3]]
    assert save_engines(nothing, ABOUT, str(tmp_path / "c.svg")).read_text().count("did not run") == 3
    assert ["1", "1", "eager", *"––––"] in printed(nothing)
    without = [{**ROWS[0], **absent, "reason": "a batch of 1: Error"}, *ROWS[1:3]]  # nothing to compare with
    assert ["1", "1", "fast", "0.500", "1.00", "2.00", "k", "–"] in printed(without)


def test_the_picture_names_engines_threads_and_figures(tmp_path: Path) -> None:
    text = save_engines(ROWS, ABOUT, str(tmp_path / "a.svg")).read_text()
    for words in ("small, int8", "batch 1", "batch 32", "eager (fp32)", "1 thread", "2 threads", "0.500 ms, 2.00 k/s"):
        assert words in text
    assert save_engines(ROWS[:1], ABOUT, str(tmp_path / "b.png")).read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in tmp_path.iterdir()} == {"a.svg", "b.png"}
    with pytest.raises(RunError, match=r"expected a file ending in .png, .svg, .pdf, got bench"):
        save_engines(ROWS, ABOUT, "bench")
