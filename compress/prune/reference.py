"""What Torch-Pruning finds in a network, as units in our form: the reference that our groups are compared with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from compress.errors import EditError

__all__ = ["reference_units"]

_ROOTS = (nn.modules.conv._ConvNd, nn.Linear)


def reference_units(network: nn.Module, inputs: Sequence[Tensor]) -> set[frozenset[tuple[str, int, int]]]:
    """Return the units that Torch-Pruning would remove one at a time.

    Each channel of each group is removed from a copy whose every element holds its own position; what is missing
    afterwards is the unit (Fang et al. 2023, arXiv:2301.12900).

    Args:
        network: Left untouched.
        inputs: Example inputs.

    Returns:
        Units as sets of ``(tensor name, dimension, index)``; those that would remove an output of the network are
        included.

    Raises:
        EditError: when Torch-Pruning cannot trace the network.
    """
    twin = copy.deepcopy(network).eval()
    graph = _dependency_graph(twin, inputs)
    names = {module: name for name, module in twin.named_modules()}
    roots = []
    for group in graph.get_all_groups(root_module_types=_ROOTS):
        dep, indices = group[0]
        roots.append((names[dep.target.module], dep.handler, len(indices)))
    return {_removed(network, inputs, name, handler, index) for name, handler, num in roots for index in range(num)}


def _removed(
    network: nn.Module, inputs: Sequence[Tensor], name: str, handler: Any, index: int
) -> frozenset[tuple[str, int, int]]:
    twin = copy.deepcopy(network).eval()
    graph = _dependency_graph(twin, inputs)
    shapes = {}
    for tensor_name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        if tensor.dim() > 0:
            shapes[tensor_name] = tuple(tensor.shape)
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
    graph.get_pruning_group(twin.get_submodule(name), handler, [index]).prune()
    survivors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    gone: set[tuple[str, int, int]] = set()
    for tensor_name, shape in shapes.items():
        positions = survivors[tensor_name].detach().long()
        for dim, (before, after) in enumerate(zip(shape, positions.shape)):
            if before != after:
                stride = torch.Size(shape[dim + 1 :]).numel()
                kept = positions.movedim(dim, 0).reshape(after, -1)[:, 0].div(stride, rounding_mode="floor") % before
                gone |= {(tensor_name, dim, i) for i in set(range(before)) - set(kept.tolist())}
    return frozenset(gone)


def _dependency_graph(network: nn.Module, inputs: Sequence[Tensor]) -> Any:
    try:
        # A fresh container each time: Torch-Pruning changes the dicts and lists it is given.
        return tp.DependencyGraph().build_dependency(network, example_inputs=tuple(inputs), verbose=False)
    except Exception as error:  # its tracer fails in many ways; each means the same to the user
        raise EditError(
            f"reference: expected a network that Torch-Pruning can trace, got {type(network).__name__}: "
            f"{type(error).__name__}: {error}. Use compress.prune.find_groups."
        ) from error
