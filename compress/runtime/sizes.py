"""Which sizes an artefact's inputs may have beyond the batch, and what to say of others."""

from __future__ import annotations

from collections.abc import Sequence

from compress.runtime.manifest import Range, TensorSpec

__all__ = ["described", "wrong_size"]


def wrong_size(specs: Sequence[TensorSpec], shapes: Sequence[Sequence[int]]) -> str | None:
    """Say which size is out of its range, or is another than that of an input before, or ``None``.

    Inputs are never padded or cut to fit: of most networks that changes what comes out.

    Args:
        specs: Of the inputs.
        shapes: Of what is given, of as many dimensions each.

    Example:
        >>> spec = TensorSpec("x", "float32", (None, None), {1: Range("size1", 2, 9, 4)})
        >>> wrong_size([spec], [(5, 10)])
        'x: expected a size from 2 to 9 in dimension 1, got 10. Give another, or export with a range that has it.'
    """
    known: dict[str, tuple[int, str]] = {}
    for spec, shape in zip(specs, shapes):
        for dimension, allowed in spec.ranges.items():
            size = shape[dimension]
            if size < allowed.smallest or (allowed.largest is not None and size > allowed.largest):
                return (
                    f"{spec.name}: expected a size {_between(allowed)} in dimension {dimension}, got {size}. "
                    "Give another, or export with a range that has it."
                )
            first, where = known.setdefault(allowed.name, (size, spec.name))
            if size != first:
                return (
                    f"{spec.name}: expected a size of {first} in dimension {dimension}, as {where} has, got {size}. "
                    "Give both the same."
                )
    return None


def described(spec: TensorSpec) -> str:
    """Return the shape of an input in words.

    Example:
        >>> described(TensorSpec("x", "float32", (None, None, 3), {1: Range("size1", 2, None, 4)}))
        '(N, of at least 2, 3)'
    """
    free = ["N"] + ["any"] * (len(spec.shape) - 1)
    free = [_between(spec.ranges[at]) if at in spec.ranges else word for at, word in enumerate(free)]
    return "(" + ", ".join(word if size is None else str(size) for size, word in zip(spec.shape, free)) + ")"


def _between(allowed: Range) -> str:
    if allowed.largest is None:
        return f"of at least {allowed.smallest}"
    return f"from {allowed.smallest} to {allowed.largest}"
