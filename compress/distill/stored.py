"""What a teacher says as named tensors that a cache can hold, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from compress.distill.lesson import View
from compress.errors import DataError

__all__ = ["from_stored", "to_stored"]

# Names: "outputs", "outputs/<key>" or "outputs/<position>" of one teacher, "<k>/outputs..." of the k-th of several,
# "weights" for the teachers' weights for each sample, "features/<layer>" for activations.


def to_stored(views: Sequence[View], weights: Tensor | None) -> dict[str, Tensor]:
    """Return named tensors, each with one row a sample.

    Args:
        views: What each teacher says.
        weights: Weight of each teacher for each sample, shape (K, N), or none.

    Raises:
        DataError: when an output is no tensor, mapping or sequence of tensors.

    Example:
        >>> import torch
        >>> sorted(to_stored([View({"a": torch.zeros(2, 3)}, {"fc": torch.ones(2, 4)})], None))
        ['features/fc', 'outputs/a']
    """
    stored: dict[str, Tensor] = {}
    for number, view in enumerate(views):
        prefix = f"{number}/" if len(views) > 1 else ""
        stored |= {f"{prefix}outputs{name}": tensor for name, tensor in _entries(view.outputs)}
    if weights is not None:
        stored["weights"] = weights.T
    stored |= {f"features/{name}": tensor for name, tensor in views[0].features.items()}
    return stored


def from_stored(stored: Mapping[str, Tensor]) -> tuple[list[View], Tensor | None]:
    """Return what ``to_stored`` was given; sequences of outputs come back as mappings by position."""
    features = {
        name.removeprefix("features/"): tensor for name, tensor in stored.items() if name.startswith("features/")
    }
    by_teacher: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        teacher, found, rest = name.partition("outputs")
        if found and not name.startswith("features/"):
            by_teacher.setdefault(teacher, {})[rest.removeprefix("/")] = tensor
    views = [
        View(entries.get("", entries), features)
        for _, entries in sorted(by_teacher.items(), key=lambda item: int(item[0].rstrip("/") or 0))
    ]
    weights = stored.get("weights")
    return views, weights.T if weights is not None else None


def _entries(outputs: Any) -> list[tuple[str, Tensor]]:
    if isinstance(outputs, Tensor):
        return [("", outputs)]
    pairs = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    found = [(f"/{name}", tensor) for name, tensor in pairs]
    wrong = [name for name, tensor in found if not isinstance(tensor, Tensor)]
    if wrong:
        raise DataError(
            f"teacher: expected outputs that are tensors, got others at {', '.join(wrong)}. "
            "Wrap the teacher so that its forward returns tensors only."
        )
    return found
