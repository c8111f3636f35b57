"""A report to write, read and draw."""

from __future__ import annotations

from compress.measure.reporting.report import LatencyRow, Report, Stage


def rows(engine: str, batch1: float, batch32: float) -> list[LatencyRow]:
    return [LatencyRow(1, engine, 2, batch1, 1.2 * batch1), LatencyRow(32, engine, 2, batch32, 1.1 * batch32)]


def sample_report() -> Report:
    """Return a fresh report of three stages, the artefact with two engines."""
    return Report(
        recipe="digits",
        command="compress run recipes/digits.yaml",
        seed=3,
        task_metric="accuracy",
        stages=[
            Stage(
                "teacher",
                {"accuracy": 0.98, "f1": 0.97},
                1_000_000,
                40_000_000,
                4_000_000,
                9_000_000,
                rows("eager", 8.0, 90.0),
            ),
            Stage("pruned", {"accuracy": 0.97}, 100_000, 4_000_000, 400_000, 5_000_000, rows("eager", 2.0, 20.0)),
            Stage(
                "int8 artefact",
                {"accuracy": 0.9725},
                100_000,
                4_000_000,
                100_000,
                None,
                rows("aoti", 0.5, 5.0) + rows("onnxruntime", 0.7, 6.0),
                artifact_bytes=900_000,
            ),
        ],
        curves={"teacher: val/accuracy": [[1, 0.5], [2, 0.9]], "student: train/loss": [[1, 2.0], [2, 0.01]]},
        widths=[{"layer": "conv1", "before": 32, "after": 20}, {"layer": "fc", "before": 10, "after": 10}],
        machine={"processor": "Some CPU", "memory_gib": 16},
        notes=["One seed."],
    )
