"""What a network costs, how fast it is, how well two agree, and the report that says so.

The names are imported lazily: serving an ONNX artefact measures latency where torch is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.measure.agreement import Agreement
    from compress.measure.cost import macs, num_bytes, num_params, widths
    from compress.measure.latency import Latency, measure_latency
    from compress.measure.machine import cpu_flags, describe_machine, versions
    from compress.measure.memory import peak_memory, peak_memory_of
    from compress.measure.reporting.report import (
        Gains,
        LatencyRow,
        Report,
        Sensitivity,
        Stage,
        Target,
        read_report,
        report_table,
        write_report,
    )

__all__ = [
    "Agreement",
    "Gains",
    "Latency",
    "LatencyRow",
    "Report",
    "Sensitivity",
    "Stage",
    "Target",
    "cpu_flags",
    "describe_machine",
    "macs",
    "measure_latency",
    "num_bytes",
    "num_params",
    "peak_memory",
    "peak_memory_of",
    "read_report",
    "report_table",
    "versions",
    "widths",
    "write_report",
]

# The function `agreement` has the name of its file, so it is imported from there.
_FILES = {
    "agreement": ["Agreement"],
    "cost": ["macs", "num_bytes", "num_params", "widths"],
    "latency": ["Latency", "measure_latency"],
    "machine": ["cpu_flags", "describe_machine", "versions"],
    "memory": ["peak_memory", "peak_memory_of"],
    "reporting.report": [
        "Gains",
        "LatencyRow",
        "Report",
        "Sensitivity",
        "Stage",
        "Target",
        "read_report",
        "report_table",
        "write_report",
    ],
}


def __getattr__(name: str) -> Any:
    for file, names in _FILES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
