"""What a report holds, as plain data: stages with their costs, curves, widths, and the gains read off them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Bits", "Gains", "LatencyRow", "Mixed", "Report", "Sensitivity", "Stage", "Target"]


@dataclass(frozen=True)
class LatencyRow:
    """Latency of one engine at one batch size.

    Args:
        batch: Samples in a call.
        engine: Engine name, for instance ``"eager"``.
        threads: Threads it could use.
        p50_ms: Median of a call, in milliseconds.
        p95_ms: 95th percentile of a call, in milliseconds.
    """

    batch: int
    engine: str
    threads: int
    p50_ms: float
    p95_ms: float


@dataclass
class Stage:
    """One network on the way from the teacher to the artefact.

    Args:
        name: What readers see.
        metrics: Test metrics by their torchmetrics name, lower case.
        num_params: Parameters.
        macs: Multiply-accumulates of one sample.
        bytes: Size on disk of the weights, or of the files that the serving engines load.
        peak_memory: Bytes by which a fresh process grows.
        latency: Rows; of each batch size, that of the engine that serves it comes first.
        artifact_bytes: Size of the whole artefact, where the stage is one.
    """

    name: str
    metrics: dict[str, float]
    num_params: int | None
    macs: int | None
    bytes: int
    peak_memory: int | None
    latency: list[LatencyRow]
    artifact_bytes: int | None = None

    def latency_at(self, batch: int, *, engine: str | None = None) -> LatencyRow | None:
        """Return the row of an engine (default: the one that serves it) at a batch size, or ``None``."""
        for row in self.latency:
            if row.batch == batch and engine in (None, row.engine):
                return row
        return None

    @property
    def engines(self) -> list[str]:
        """Engine names, those that serve first."""
        return list(dict.fromkeys(row.engine for row in self.latency))


@dataclass(frozen=True)
class Gains:
    """The last stage against the first; ``None`` where one of them lacks the figure.

    Args:
        size: How many times smaller on disk.
        latency: How many times faster at batch 1, by the median.
        macs: How many times fewer multiply-accumulates.
        metric_points: Difference of the task's metric, in hundredths.
    """

    size: float | None
    latency: float | None
    macs: float | None
    metric_points: float | None


@dataclass(frozen=True)
class Sensitivity:
    """What a network loses on the validation split with part of one layer silent, all else untouched.

    Args:
        stage: Which network of the run it is.
        criterion: What said which units matter least.
        metric: The metric that judges.
        widths: The number of units of each layer.
        num_points: How many points were to be measured; there are fewer in ``curves`` while it is going on.
        curves: Points ``[ratio silent, {"loss": value, metric: value}]`` by layer, from ratio 0.
    """

    stage: str
    criterion: str
    metric: str
    widths: dict[str, int]
    num_points: int
    curves: dict[str, list[list[Any]]]

    def ranked(self) -> list[str]:
        """Return the layers that are measured, by their loss with half of their units silent, the highest first."""
        layers = [layer for layer, points in self.curves.items() if len(points) > 1]
        return sorted(layers, key=lambda layer: -self.at_half(layer)[1]["loss"])

    def at_half(self, layer: str) -> list[Any]:
        """Return a layer's point that is nearest to half of its units.

        Example:
            >>> curves = {"fc": [[0.0, {"loss": 1.0}], [0.4, {"loss": 2.0}], [0.9, {"loss": 3.0}]]}
            >>> Sensitivity("baseline", "l2", "accuracy", {"fc": 10}, 3, curves).at_half("fc")
            [0.4, {'loss': 2.0}]
        """
        return min(self.curves[layer][1:], key=lambda point: abs(point[0] - 0.5))


@dataclass(frozen=True)
class Bits:
    """What a network loses on the validation split with the weights of one layer at few bits, all else untouched.

    Args:
        stage: Which network of the run it is.
        metric: The metric that judges.
        measured_on: What would make it another measurement.
        whole: ``{"loss": value, metric: value}`` of the network as it is.
        sizes: The number of weights of each layer.
        curves: Points ``[bits, {"loss": value, metric: value}]`` by layer, most bits first; there are fewer while it is
            going on.
        chosen: The bits of each layer that meet the target, where there was one.
    """

    stage: str
    metric: str
    measured_on: str
    whole: dict[str, float]
    sizes: dict[str, int]
    curves: dict[str, list[list[Any]]]
    chosen: dict[str, int] = field(default_factory=dict)

    def ranked(self) -> list[str]:
        """Return the layers, by their loss at the fewest bits, the highest first."""
        return sorted(self.curves, key=lambda layer: -self.curves[layer][-1][1]["loss"])

    def losses(self) -> dict[str, dict[int, float]]:
        """Return what each layer adds to the loss, by its bits.

        Example:
            >>> curves = {"fc": [[8, {"loss": 1.5}], [2, {"loss": 3.0}]]}
            >>> Bits("baseline", "accuracy", "", {"loss": 1.0}, {"fc": 6}, curves).losses()
            {'fc': {8: 0.5, 2: 2.0}}
        """
        return {
            layer: {bits: values["loss"] - self.whole["loss"] for bits, values in points}
            for layer, points in self.curves.items()
        }


@dataclass(frozen=True)
class Mixed:
    """What a network in integers gains on the validation split and costs on an engine, one layer in floats at a time.

    Args:
        stage: Which network of the run it is.
        metric: The metric that judges.
        engine: What runs it.
        batch: Samples in a call.
        threads: Threads of a call; ``None`` for the engine's default.
        measured_on: What would make it another measurement.
        floats: ``{"loss": value, metric: value, "ms": value}`` of the network in floats throughout.
        integers: The same of the network with every layer in integers.
        layers: The same with one layer in floats, by its name; there are fewer while it is going on.
        wanted_ms: The most milliseconds of a call.
        chosen: The layers that stay in floats: within the time, the least loss in sum.
        reached: The same of the network with all of them in floats, measured.
    """

    stage: str
    metric: str
    engine: str
    batch: int
    threads: int | None
    measured_on: str
    floats: dict[str, float]
    integers: dict[str, float]
    layers: dict[str, dict[str, float]]
    wanted_ms: float | None = None
    chosen: list[str] = field(default_factory=list)
    reached: dict[str, float] | None = None

    def gains(self) -> dict[str, float]:
        """Return what the loss falls by with each layer in floats."""
        return {layer: self.integers["loss"] - values["loss"] for layer, values in self.layers.items()}

    def times(self) -> dict[str, float]:
        """Return the milliseconds that each layer costs more in floats.

        Example:
            >>> whole, fc = {"loss": 1.0, "ms": 2.0}, {"loss": 0.9, "ms": 2.5}
            >>> Mixed("baseline", "accuracy", "onnxruntime", 1, None, "", whole, whole, {"fc": fc}).times()
            {'fc': 0.5}
        """
        return {layer: values["ms"] - self.integers["ms"] for layer, values in self.layers.items()}


@dataclass(frozen=True)
class Target:
    """A limit that the network was to be brought under.

    Args:
        metric: ``latency_ms`` or ``latency``, both in milliseconds, ``macs``, ``params`` or ``bytes``.
        wanted: The limit.
        reached: What the network has.
        original: What it had before.
        engine: What ran it, where that matters.
    """

    metric: str
    wanted: float
    reached: float
    original: float | None = None
    engine: str | None = None


@dataclass
class Report:
    """All that a run showed.

    Args:
        recipe: Its name.
        command: The line that started the run.
        seed: Its seed.
        task_metric: The metric that judges, a key of each stage's ``metrics``.
        stages: The teacher, or the first there is, to the artefact.
        curves: Points ``[epoch, value]`` by name, for instance ``"student: val/accuracy"``.
        widths: ``{"layer", "before", "after"}`` for each layer.
        machine: From ``describe_machine``.
        notes: Sentences a reader needs to judge the figures.
        sensitivity: What each layer's silence costs, where that was measured.
        bits: What few bits in each layer cost, where that was measured.
        mixed: What integers in each layer bring and cost, where that was measured.
        target: What pruning was to reach, where it had such a target.
    """

    recipe: str
    command: str
    seed: int
    task_metric: str
    stages: list[Stage]
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    widths: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sensitivity: Sensitivity | None = None
    bits: Bits | None = None
    mixed: Mixed | None = None
    target: Target | None = None

    def metric(self, stage: Stage) -> float | None:
        """Return a stage's value of the metric that judges, or ``None``."""
        return stage.metrics.get(self.task_metric)

    @property
    def batches(self) -> list[int]:
        """The batch sizes measured, ascending."""
        return sorted({row.batch for stage in self.stages for row in stage.latency})

    @property
    def gains(self) -> Gains:
        """The last stage against the first."""
        first, last = self.stages[0], self.stages[-1]
        before, after = first.latency_at(1), last.latency_at(1)
        metrics = self.metric(first), self.metric(last)
        return Gains(
            size=_ratio(first.bytes, last.bytes),
            latency=_ratio(before.p50_ms, after.p50_ms) if before and after else None,
            macs=_ratio(first.macs, last.macs),
            metric_points=None if metrics[0] is None or metrics[1] is None else 100 * (metrics[1] - metrics[0]),
        )


def _ratio(before: float | None, after: float | None) -> float | None:
    return before / after if before and after else None
