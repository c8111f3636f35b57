"""Keep some indices of some tensors: the one operation that structured pruning does to parameters and moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import EditError

__all__ = ["Slices", "apply_slices", "check_shapes", "shapes_of", "slice_tensor"]

Slices = Mapping[str, Mapping[str, Sequence[int]]]
"""``{tensor name: {dimension, as a string for JSON: kept indices}}``."""


def slice_tensor(tensor: Tensor, kept: Mapping[str, Sequence[int]]) -> Tensor:
    """Keep the given indices of each dimension.

    Args:
        tensor: Any shape.
        kept: ``{dimension: kept indices}``; a dimension that is not named stays whole.

    Returns:
        A new tensor, its dimensions in the same order in memory: what lay channels-last does so again.

    Example:
        >>> slice_tensor(torch.arange(6).view(2, 3), {"1": [0, 2]})
        tensor([[0, 2],
                [3, 5]])
    """
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    for dim, indices in kept.items():
        tensor = tensor.index_select(int(dim), torch.as_tensor(indices, device=tensor.device, dtype=torch.long))
    back = [order.index(dim) for dim in range(tensor.dim())]
    return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def shapes_of(network: nn.Module, slices: Slices) -> dict[str, list[int]]:
    """Return what an edit must find: the shapes of all parameters, and of the buffers that it slices.

    Args:
        network: Before the edit.
        slices: What the edit keeps.

    Example:
        >>> shapes_of(nn.Linear(3, 2), {})
        {'weight': [2, 3], 'bias': [2]}
    """
    buffers = {name: buffer for name, buffer in network.named_buffers() if name in slices}
    return {name: list(tensor.shape) for name, tensor in {**dict(network.named_parameters()), **buffers}.items()}


def check_shapes(network: nn.Module, shapes: Mapping[str, Sequence[int]] | None) -> None:
    """Refuse a network that is not the one an edit was made for.

    Args:
        network: Left untouched.
        shapes: From ``shapes_of``; ``None`` in a history that was written without.

    Raises:
        EditError: naming the first tensor that differs, in the order of the network's parameters.
    """
    if shapes is None:
        return
    parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    for name in [*parameters, *(name for name in shapes if name not in parameters)]:
        tensor = parameters.get(name, buffers.get(name))
        got = f"shape {tuple(tensor.shape)}" if tensor is not None else "no such tensor"
        expected = f"shape {tuple(shapes[name])}" if name in shapes else "no such tensor"
        if got != expected:
            raise EditError(
                f"history: expected {name} of {type(network).__name__} to have {expected}, got {got}. "
                "This is the first difference: build the very network that was edited."
            )


def apply_slices(network: nn.Module, slices: Slices, attributes: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Shrink a network in place.

    Args:
        network: A module whose parameters and buffers carry the names in ``slices``.
        slices: What to keep of each parameter and buffer.
        attributes: ``{module name: {attribute: new value}}``, such as ``{"conv1": {"out_channels": 8}}``.

    Returns:
        The same module. Parameters are new objects; their gradients are sliced along.

    Raises:
        EditError: when a name is missing or an index is out of range; the network is then untouched.
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, kept in slices.items():
        if name not in tensors:
            raise EditError(f"edit: expected a tensor named {name!r}, got none. Is this the network that was edited?")
        shape = tensors[name].shape
        for dim, indices in kept.items():
            if int(dim) >= len(shape) or (indices and max(indices) >= shape[int(dim)]):
                raise EditError(
                    f"edit: expected {name} to have index {max(indices, default=0)} in dimension {dim}, "
                    f"got shape {tuple(shape)}. Is this the network that was edited?"
                )
    names: dict[int, list[str]] = {}
    for listed in (network.named_parameters, network.named_buffers):
        for name, tensor in listed(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    with torch.no_grad():
        for name, kept in slices.items():
            old = tensors[name]
            new: Tensor = slice_tensor(old.detach(), kept)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
                new.grad = None if old.grad is None else slice_tensor(old.grad, kept)
            for tied in names[id(old)]:  # tied tensors stay tied
                owner, _, leaf = tied.rpartition(".")
                setattr(network.get_submodule(owner), leaf, new)
    for module_name, values in attributes.items():
        module = network.get_submodule(module_name)
        for attribute, value in values.items():
            setattr(module, attribute, tuple(value) if isinstance(value, list) else value)
    return network
