"""The zoo's table in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["LEAST_COSINE", "least_cosine", "table"]

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

_SHARE = 0.9
LEAST_COSINE = 0.95
"""Of fake-quantised with floats, of converted with fake-quantised, of ONNX Runtime with converted."""
_MOST_TIMES = 4
"""Of what a cosine lacks of one where nothing but the weights is rounded, this is right, too."""
_INT8_COLUMNS = (
    ("Architecture", "---"),
    ("int8", "---"),
    ("MACs in int8", "---:"),
    ("Cosine, SNR", "---"),
    ("ONNX Runtime: cosine, int8 + float kernels", "---"),
    ("Pruned: MACs in int8", "---:"),
    ("Cosine, SNR", "---"),
    ("ONNX Runtime: cosine, int8 + float kernels", "---"),
    ("What stays in floats, share of MACs", "---"),
)


def least_cosine(weights_alone: float) -> float:
    """Return the cosine with floats that a network has to keep, given the one that rounding its weights leaves.

    Example:
        >>> [least_cosine(alone) for alone in (1.0, 0.875, 0.5)]
        [0.95, 0.5, -1.0]
    """
    return min(LEAST_COSINE, 1 - _MOST_TIMES * (1 - weights_alone))


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
    if any(rows["quantize"].values()):
        lines += ["", *_quantized(names, rows["quantize"])]
    return "\n".join(lines) + "\n"


def _quantized(names: Sequence[str], rows: Mapping[str, Row]) -> list[str]:
    """The table of int8 after training; architectures that have not been quantised are left out."""
    done = [(name, rows[name]) for name in names if rows[name]]
    high = sum(min(_shares(row), default=0.0) >= _SHARE for _, row in done)
    passing = [row for _, row in done if row["pass"]]
    parts = [part for row in passing for part in (row, row["pruned"]) if part["cosine"] < LEAST_COSINE]
    blind = sum(least_cosine(part["weights_alone"]) <= 0 for part in parts)
    lines = [
        f"{sum(row['pass'] for _, row in done)} of {len(done)} quantise and export before and after pruning; "
        f"{high} have at least {_SHARE:.0%} of their MACs in int8 both times.",
        f"{len(parts)} times a cosine is below {LEAST_COSINE} with float32, but lacks no more than {_MOST_TIMES} times "
        "what one lacks where nothing but the weights is rounded to 8 bits (in brackets); "
        f"{blind} of these say nothing, since rounding the weights alone leaves nothing to compare.",
        f"{_far(done)} times the cosine of ONNX Runtime with the converted program is below {LEAST_COSINE}; in "
        "brackets that of the converted program with itself, inputs moved by half a step.",
        "",
    ]
    lines += [f"| {' | '.join(parts)} |" for parts in zip(*_INT8_COLUMNS)]
    for name, row in done:
        cells = [name, _passes(row)]
        for part in (row, row.get("pruned", {})):
            cells.append(f"{100 * part['share']:.1f} %" if "share" in part else "")
            cells += [_agreement(part), _exported(part)]
        cells.append("; ".join(f"{share:.1%} {reason}" for reason, share in row.get("reasons", {}).items()))
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return lines


def _agreement(part: Row) -> str:
    if "cosine" not in part:
        return ""
    alone = f" ({part['weights_alone']:.3f})" if part["cosine"] < LEAST_COSINE else ""
    return f"{part['cosine']:.3f}, {part['snr_db']:.0f} dB{alone}"


def _exported(part: Row) -> str:
    if "exported" not in part:
        return ""
    moved = f" ({part['moved']:.3f})" if part["exported"] < LEAST_COSINE else ""
    return f"{part['exported']:.3f}{moved}, {' + '.join(map(str, part['kernels']))}"


def _far(rows: Sequence[tuple[str, Row]]) -> int:
    parts = [part for _, row in rows for part in (row, row.get("pruned", {}))]
    return sum(part.get("exported", 1.0) < LEAST_COSINE for part in parts)


def _shares(row: Row) -> list[float]:
    return [part["share"] for part in (row, row.get("pruned", {})) if "share" in part]


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
