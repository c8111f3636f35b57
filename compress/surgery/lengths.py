"""Sizes beyond the batch that may vary in a captured program, such as the length of a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node

from compress.errors import CaptureError, DataError
from compress.surgery.samples import check_samples

__all__ = [
    "LARGEST_BATCH",
    "Length",
    "Sizes",
    "check_sizes",
    "dynamic_shapes",
    "has_sizes",
    "lengths_of",
    "read_lengths",
    "sizes_of",
    "user_inputs",
    "write_lengths",
]

Sizes = tuple[int | None, ...]
"""An input's shape in a captured graph, ``None`` for what varies: the batch, and lengths."""

LARGEST_BATCH = 65535
"""Samples that a program takes at most, unless it is captured for fewer: so many as cuDNN normalises at once."""


@dataclass(frozen=True)
class Length:
    """A size that may vary, the same in all inputs that have it.

    Args:
        dimension: Where it stands in the shape; 0 is the batch, which always varies.
        smallest: Least size.
        largest: Greatest size; ``None`` for any.
        inputs: Positions of the inputs that have it; without, all that have this dimension.
    """

    dimension: int = 1
    smallest: int = 1
    largest: int | None = None
    inputs: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        object.__setattr__(self, "inputs", None if self.inputs is None else tuple(self.inputs))
        if self.dimension < 1:
            raise CaptureError(f"dimension: expected at least 1, got {self.dimension}. The batch is dynamic anyway.")
        if self.smallest < 1 or (self.largest is not None and self.largest <= self.smallest):
            raise CaptureError(
                f"dimension {self.dimension}: expected sizes from at least 1 to more than that, got {self.smallest} to "
                f"{self.largest}. Give the range of sizes that will be served."
            )

    def __str__(self) -> str:
        return f"dimension {self.dimension} from {self.smallest} to {self.largest or 'any size'}"

    def holds(self, other: Length) -> bool:
        """Say whether the sizes of another are among these."""
        largest = self.largest is None or (other.largest is not None and other.largest <= self.largest)
        same = (self.dimension, self.inputs) == (other.dimension, other.inputs)
        return same and self.smallest <= other.smallest and largest

    def places(self, inputs: Sequence[Tensor]) -> list[int]:
        """Return the positions of the inputs that have it."""
        if self.inputs is not None:
            return list(self.inputs)
        return [index for index, value in enumerate(inputs) if value.dim() > self.dimension]


def dynamic_shapes(
    inputs: Sequence[Tensor], lengths: Sequence[Length], *, largest_batch: int = LARGEST_BATCH
) -> list[dict[int, Any]]:
    """Return what ``torch.export`` is told of each input: the batch and the lengths that it has.

    Raises:
        CaptureError: when an example does not have a length, or has it out of its range, or the batch differs.
    """
    check_samples(inputs)
    batch = Dim("batch", min=1, max=largest_batch)
    shapes: list[dict[int, Any]] = [{0: batch} for _ in inputs]
    for number, length in enumerate(lengths):
        size = Dim(f"size{length.dimension}_{number}", min=length.smallest, max=length.largest)
        places = length.places(inputs)
        if not places or any(not 0 <= index < len(inputs) for index in places):
            raise CaptureError(f"{length}: expected inputs that have it, got {places} of {len(inputs)}. Name others.")
        for index in places:
            shape = inputs[index].shape
            found = shape[length.dimension] if len(shape) > length.dimension else 0
            # torch takes a size of one for a constant.
            if found < max(2, length.smallest) or found > (length.largest or found):
                raise CaptureError(
                    f"{length}: expected an example of a size between {max(2, length.smallest)} and "
                    f"{length.largest or 'any'}, got input {index} of shape {tuple(shape)}. Give another example."
                )
            shapes[index][length.dimension] = size
    return shapes


def lengths_of(program: ExportedProgram) -> tuple[Length, ...]:
    """Return the lengths that a program was captured with."""
    found: dict[tuple[Any, int], list[int]] = {}
    for index, (_, value) in enumerate(user_inputs(program)):
        for dimension, size in enumerate(value.shape[1:], 1):
            if isinstance(size, torch.SymInt):
                found.setdefault((size.node.expr, dimension), []).append(index)
    return tuple(
        Length(dimension, *_range(program, expression), tuple(places))
        for (expression, dimension), places in found.items()
    )


def sizes_of(graph_module: GraphModule) -> list[Sizes]:
    """Return the sizes of a captured graph's inputs; nothing of a graph that does not know them."""
    values = [node.meta.get("val") for node in graph_module.graph.nodes if node.op == "placeholder"]
    if not all(isinstance(value, Tensor) for value in values):
        return []
    shapes = [tuple(size if isinstance(size, int) else None for size in value.shape) for value in values]
    return [(None, *shape[1:]) if shape else () for shape in shapes]


def has_sizes(tensor: Tensor, sizes: Sizes) -> bool:
    """Say whether a tensor has the sizes that are fixed.

    Example:
        >>> has_sizes(torch.ones(5, 3), (None, 3)), has_sizes(torch.ones(5, 4), (None, 3))
        (True, False)
    """
    shape = tensor.shape
    return len(shape) == len(sizes) and all(size is None or size == got for size, got in zip(sizes, shape))


def check_sizes(inputs: Sequence[Any], wanted: Sequence[Sizes]) -> None:
    """Refuse inputs that a graph was not captured for: sizes are written into it, and it would compute other numbers.

    Raises:
        DataError: when one is no tensor, or has another size where none varies.
    """
    if len(inputs) == len(wanted) and all(isinstance(x, Tensor) and has_sizes(x, s) for x, s in zip(inputs, wanted)):
        return
    expected = ", ".join(f"({', '.join('any' if size is None else str(size) for size in sizes)})" for sizes in wanted)
    got = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in inputs)
    raise DataError(
        f"captured network: expected inputs of shapes {expected}, got {got or 'none'}. Sizes beyond the batch are "
        "those of the example that it was captured with: pad to them, or name what varies in lengths, of capture, of "
        "prepare, or of the callback that quantises (quantize.lengths). Pruning by a graph fixes them."
    )


def write_lengths(lengths: Sequence[Length]) -> list[dict[str, Any]]:
    """Return lengths as plain data.

    Example:
        >>> read_lengths(write_lengths([Length(1, 2, 9)]))
        (Length(dimension=1, smallest=2, largest=9, inputs=None),)
    """
    return [{**vars(length), "inputs": None if length.inputs is None else list(length.inputs)} for length in lengths]


def read_lengths(lengths: Sequence[Mapping[str, Any]]) -> tuple[Length, ...]:
    """Rebuild what ``write_lengths`` wrote."""
    return tuple(Length(**length) for length in lengths)


def user_inputs(program: ExportedProgram) -> Iterator[tuple[Node, Tensor]]:
    """Yield the nodes of a program's inputs, with tensors that have their shapes."""
    names = set(program.graph_signature.user_inputs)
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            yield node, node.meta["val"]


def _range(program: ExportedProgram, expression: Any) -> tuple[int, int | None]:
    limits = program.range_constraints.get(expression)
    if limits is None:
        return 1, None
    lower, upper = (int(limit) if limit.is_Integer else None for limit in (limits.lower, limits.upper))
    return max(1, lower or 1), upper
