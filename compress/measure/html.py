"""The report as one page that needs nothing else: no network, no scripts."""

from __future__ import annotations

from html import escape

from compress.measure.plots import curves_plot, tradeoff_plot, widths_plot
from compress.measure.report import COLUMNS, Report, rows, size

__all__ = ["render"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60656c; --line: #d9dce0; --paper: #fff; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #9aa0a6; --line: #3a3f45; --paper: #16181b; --accent: #56b4e9; }
}
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.5rem; background: var(--paper); color: var(--ink);
       font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.6rem 0 .6rem; }
.sub, figcaption, .notes { color: var(--soft); }
code { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.gains { display: flex; flex-wrap: wrap; gap: 1rem 3rem; margin: 1.8rem 0; }
.gains strong { display: block; font-size: 2.4rem; line-height: 1.1; color: var(--accent); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .45rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
th:last-child, td:last-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
figure { margin: 0; } svg { max-width: 100%; height: auto; }
.machine td { white-space: normal; font-weight: 400 !important; text-align: left; }
"""


def render(report: Report) -> str:
    """Return the page."""
    sections = [
        _header(report),
        _stages(report),
        _figure("Accuracy, latency and size", tradeoff_plot(report), "The area of a point is its size on disk."),
        _engines(report),
        _figure("Training", curves_plot(report.curves, report.task_metric), "Validation split, after each epoch."),
        _figure("Width of each layer", widths_plot(report.widths), "Before and after pruning."),
        _facts(report),
    ]
    title = f"{escape(report.recipe)} · compress"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _header(report: Report) -> str:
    gains = report.gains()
    first, last = report.stages[0].name, report.stages[-1].name
    figures = [(f"{gains['smaller']:.1f}×", "smaller on disk")]
    if "faster" in gains:
        figures.append((f"{gains['faster']:.1f}×", "faster at batch 1"))
    if "points" in gains:
        figures.append((f"{gains['points']:+.2f}", f"points of test {report.task_metric}"))
    shown = "".join(f"<div><strong>{value}</strong>{escape(text)}</div>" for value, text in figures)
    return (
        f"<h1>{escape(report.recipe)}</h1><div class=sub>{escape(last)} against {escape(first)} · "
        f"<code>{escape(report.command)}</code></div><div class=gains>{shown}</div>"
    )


def _stages(report: Report) -> str:
    names = [report.task_metric if column == "metric" else column for column in COLUMNS]
    return "<h2>Stages</h2>" + _table(names, rows(report)) + (
        "<p class=sub>Latency is p50 / p95 in milliseconds. "
        f"The whole artefact, all engines together, is {size(report.stages[-1].artifact_bytes)}.</p>"
    )


def _engines(report: Report) -> str:
    found = report.stages[-1].latency
    cells = [
        [row.engine, str(row.batch), str(row.threads), f"{row.p50_ms:.3f}", f"{row.p95_ms:.3f}"]
        for row in sorted(found, key=lambda row: (row.batch, row.p50_ms))
    ]
    return "<h2>Engines of the artefact</h2>" + _table(["engine", "batch", "threads", "p50 ms", "p95 ms"], cells)


def _facts(report: Report) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    machine = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in report.machine.items())
    return f"<h2>How to read this</h2><ul class=notes>{notes}</ul><h2>Machine</h2><table class=machine>{machine}</table>"


def _table(names: list[str], cells: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _figure(title: str, svg: str | None, caption: str) -> str:
    if svg is None:
        return ""
    return f"<h2>{escape(title)}</h2><figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
