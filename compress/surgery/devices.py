"""A captured graph on another device: what tracing wrote down of the device it was captured on moves along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

__all__ = ["device_of", "follow_device", "move_constants"]


def move_constants(graph_module: GraphModule, move: Callable[[Tensor], Tensor]) -> bool:
    """Replace the tensors that are no parameters and no buffers: those that code made on its way.

    Args:
        graph_module: From ``torch.export``; changed in place, with what is inside it.
        move: Returns a tensor where and as it shall be, as what ``nn.Module._apply`` takes.

    Returns:
        Whether anything has been replaced by another tensor.
    """
    changed = False
    for holder, name, value in _constants(graph_module):
        moved = move(value)
        changed |= moved is not value
        setattr(holder, name, moved)
    return changed


def _constants(graph_module: GraphModule) -> list[tuple[nn.Module, str, Tensor]]:
    # Export keeps them in graphs and in plain modules; observers have tensors of their own where they want them.
    holders = [module for module in graph_module.modules() if isinstance(module, GraphModule) or _is_plain(module)]
    return [
        (holder, name, value)
        for holder in holders
        for name, value in list(vars(holder).items())
        if isinstance(value, Tensor)
    ]


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Module


def device_of(graph_module: GraphModule) -> torch.device | None:
    """Return the device of the graph's tensors, or ``None`` where it has none."""
    constants = [value for _, _, value in _constants(graph_module)]
    tensors = [*graph_module.parameters(), *graph_module.buffers(), *constants]
    return tensors[0].device if tensors else None


def follow_device(graph_module: GraphModule, old: torch.device, new: torch.device) -> bool:
    """Let operators that make tensors, as positions and masks, make them on another device.

    Args:
        graph_module: Changed in place, with the graphs inside it.
        old: Where the graph was; what is written down of another device stays.
        new: Where its tensors are now.

    Returns:
        Whether anything has changed.

    Example:
        >>> class Positions(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x + torch.arange(3, device=x.device)
        >>> graph_module = torch.export.export(Positions(), (torch.ones(3),)).module()
        >>> follow_device(graph_module, torch.device("cpu"), torch.device("meta"))
        True
        >>> graph_module(torch.ones(3, device="meta")).device
        device(type='meta')
    """

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == old.type and value.index in (None, old.index):
            return new
        return value

    changed = False
    for module in graph_module.modules():
        if not isinstance(module, GraphModule):
            continue
        touched = False
        for node in module.graph.nodes:
            args, kwargs = torch.utils._pytree.tree_map(moved, (node.args, dict(node.kwargs)))
            if (args, kwargs) != (node.args, dict(node.kwargs)):
                node.args, node.kwargs, touched = args, kwargs, True
        if touched:
            module.recompile()
        changed |= touched
    return changed
