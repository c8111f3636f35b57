"""What a network is trained for: the loss against labels and the metrics that judge it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MultilabelF1Score
from torchmetrics.regression import MeanAbsoluteError
from torchmetrics.wrappers.abstract import WrapperMetric

from compress.distill.lesson import pick
from compress.errors import DataError, RecipeError

__all__ = ["NO_LABEL", "Classification", "MultiLabel", "MultiTask", "Regression", "Task", "hard_target"]

NO_LABEL = -100
"""The class of a sample or token without a label, as in PyTorch's ``ignore_index``."""


class Task(ABC):
    """A loss and metrics; the first metric is the one that reports lead with."""

    metric: str

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the scalar loss against labels; samples without a label do not count."""

    @abstractmethod
    def metrics(self, prefix: str) -> MetricCollection:
        """Return fresh metrics whose names start with ``prefix``."""


class Classification(Task):
    """One of several classes, by cross-entropy and accuracy; of samples or of tokens.

    Args:
        num_classes: Number of classes.
        label_smoothing: Share of the target spread over all classes (Szegedy et al. 2016, arXiv:1512.00567), in [0, 1).

    Raises:
        RecipeError: when a value is out of range.
    """

    metric = "accuracy"

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        if num_classes < 2:
            raise RecipeError(f"task.num_classes: expected at least 2, got {num_classes}. Count the labels.")
        if not 0 <= label_smoothing < 1:
            raise RecipeError(f"task.label_smoothing: expected a value in [0, 1), got {label_smoothing}. Use 0.1, say.")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean cross-entropy of logits (N, ..., C) against class indices (N, ...)."""
        return hard_target(pick(outputs), targets, label_smoothing=self.label_smoothing)

    def metrics(self, prefix: str) -> MetricCollection:
        """Return accuracy over all samples or tokens with a label."""
        accuracy = MulticlassAccuracy(self.num_classes, average="micro", ignore_index=NO_LABEL)
        return _collection({"accuracy": _Arranged(accuracy, _rows)}, prefix)


class MultiLabel(Task):
    """Any of several labels, by binary cross-entropy and macro F1.

    Args:
        num_labels: Number of labels.

    Raises:
        RecipeError: when there are no labels.
    """

    metric = "f1"

    def __init__(self, num_labels: int) -> None:
        if num_labels < 1:
            raise RecipeError(f"task.num_labels: expected at least 1, got {num_labels}. Count the labels.")
        self.num_labels = num_labels

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean binary cross-entropy of logits (N, C) against (N, C); negative targets have no label."""
        logits = pick(outputs)
        known = targets >= 0
        value = F.binary_cross_entropy_with_logits(logits.float(), targets.clamp(min=0).float(), reduction="none")
        return (value * known).sum() / known.sum().clamp(min=1)

    def metrics(self, prefix: str) -> MetricCollection:
        """Return the F1 score, averaged over labels."""
        score = MultilabelF1Score(self.num_labels, average="macro", ignore_index=NO_LABEL)
        return _collection({"f1": _Arranged(score, _labels)}, prefix)


class Regression(Task):
    """Numbers, by squared distance and mean absolute error."""

    metric = "mae"

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean squared distance of (N, ...) from (N, ...); NaN targets have no label."""
        values = pick(outputs).float()
        known = ~torch.isnan(targets)
        distance = (values - torch.where(known, targets, 0.0).view_as(values)).square()
        return (distance * known.view_as(values)).sum() / known.sum().clamp(min=1)

    def metrics(self, prefix: str) -> MetricCollection:
        """Return the mean absolute error."""
        return _collection({"mae": _Arranged(MeanAbsoluteError(), _numbers)}, prefix)


class MultiTask(Task):
    """Several tasks of one network: outputs and targets are mappings with an entry for each.

    Args:
        tasks: Task by the name of its output and target.
        weights: Factor of each task's loss; 1 where none is named.

    Raises:
        RecipeError: when there are no tasks, or a weight names none of them.
    """

    def __init__(self, tasks: dict[str, Task], weights: dict[str, float] | None = None) -> None:
        if not tasks:
            raise RecipeError("task.tasks: expected at least one task, got none. Name the network's outputs.")
        unknown = sorted(set(weights or {}) - set(tasks))
        if unknown:
            raise RecipeError(
                f"task.weights: expected names among {', '.join(tasks)}, got {', '.join(unknown)}. Use the same names."
            )
        self.tasks = tasks
        self.weights = {name: (weights or {}).get(name, 1.0) for name in tasks}
        first = next(iter(tasks))
        self.metric = f"{first}_{tasks[first].metric}"

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the weighted sum over tasks."""
        for what, given in (("outputs", outputs), ("targets", targets)):
            missing = sorted(set(self.tasks) - set(given)) if isinstance(given, Mapping) else sorted(self.tasks)
            if missing:
                raise DataError(
                    f"{what}: expected a mapping with {', '.join(self.tasks)}, got none for {', '.join(missing)}. "
                    "Name the entries as in task.tasks."
                )
        values = [self.weights[name] * task.loss(outputs[name], targets[name]) for name, task in self.tasks.items()]
        return torch.stack(values).sum()

    def metrics(self, prefix: str) -> MetricCollection:
        """Return the metrics of all tasks, each named after its task."""
        metrics: dict[str, Metric] = {}
        for name, task in self.tasks.items():
            for metric_name, metric in task.metrics("").items():
                metrics[f"{name}_{metric_name}"] = _Arranged(metric, partial(_entries, name))  # type: ignore[arg-type]
        return _collection(metrics, prefix)


def hard_target(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy over what has a label; zero, with a gradient, where nothing has one.

    Args:
        logits: Shape (N, ..., C).
        targets: Class indices of shape (N, ...); ``NO_LABEL`` has none.
        label_smoothing: Share of the target spread over all classes, in [0, 1).

    Example:
        >>> hard_target(torch.zeros(2, 4), torch.tensor([1, -100]))
        tensor(1.3863)
    """
    flat, labels = logits.float().flatten(0, -2), targets.flatten()
    value = F.cross_entropy(flat, labels, ignore_index=NO_LABEL, label_smoothing=label_smoothing, reduction="sum")
    return value / (labels != NO_LABEL).sum().clamp(min=1)


class _Arranged(WrapperMetric):
    """Gives a metric its part of the outputs and targets, in the form that it wants."""

    def __init__(self, metric: Metric, arrange: Callable[[Any, Any], tuple[Any, Any]]) -> None:
        super().__init__()
        self.metric = metric
        self.arrange = arrange

    def update(self, outputs: Any, targets: Any) -> None:
        self.metric.update(*self.arrange(outputs, targets))

    def compute(self) -> Tensor:
        return self.metric.compute()

    def reset(self) -> None:
        self.metric.reset()
        super().reset()


def _rows(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    return pick(outputs).flatten(0, -2), targets.flatten()


def _labels(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    return pick(outputs), targets


def _numbers(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    known = ~torch.isnan(targets)
    return pick(outputs).float().view_as(targets)[known], targets[known]


def _entries(name: str, outputs: Mapping[str, Any], targets: Mapping[str, Any]) -> tuple[Any, Any]:
    return outputs[name], targets[name]


def _collection(metrics: Mapping[str, Metric], prefix: str) -> MetricCollection:
    return MetricCollection(dict(metrics), prefix=prefix, compute_groups=False)
