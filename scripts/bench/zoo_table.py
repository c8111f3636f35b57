"""The zoo's table in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["table"]

Row = Mapping[str, Any]

_COLUMNS = (
    ("Architecture", "---"),
    ("Ours", "---"),
    ("Torch-Pruning", "---"),
    ("Prunable share", "---:"),
    ("Parameters left", "---:"),
    ("Masked = shrunk: groups, error", "---"),
    ("Units against Torch-Pruning", "---"),
    ("Nodes", "---:"),
    ("Export, s", "---:"),
    ("Plan, s", "---:"),
    ("Torch-Pruning, s", "---:"),
    ("Edit on", "---"),
)


def table(names: Sequence[str], rows: Mapping[str, Mapping[str, Row]]) -> str:
    """Return the table of all checks.

    Args:
        names: Architectures, in order.
        rows: By check and name; a row is empty where the check has not been done.
    """
    lines = [_summary(names, rows), ""]
    for parts in zip(*_COLUMNS):
        lines.append(f"| {' | '.join(parts)} |")
    for name in names:
        ours, theirs = rows["prune"][name], rows["torch_pruning"][name]
        cells = [name, _passes(ours), _passes(theirs)]
        cells += [f"{100 * ours[key]:.1f} %" if key in ours else "" for key in ("share", "left")]
        cells += [_masked(rows["masked"][name]), _units(rows["units"][name]), str(ours.get("nodes", ""))]
        cells += [f"{row[key]:.1f}" if key in row else "" for row, key in _times(ours, theirs)]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in [*cells, ours.get('form', '')])} |")
    return "\n".join(lines) + "\n"


def _times(ours: Row, theirs: Row) -> list[tuple[Row, str]]:
    return [(ours, "export_s"), (ours, "plan_s"), (theirs, "tp_s")]


def _summary(names: Sequence[str], rows: Mapping[str, Mapping[str, Row]]) -> str:
    parts = []
    for check, who in (
        ("prune", "ours pass"),
        ("torch_pruning", "by Torch-Pruning pass"),
        ("masked", "are the masked network in every group"),
    ):
        done = [row for name in names if (row := rows[check][name])]
        if done:
            parts.append(f"{sum(row['pass'] for row in done)} of {len(done)} {who}")
    counts = [rows["units"][name].get("counts", {}) for name in names]
    if any(counts):
        total = {kind: sum(count.get(kind, 0) for count in counts) for kind in _KINDS}
        parts.append("units of Torch-Pruning: " + ", ".join(f"{num} {_KINDS[kind]}" for kind, num in total.items()))
    return "; ".join(parts) + "."


_KINDS = {
    "equal": "equal",
    "finer": "finer with ours",
    "fails": "that do not run",
    "kept": "of what ours keeps",
    "other": "that run and take parts of ours",
}


def _passes(row: Row) -> str:
    if not row:
        return ""
    return "yes" if row["pass"] else f"no: {row.get('reason', '')[:90]}"


def _masked(row: Row) -> str:
    if not row:
        return ""
    if not row["pass"]:
        return f"no: {row.get('reason', '')[:90]}"
    again = f" ({row['rechecked']} in float64)" if row["rechecked"] else ""
    return f"{row['groups']}{again}, {row['error32']:.0e} / {row['error64']:.0e}"


def _units(row: Row) -> str:
    counts = row.get("counts", {})
    if not counts:
        return "n.a." if row else ""
    return ", ".join(f"{counts[kind]} {kind}" for kind in _KINDS if counts.get(kind))
