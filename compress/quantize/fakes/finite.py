"""Values that are not finite: a batch of them moves no range, and a network of them becomes no integers.

With float16 and a scaler of gradients, batches that overflow are part of a fit, and their steps are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from compress.errors import EditError
from compress.quantize.graph.annotate import layer_of

__all__ = ["check_numbers", "check_ranges", "keep_finite", "known", "reader_of"]

_STATISTICS = ("running_mean", "running_var")


def known(observer: Any) -> tuple[Tensor, Tensor]:
    """Return copies of a range's ends, those of nothing seen where there are none yet.

    Args:
        observer: PT2E's, with ``min_val`` and ``max_val``.
    """
    ends = ((observer.min_val, math.inf), (observer.max_val, -math.inf))
    low, high = (end.clone() if end.numel() else end.new_tensor(nothing) for end, nothing in ends)
    return low, high


def keep_finite(buffers: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Put back, in place, what a batch has made of a range where that is not finite; a GPU is not waited for.

    Args:
        buffers: The least value and the largest, shape () or (C,), then what follows from them, one for each range.
        before: The same from before the batch.

    Example:
        >>> low, high = torch.tensor([-3.0, torch.nan]), torch.tensor([2.0, torch.nan])
        >>> keep_finite((low, high), (torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])))
        >>> low, high
        (tensor([-3., -1.]), tensor([2., 1.]))
    """
    finite = torch.isfinite(buffers[1] - buffers[0])
    for buffer, old in zip(buffers, before):
        buffer.copy_(torch.where(finite, buffer, old))


def check_numbers(network: nn.Module) -> None:
    """Refuse a network in which a parameter or a BatchNorm's statistic is not finite.

    Args:
        network: From ``prepare`` or ``parametrize``.

    Raises:
        EditError: when one is not; the message names it.
    """
    statistics = ((name, value) for name, value in network.named_buffers() if name.endswith(_STATISTICS))
    for name, value in [*network.named_parameters(), *statistics]:
        if not bool(torch.isfinite(value).all()):
            raise EditError(
                f"convert: expected finite weights and statistics, got others in {name!r}. Training has diverged: go "
                "on from a checkpoint before that, with a smaller learning rate, or look for NaN in the data."
            )


def check_ranges(graph_module: GraphModule) -> None:
    """Refuse a prepared network in which a range that integers stand for is not known.

    Raises:
        EditError: when one is not; the message names the layer that reads what has passed there.
    """
    for node in graph_module.graph.nodes:
        module: Any = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not hasattr(module, "fake_quant_enabled") or module.is_dynamic or _has_range(module):
            continue
        raise EditError(
            f"convert: expected a range for what {reader_of(node)!r} takes at {node.name!r}, got none: no batch of "
            "finite values has passed. Train it or calibrate it with some first, and look for NaN in the data."
        )


def reader_of(node: Node) -> str:
    """Return the name of the layer that reads what passes a fake quantizer."""
    return next(filter(None, map(layer_of, node.users)), "the network")


def _has_range(module: Any) -> bool:
    observer = getattr(module, "activation_post_process", None)
    numbers = [module.scale] if observer is None else [observer.min_val, observer.max_val, module.scale]
    return all(value.numel() and bool(torch.isfinite(value).all()) for value in numbers)
