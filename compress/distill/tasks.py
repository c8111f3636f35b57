"""What a network is trained for: the loss against labels and the metrics that judge it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from compress.errors import RecipeError

__all__ = ["Classification", "Task"]


class Task(ABC):
    """A loss and metrics; the first metric is the one that reports lead with."""

    metric: str

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar loss against labels."""

    @abstractmethod
    def metrics(self, prefix: str) -> MetricCollection:
        """Return fresh metrics whose names start with ``prefix``."""


class Classification(Task):
    """One of several classes, by cross-entropy and accuracy.

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

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of logits (N, C) against class indices (N,)."""
        return F.cross_entropy(outputs.float(), targets, label_smoothing=self.label_smoothing)

    def metrics(self, prefix: str) -> MetricCollection:
        """Return accuracy over all samples."""
        return MetricCollection({"accuracy": MulticlassAccuracy(self.num_classes, average="micro")}, prefix=prefix)
