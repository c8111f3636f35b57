"""What an artefact says of values: how stored ones become inputs, and what the classes are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["check_labels", "check_scaling", "check_structure", "class_output"]

Shape = Sequence[int | None]


def check_labels(labels: Sequence[Any] | None, shape: Shape) -> None:
    """Make sure that each class has a name.

    Args:
        labels: The manifest's; none for class numbers.
        shape: Of the output with the scores of classes; of two dimensions, the last is that of classes.

    Raises:
        ValueError: when there are fewer names than classes.

    Example:
        >>> check_labels(["cat", "dog"], (None, 3))
        Traceback (most recent call last):
        ...
        ValueError: 2 labels for 3 classes
    """
    classes = shape[-1]
    if labels and len(shape) == 2 and classes is not None and len(labels) < classes:
        raise ValueError(f"{len(labels)} labels for {classes} classes")


def class_output(names: Sequence[str]) -> int:
    """Return the place of the output that holds the scores of classes: the one called ``logits``, else the first.

    Example:
        >>> class_output(["boxes", "logits"]), class_output(["output_0", "output_1"])
        (1, 0)
    """
    return list(names).index("logits") if "logits" in names else 0


def check_structure(structure: str | None, names: Sequence[str]) -> None:
    """Make sure that outputs can come in a structure.

    Args:
        structure: ``"tuple"``, ``"dict"``, or ``None`` for one by itself.
        names: Of the outputs.

    Raises:
        ValueError: when they cannot.

    Example:
        >>> check_structure(None, ["logits", "boxes"])
        Traceback (most recent call last):
        ...
        ValueError: 2 outputs (logits, boxes) for one by itself
    """
    if structure not in (None, "tuple", "dict"):
        raise ValueError(f"outputs in the structure {structure!r}, neither tuple nor dict")
    if structure is None and len(names) != 1:
        raise ValueError(f"{len(names)} outputs ({', '.join(names)}) for one by itself")
    if len(set(names)) < len(names):
        raise ValueError(f"one name for several outputs ({', '.join(names)})")


def check_scaling(steps: Mapping[str, Any], shape: Shape) -> None:
    """Make sure that stored values can become an input by ``(raw * scale - mean) / std``.

    Args:
        steps: The manifest's preprocessing, with ``scale``, ``mean`` and ``std``.
        shape: Of the input, (N, C, ...).

    Raises:
        ValueError: when they cannot; ``KeyError`` and ``TypeError`` likewise.
    """
    channels = shape[1] if len(shape) > 1 else 1
    for key in ("mean", "std"):
        if not isinstance(steps[key], list | tuple):
            raise TypeError(f"{key} is of type {type(steps[key]).__name__}")
        values = _numbers(steps[key])
        if len(values) not in (1, channels or max(1, len(values))) or not np.isfinite(values).all():
            raise ValueError(f"{key} {steps[key]} for {channels} channels")
    if not _numbers(steps["std"]).all() or not np.isfinite(_numbers([steps["scale"]])).all():
        raise ValueError(f"std {steps['std']} and scale {steps['scale']}")


def _numbers(values: Sequence[Any]) -> np.ndarray:
    """Return values as preprocessing takes them: in float32, which makes infinity or zero of the farthest."""
    try:
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray([float(value) for value in values]).astype(np.float32)
    except OverflowError as error:  # an integer that no float holds
        raise ValueError(str(error)) from error
