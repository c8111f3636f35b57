"""What a loss sees of one batch: what the student and its teachers said, and what the data say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.errors import DataError, RecipeError

__all__ = ["Batch", "Lesson", "View", "num_samples", "pick", "read_batch"]


@dataclass(frozen=True)
class View:
    """What one network said to a batch.

    Args:
        outputs: What its forward returned: a tensor, or a mapping or sequence of tensors.
        features: Named activations that losses asked for.
    """

    outputs: Any
    features: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Lesson:
    """One batch as losses see it.

    Args:
        student: What the student said.
        teachers: What each teacher said; gradients do not flow into it.
        targets: Labels: a tensor, a mapping of them, or none.
        mask: Which tokens count, booleans of shape (N, L), or none.
        index: Which training sample each row is, integers of shape (N,), or none.
        source: Which rows come from the source domain, booleans of shape (N,), or none.
        teacher_weights: Weight of each teacher for each sample, shape (K, N), columns sum to 1; or none for one.
        progress: Fraction of training done, in [0, 1].
    """

    student: View
    teachers: Sequence[View]
    targets: Any = None
    mask: Tensor | None = None
    index: Tensor | None = None
    source: Tensor | None = None
    teacher_weights: Tensor | None = None
    progress: float = 0.0


@dataclass(frozen=True)
class Batch:
    """A batch in one form, however the loader gives it.

    Args:
        inputs: Tensors for the network by position.
        named: Tensors for the network by keyword.
        targets: Labels, or none.
        mask: Which tokens count, booleans of shape (N, L), or none.
        keys: Index and view of each sample, integers of shape (N, 2), or none.
        source: Which rows come from the source domain, or none.
    """

    inputs: tuple[Tensor, ...]
    named: Mapping[str, Tensor]
    targets: Any = None
    mask: Tensor | None = None
    keys: Tensor | None = None
    source: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of samples."""
        return num_samples(self.inputs or tuple(self.named.values()))


def read_batch(batch: Any) -> Batch:
    """Understand a batch.

    - a tensor: inputs without labels;
    - ``(inputs,)``, ``(inputs, targets)`` or ``(inputs, targets, keys)``, where inputs may be a tuple of tensors, or a
      mapping that is given by keyword;
    - a mapping: ``labels`` (or ``label``, ``targets``) and ``keys`` are taken out, the rest goes to the network by
      keyword, ``attention_mask`` says which tokens count;
    - ``{"source": batch, "target": batch}`` from two domains: both in one.

    Raises:
        DataError: when it is none of these.

    Example:
        >>> read_batch((torch.zeros(2, 3), torch.tensor([0, 1]))).size
        2
        >>> list(read_batch({"input_ids": torch.zeros(2, 5), "labels": torch.tensor([0, 1])}).named)
        ['input_ids']
    """
    if isinstance(batch, Mapping):
        if set(batch) == {"source", "target"}:
            return _join(read_batch(batch["source"]), read_batch(batch["target"]))
        named = dict(batch)
        keys = named.pop("keys", None)
        targets = next((named.pop(name) for name in ("labels", "label", "targets") if name in named), None)
        return Batch((), named, targets, _mask(named), keys)
    if isinstance(batch, Tensor):
        return Batch((batch,), {})
    if not isinstance(batch, Sequence) or not 1 <= len(batch) <= 3:
        raise DataError(
            f"batch: expected a tensor, a mapping, or (inputs, targets), got {type(batch).__name__}. "
            "Return one of these from the loader."
        )
    inputs, targets, keys = (*batch, None, None)[:3]
    if isinstance(inputs, Mapping):
        return Batch((), dict(inputs), targets, _mask(inputs), keys)
    return Batch(tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,), {}, targets, None, keys)


def pick(outputs: Any, name: str | None = None) -> Tensor:
    """Return the tensor that a loss on outputs means.

    Args:
        outputs: A tensor, or a mapping or sequence of tensors.
        name: A key of the mapping or position in the sequence. Without one: the tensor itself, the entry ``logits``, or
            the only or first one.

    Raises:
        RecipeError: when there is no such entry.

    Example:
        >>> pick({"logits": torch.ones(1), "hidden": torch.zeros(1)})
        tensor([1.])
    """
    if isinstance(outputs, Tensor):
        return outputs
    entries: Mapping[str, Any]
    if isinstance(outputs, Mapping):
        entries = outputs
        name = name or ("logits" if "logits" in entries else next(iter(entries)))
    elif isinstance(outputs, Sequence):
        entries = {str(position): entry for position, entry in enumerate(outputs)}
        name = name or "0"
    else:
        raise RecipeError(
            f"outputs: expected a tensor, a mapping or a sequence of tensors, got {type(outputs).__name__}. "
            "Wrap the network so that its forward returns one of these."
        )
    if not isinstance(entries.get(name), Tensor):
        raise RecipeError(
            f"output: expected one of {', '.join(map(str, entries))}, got {name!r}. Name an output of the network."
        )
    return entries[name]


def num_samples(value: Any) -> int:
    """Return the length of the first tensor in nested tuples and mappings."""
    while not isinstance(value, Tensor):
        value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
    return len(value)


def _mask(named: Mapping[str, Tensor]) -> Tensor | None:
    mask = named.get("attention_mask")
    return mask.bool() if mask is not None else None


def _join(source: Batch, target: Batch) -> Batch:
    first, second = source.size, target.size
    device = (source.inputs or tuple(source.named.values()))[0].device
    return Batch(
        inputs=tuple(torch.cat(pair) for pair in zip(source.inputs, target.inputs)),
        named={name: torch.cat([value, target.named[name]]) for name, value in source.named.items()},
        targets=torch.cat([_labels(source, device), _labels(target, device)]),
        mask=None if source.mask is None or target.mask is None else torch.cat([source.mask, target.mask]),
        source=torch.arange(first + second, device=device) < first,
    )


def _labels(batch: Batch, device: torch.device) -> Tensor:
    if isinstance(batch.targets, Tensor):
        return batch.targets
    return torch.full((batch.size,), -100, dtype=torch.int64, device=device)
