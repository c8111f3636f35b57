"""Outputs that are memory of their own: torch gives what a program returns as it is, be it a weight or an input."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

__all__ = ["attribute", "constants_of", "owned", "storages"]


def owned(outputs: Iterable[Any], inputs: Sequence[Any], constants: Collection[int] = ()) -> list[Any]:
    """Copy outputs that share memory with an input, a constant or an output before them, or within themselves.

    Whoever writes to an output changes nothing else then: of a constant it would be the model, for good.

    Args:
        outputs: Tensors, computed without gradients.
        inputs: What they were computed from.
        constants: From ``storages``.
    """
    taken = {value.untyped_storage().data_ptr() for value in inputs}
    found = []
    for value in outputs:
        place = value.untyped_storage().data_ptr()
        if place in taken or place in constants or _overlaps(value):
            value = value.clone()
        else:
            taken.add(place)
        found.append(value)
    return found


def _overlaps(value: Tensor) -> bool:
    """Say whether a tensor shows an element of its memory more than once."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()))
    return span < value.numel()


def storages(values: Iterable[Tensor]) -> frozenset[int]:
    """Return where the memory of tensors starts, whatever part of it each of them shows."""
    return frozenset(value.untyped_storage().data_ptr() for value in values)


def constants_of(graph_module: GraphModule) -> frozenset[int]:
    """Return where the memory of a program's parameters, buffers and other constants starts.

    Args:
        graph_module: In its final place and layout.
    """
    import torch

    named = [str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"]
    read = [attribute(graph_module, name) for name in named]
    held = [*graph_module.parameters(), *graph_module.buffers(), *read]
    return storages(value for value in held if torch.is_tensor(value))


def attribute(graph_module: GraphModule, name: str) -> Any:
    """Return what a program holds under a name with dots."""
    value: Any = graph_module
    for part in name.split("."):
        value = getattr(value, part)
    return value
